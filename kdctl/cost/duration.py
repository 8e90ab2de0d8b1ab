"""How long a run takes: each kind of work as passes, bytes and messages, at a machine's rates.

Sequences are as long as the preset allows. Processes divide what the code divides among them; the main one does the
rest while the others wait.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from kdctl.cost.estimate import Cost
from kdctl.cost.records import Pace, Rates, Stretch, Timing
from kdctl.cost.work import Passes, Work, stretch
from kdctl.eval.distribution import BATCH, TEXT_WINDOW
from kdctl.quant.fisher import SEQUENCES
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.quantizer import Statistic
from kdctl.rollout.sampler import LOOK_ON_GPU, PROMPT_TOKENS
from kdctl.rollout.steps import SPAN

FLOAT32 = 4
RECEIVED = {"weights": 34, "lora": 74, "scales": 35}
"""Bytes read and written for each weight while its gradient is handed on (``distill/shadow.py``)."""
WRITTEN_BACK = {"weights": 56, "lora": 70, "scales": 17}
"""The same while Q(W) is written into the student."""
RECEIVED_FUSED = {"weights": 8, "lora": 32, "scales": 3.5}
"""The same as ``RECEIVED`` on a GPU, where elementwise arithmetic is one kernel (``system/fused.py``)."""
WRITTEN_BACK_FUSED = {"weights": 6, "lora": 20, "scales": 3.3}
"""The same as ``WRITTEN_BACK`` there."""
ADDED = 10
"""The same while the gradient of a weight is added to those of earlier micro-batches."""
UPDATED = 44
"""The same for each trained number in a step of AdamW, its gradient's norm and float32 copy included."""
FULL = 4
"""Times that a product in float32 counts: half as fast as bf16 on a CPU, a tenth or less on GPUs."""
DOUBLE = 2 * FULL
"""Times that one in float64 counts: the inverse of a Hessian and its factor are made so."""
TRIANGLE = 5 / 8
"""Of the product of a matrix with its own transpose, what is computed (``quant/calibrate.py``)."""
WHOLE = 3
"""Measurements on all held-out documents: the PTQ student, and a variant before and after training."""


