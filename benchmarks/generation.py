"""Time kdctl's sampling beside transformers' ``generate``: same bf16 model, prompts and lengths, interleaved.

    python benchmarks/generation.py [--prompts 64 --tokens 64 --rounds 3]

Both sample at temperature 1 and end every completion at the same length (no stop token), so that the token counts are
equal. ``generate`` gets all prompts in one left-padded batch; kdctl has as many places. The last lines compare greedy
completions: in bf16 a batch's composition moves logits, so at each first difference they give how many nats apart the
model itself, reading one sequence alone, holds the two tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from parts.stand_in import add_shape, teacher_of
from transformers import GenerationConfig

from kdctl.config.resolve import load_preset
from kdctl.eval.distribution import text_documents
from kdctl.model.load import pick_device, quiet
from kdctl.model.reference import model_folder
from kdctl.model.tokenizer import open_tokenizer
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Prompt

SHORTEST, LONGEST = 16, 128


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    add_shape(parser)
    return parser.parse_args()


class Bench:
    """One model and the prompts that both sides continue."""

    def __init__(self, args: argparse.Namespace):
        folder, count = model_folder(load_preset("quickstart").teacher.model, torch.bfloat16), args.prompts
        self.model = teacher_of(args, pick_device("auto"))
        self.tokens = args.tokens
        ids = [token for document in text_documents(open_tokenizer(folder), 8192) for token in document]
        lengths = torch.randint(SHORTEST, LONGEST, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        apart = (len(ids) - LONGEST) // count
        self.prompts = [Prompt(str(i), i, ids[i * apart : i * apart + n]) for i, n in enumerate(lengths)]

    def kdctl(self, greedy: bool = False) -> list[list[int]]:
        """Generate with kdctl."""
        sampling = Sampling(0.0 if greedy else 1.0, 1.0, 0, self.tokens, 0, 0)
        engine = InProcess(self.model, (), "teacher", len(self.prompts))
        items = [(prompt, 0) for prompt in self.prompts]
        return [rollout.completion_ids for rollout in engine.complete(items, sampling)]

    def transformers(self, greedy: bool = False) -> list[list[int]]:
        """Generate with transformers."""
        longest = max(len(prompt.prompt_ids) for prompt in self.prompts)
        rows = [[0] * (longest - len(prompt.prompt_ids)) + prompt.prompt_ids for prompt in self.prompts]
        mask = [[0] * (longest - len(p.prompt_ids)) + [1] * len(p.prompt_ids) for p in self.prompts]
        settings = GenerationConfig(
            do_sample=not greedy, top_k=0, max_new_tokens=self.tokens, eos_token_id=None, pad_token_id=0
        )
        device = self.model.device
        found = self.model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )
        return found[:, longest:].tolist()

    @torch.inference_mode()
    def margin(self, index: int, ours: list[int], theirs: list[int]) -> float:
        """Return how many nats apart the model holds the first two tokens that differ."""
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        ids = torch.tensor([self.prompts[index].prompt_ids + ours[:first]], device=self.model.device)
        logits = self.model(ids).logits[0, -1].float()
        return float((logits[ours[first]] - logits[theirs[first]]).abs())


def clock(work: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Time both sides in turn and print medians."""
    args = arguments()
    quiet()
    bench = Bench(args)
    times: dict[str, list[float]] = {"kdctl": [], "transformers": []}
    for _ in range(args.rounds):
        times["kdctl"].append(clock(bench.kdctl))
        times["transformers"].append(clock(bench.transformers))
    total = len(bench.prompts) * args.tokens
    rate = {name: total / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{len(bench.prompts)} prompts of {SHORTEST}-{LONGEST} tokens, {args.tokens} new ones, {args.rounds} rounds")
    print("\n| | tokens/s | ratio |\n|---|---:|---:|")
    for name, value in rate.items():
        print(f"| {name} | {value:.0f} | {value / rate['transformers']:.2f} |")
    ours, theirs = bench.kdctl(greedy=True), bench.transformers(greedy=True)
    margins = [bench.margin(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    print(f"\ngreedy: {len(ours) - len(margins)} of {len(ours)} completions are the same", end="")
    print(f"; at first differences the tokens are at most {max(margins):.3f} nats apart" if margins else "")


if __name__ == "__main__":
    main()
