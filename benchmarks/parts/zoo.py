"""Every causal language model of transformers goes through all stages with its own numbers, or is refused in words.

Each is built tiny with random weights and taken through quantize, training, eval, verify and export; the
log-probabilities of its rollouts are compared with transformers' own forward pass over each sequence alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parts.base import Broken, expect
from parts.networks import build, kinds
from parts.tiny import write_preset
from parts.warm import Ended, in_child, run_kdctl

SHORT = 2
FULL = len(kinds())
NEAR = 1e-3
"""Nats that a log-probability in float32 may be off."""


@dataclass(frozen=True)
class Visit:
    """What became of a network. word: works, refused, or not built (its configuration alone is refused).

    composite: of a model that works, the text part was used. gguf: whether it can be exported to GGUF.
    """

    kind: str
    word: str
    reason: str = ""
    gguf: str = ""
    gap: float = 0.0
    composite: bool = False


def case(seed: int, index: int, where: Path) -> str:
    """Take one network through kdctl."""
    return visit(kinds()[index], where).word


def visit(kind: str, where: Path) -> Visit:
    """Take a network of a model type through every stage. Raises Broken for a traceback or a wrong number."""
    fault = in_child(lambda: build(kind, where / "model"), where)
    changes = {"teacher__dtype": "float32", "distill__steps": 2, "quantize__group_size": 32}
    write_preset(where / "preset.json", where / "model", **changes)
    first = kdctl(["quantize", "--preset", "preset.json", "--run", "run"], where)
    if first.code == 2:
        return Visit(kind, "not built" if fault else "refused", told(first, fault))
    expect(fault is None, f"{kind}: a folder without weights is accepted ({fault})")
    for words in (["distill", "--run", "run"], ["eval", "--run", "run"]):
        passed(kind, kdctl(words, where))
    gap = in_child(lambda: largest_gap(where / "run" / "rollouts" / "teacher", where / "model"), where)
    expect(gap < NEAR, f"{kind}: log-probabilities are {gap:.2g} nats off transformers' own")
    passed(kind, kdctl(["verify", "run/student"], where))
    passed(kind, kdctl(["export", "run/student", "--to", "dense", "--out", "dense"], where))
    gguf = kdctl(["export", "run/student", "--to", "gguf", "--out", "model.gguf"], where)
    part = in_child(lambda: composite(where / "model"), where)
    return Visit(kind, "works", gguf="yes" if gguf.code == 0 else "no", gap=gap, composite=part)


def composite(model: Path) -> bool:
    """Tell whether the text part of a model is used."""
    from kdctl.model.composite import has_text_part

    return has_text_part(model)


def kdctl(words: Sequence[str], where: Path) -> Ended:
    """Run a command. Raises Broken for an exit code that says neither done nor refused, and for a traceback."""
    ended = run_kdctl(words, where)
    if ended.code not in (0, 2) or "Traceback (most recent call last)" in ended.err:
        raise Broken(f"kdctl {' '.join(words)} ends with {ended.code}: {ended.err[-1500:]}")
    return ended


def passed(kind: str, ended: Ended) -> None:
    """Raise Broken unless a network that was accepted goes on."""
    expect(ended.code == 0, f"{kind} is accepted by quantize and refused later: {ended.err[-600:]}")


def told(ended: Ended, fault: str | None = None) -> str:
    """Return the reason of a refusal, without its place and its advice."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    expect(len(lines) == 1, f"a refusal of {len(lines)} messages: {ended.err[-1500:]}")
    text = lines[0].removeprefix("error: ")
    reason = text[text.find(": ") + 2 :] if text.startswith("/") else text
    return reason.partition("; ")[0] + (f" (not built at this size: {fault})" if fault else "")


def largest_gap(store: Path, model: Path) -> float:
    """Return how far a store's log-probabilities are from transformers' own for each sequence alone, at most."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [row for path in sorted(store.glob("*.arrow")) for row in datasets.Dataset.from_file(str(path))]
    expect(bool(rows), f"no rollout in {store}")
    gaps = []
    for row in rows:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        with torch.inference_mode():
            logits = network(input_ids=torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
        wanted = logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        gaps.append((wanted - torch.tensor(row["logprobs"])).abs().max().item())
    return max(gaps)