class Duration:
    """The work of one run on so many processes, as seen by one of them. cost: of the same run and processes."""

    def __init__(self, cost: Cost):
        self.cost, self.preset, self.network = cost, cost.preset, cost.network
        self.passes = Passes(cost.network)
        self.prompt, self.steps = self.preset.prompts.max_prompt_tokens, self.preset.distill.steps
        self.rows = self.preset.distill.rows_per_step // cost.processes
        self.micro_batches = self.rows / cost.rows_at_once
        together = cost.shards if cost.shards > 1 else cost.copies
        self.apart = (together - 1) / together
        """Share of a divided or summed tensor that comes from other processes."""
        self.crossing = 2 * (cost.copies - 1) / cost.copies if cost.shards > 1 else 0.0
        """How often a process's rows of a gradient pass between copies of divided models."""

    def works(self) -> dict[str, list[Work]]:
        """Return what is done, by kind, in the order of the stages."""
        found = {
            "generating": [*self._stores()],
            "generating, live": [*self._live()],
            "keeping teacher states": [*self._states()],
            "quantizing": [*self._quantizing()],
            "training": [*self._training()],
            "measuring, held-out": [*self._measuring()],
            "writing": [*self._writing()],
        }
        return {name: works for name, works in found.items() if works}

    # --- generating -------------------------------------------------------------------------------------------------

    @property
    def _served(self) -> bool:
        return self.preset.rollout.engine == "server"

    def _stores(self) -> Iterator[Work]:
        """Yield the stores that are filled before training, and what students write in evaluation."""
        rollout, heldout = self.preset.rollout, self.preset.heldout
        for name, (rows, tokens) in self.cost.completions().items():
            if name in ("dataset", "student, live"):
                continue
            if name.endswith("held-out"):
                models = 2 if name.startswith("students") else 1
                block = min(heldout.prompts_per_block, rows // models)
                yield from self._completed(models * ceil(rows / models / block), block, block, tokens / rows)
            elif self._served:
                yield from self._answered(rows, tokens / rows)
            else:
                block = min(rollout.prompts_per_block, rollout.num_prompts) * rollout.num_generations
                blocks = ceil(ceil(rows / block) / self.cost.processes)
                yield from self._completed(blocks, block, rollout.batch_size, tokens / rows, rollout.num_generations)

    def _live(self) -> Iterator[Work]:
        """Yield what is generated during training."""
        settings, rollout = self.preset.distill, self.preset.rollout
        if not settings.live:
            return
        intervals = self.steps / settings.refresh_every
        rows = settings.lmbda * settings.refresh_every * settings.rows_per_step
        if self._served:
            yield from (work.repeated(intervals) for work in self._answered(rows, rollout.max_new_tokens))
        else:
            block = rows / self.cost.processes
            yield from self._completed(intervals, block, rollout.batch_size, rollout.max_new_tokens)

    def _completed(self, blocks: float, block: float, at_once: float, new: float, samples: int = 1) -> Iterator[Work]:
        """Yield blocks of completions written in process, so many of a block at once."""
        at_once = min(at_once, block)
        prompts = block / samples * self.prompt
        passes = ceil(prompts / PROMPT_TOKENS)
        yield self.passes.forward(prompts / passes, self.prompt).repeated(blocks * passes)
        waves, started = blocks * block / at_once, self._started(new)
        for one_by_one, steps in ((True, started), (False, new - started)):
            step = self.passes.decoding(at_once, self.prompt + new / 2, started=one_by_one)
            yield step.repeated(waves * steps)

    def _started(self, new: float) -> float:
        """Return in how many of a completion's steps operators are started one by one.

        On a GPU those up to the first look of the host, two for each recording, and one for each look.
        """
        looks, recordings = new / LOOK_ON_GPU, ceil(new / SPAN)
        return new if self.cost.cpu else min(new, LOOK_ON_GPU + looks + 2 * recordings)

    def _answered(self, rows: float, new: float) -> Iterator[Work]:
        """Yield completions that servers of the same rates write, as many requests at once as they are sent."""
        servers = max(1, len(self.preset.rollout.url))
        at_once = min(self.preset.rollout.batch_size, rows) / servers
        waves = rows / servers / at_once
        prompts = self.passes.forward(at_once * self.prompt, self.prompt)
        yield Work(products=prompts.products, moved=prompts.moved, times=waves)
        yield self.passes.decoding(at_once, self.prompt + new / 2, started=False).repeated(waves * new)

    def _states(self) -> Iterator[Work]:
        """Yield the teacher's passes over what is trained on, where its states are kept."""
        if self.preset.rollout.keep_states == "no":
            return
        for name, (rows, _) in self.cost.completions().items():
            if "held-out" not in name:
                sharing = 1 if name == "student, live" else self.cost.processes
                yield self._read(rows / sharing, self.cost.longest)
        yield Work(stored=self.cost.states())

    def _read(self, sequences: float, length: float, at_once: int = BATCH) -> Work:
        """Read sequences without backward, so many in one pass."""
        at_once = min(at_once, ceil(sequences))
        return self.passes.forward(at_once * length, length).repeated(sequences / at_once)

    # --- quantizing -------------------------------------------------------------------------------------------------

    def _quantizing(self) -> Iterator[Work]:
        settings, method = self.preset.quantize, QUANTIZERS[self.preset.quantize.method]
        moved, started = method.rounding(settings, self.network.layers)
        yield Work(moved=moved)
        yield Work(started=started)
        sequences, length = settings.calibration_sequences, self.cost.longest
        tokens = sequences * length
        if Statistic.INPUT_HESSIAN in method.needs:
            yield self._read(2 * sequences, length)
            inputs = self.network.inputs
            yield Work(products=FULL * TRIANGLE * 2 * tokens * sum(size**2 for size in inputs))
            yield Work(products=DOUBLE * 4 / 3 * sum(size**3 for size in inputs))
        if Statistic.OUTPUT_FISHER in method.needs:
            yield self._read(2 * sequences, length, SEQUENCES)
            yield self.passes.head(sequences * self.preset.rollout.max_new_tokens, 2)
            blocks = method.held(settings, self.network.layers) / FLOAT32
            yield Work(products=TRIANGLE * 2 * tokens * blocks)

    # --- training ---------------------------------------------------------------------------------------------------

    def _training(self) -> Iterator[Work]:
        """Yield all steps: each micro-batch, then the gradients of all processes, the update and the write-back."""
        settings, cost, passes = self.preset.distill, self.cost, self.passes
        times, length = self.steps * self.micro_batches, cost.longest
        tokens, predicted = cost.rows_at_once * length, cost.rows_at_once * self._predicted()
        linears, sharded = cost.linears * self.apart, cost.shards > 1
        if self.preset.rollout.keep_states == "no":
            forward = passes.forward(tokens, length)
            yield replace(forward, sent=linears if sharded else 0).repeated(times)
        both = passes.training(tokens, length, self.preset.runtime.activation_checkpointing)
        summed = FLOAT32 * cost.quantized * self.apart
        sent, crossing = 2 * linears + summed, self.crossing * FLOAT32 * cost.quantized / cost.shards
        yield (replace(both, sent=sent, crossing=crossing) if sharded else both).repeated(times)
        yield passes.head(predicted, 3).repeated(times)
        yield passes.divergence(predicted).repeated(times)
        moved = cost.followed / cost.shards
        received = RECEIVED if cost.cpu else RECEIVED_FUSED
        written = WRITTEN_BACK if cost.cpu else WRITTEN_BACK_FUSED
        low_rank = 2 * settings.lora_rank * cost.followed if settings.train == "lora" else 0
        yield Work(products=3 * low_rank, moved=received[settings.train] * moved, times=times)
        if settings.train == "weights":
            yield Work(moved=ADDED * moved, times=times - self.steps)
        yield Work(products=low_rank, moved=written[settings.train] * moved, times=self.steps)
        yield Work(moved=UPDATED * cost.trained / cost.shards, times=self.steps)
        if cost.copies > 1 and not sharded:
            yield Work(sent=2 * self.apart * FLOAT32 * cost.trained, times=self.steps)

    def _predicted(self) -> int:
        """Tokens of a sequence that carry loss."""
        return min(self.preset.rollout.max_new_tokens, self.cost.longest - 1)

    # --- measuring and writing --------------------------------------------------------------------------------------

    def _measuring(self) -> Iterator[Work]:
        """Yield the student's passes over held-out completions, in training and on all of them, and the teacher's."""
        heldout, settings = self.preset.heldout, self.preset.distill
        often = self.steps // settings.heldout_every if settings.heldout_every else 0
        seen = min(settings.heldout_documents, heldout.num_prompts)
        documents = often * seen + WHOLE * heldout.num_prompts
        yield self._read(documents + heldout.num_prompts + seen, self.prompt + heldout.max_new_tokens)
        yield self.passes.head(documents * heldout.max_new_tokens, 2)
        yield self.passes.divergence(documents * heldout.max_new_tokens)
        yield self._read(heldout.text_tokens / TEXT_WINDOW, TEXT_WINDOW)

    def _writing(self) -> Iterator[Work]:
        """Yield checkpoints, students and rollouts; the main process writes them."""
        every, cost = self.preset.distill.checkpoint_every, self.cost
        checkpoints = ceil(self.steps / every) if every else 1
        yield Work(stored=checkpoints * 3 * FLOAT32 * cost.trained)
        yield Work(stored=3 * cost.folder + cost.stored())


def make_timing(cost: Cost, rates: Rates | None, pace: Pace | None) -> Timing | None:
    """Work out how long a run takes at given rates, or else by the steps that were measured; None without either."""
    if rates is not None:
        stretches = [stretch(name, works, rates) for name, works in Duration(cost).works().items()]
        step_s = next(each.seconds_s for each in stretches if each.name == "training") / cost.distill.steps
    elif pace is not None:
        step_s = pace.step_seconds_mean_s
        taken = step_s * cost.distill.steps
        stretches = [Stretch(name="training", seconds_s=taken, limit="measured", parts_s={"measured": taken})]
    else:
        return None
    return Timing(
        rates=rates,
        stretches=tuple(stretches),
        step_s=step_s,
        total_s=sum(each.seconds_s for each in stretches),
        left_out=tuple(_left_out(cost)) if rates else ("all but training",),
    )


def _left_out(cost: Cost) -> Iterator[str]:
    """Name what a run does and no rate tells."""
    method = QUANTIZERS[cost.preset.quantize.method]
    yield "loading models"
    if cost.preset.eval.tasks:
        yield "benchmark tasks"
    if Statistic.TOKENS in method.needs:
        yield f"what {method.name} does in a process of its own"
