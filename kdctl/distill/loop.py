"""The training loop. It reads downward: rollouts, loss, gradient, step, write-back, measure, save."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base import stopping
from kdctl.base.errors import KdctlError, StoreError, TrainingError
from kdctl.config.preset import DistillSection
from kdctl.distill.by_source import BySource
from kdctl.distill.checkpoint import (
    Checkpoints,
    checkpoint_bytes,
    latest_checkpoint,
    open_checkpoint,
    prune,
    require_room,
)
from kdctl.distill.divergence import Objective, divergence
from kdctl.distill.feed import Feed
from kdctl.distill.monitor import Monitor, Outcome, rollout_metrics
from kdctl.distill.optimizer import gradient_norm, make_optimizer, update
from kdctl.distill.shadow import Shadow
from kdctl.eval.distribution import Yardstick, compare
from kdctl.model.activation_checkpointing import recomputed
from kdctl.model.batch import Batch, collate, predicting_hidden, predicting_states, split
from kdctl.model.head import head_of
from kdctl.rollout.teacher_states import TeacherStates
from kdctl.run.measures import FORWARD_KL, pair_measures
from kdctl.run.record_files import damaged
from kdctl.run.records import CheckpointMeta, Rollout
from kdctl.run.tracking import DOCUMENT, Tracker
from kdctl.system.distributed import passes
from kdctl.system.transfers import fetch, upload

Progress = Callable[[int, int], None]


def learning_rate(step: int, settings: DistillSection) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or half a cosine to zero.

    The first step already learns (1/warm-up of the peak), and the last is still above zero.
    """
    warmup = math.ceil(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def objective_of(settings: DistillSection) -> Objective:
    """Return the divergence that the settings ask for."""
    return Objective(settings.beta, settings.temperature, settings.divergence_scale)


@dataclass(frozen=True)
class Work:
    """One step's rollouts, laid out on the device.

    parts, batches, states: this process's micro-batches, with the teacher's states where they are kept. tokens: those
    of all processes that carry loss.
    """

    step: int
    rollouts: list[Rollout]
    parts: list[Sequence[Rollout]]
    batches: list[Batch]
    states: list[Tensor | None]
    tokens: int


class Trainer:
    """Everything one variant's training holds on to.

    A step is queued on the device as a whole; the host reads from it once, when all of it is queued and the next step's
    rollouts are on their way.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        shadow: Shadow,
        feed: Feed,
        settings: DistillSection,
        states: TeacherStates | None = None,
    ):
        self.teacher, self.student, self.shadow, self.feed = teacher, student, shadow, feed
        self.settings, self.states, self.processes = settings, states, feed.processes
        self.head = head_of(teacher)
        self.objective = objective_of(settings)
        self.optimizer = make_optimizer(shadow, settings)
        self._ahead: Work | None = None

    def step(self, step: int) -> dict[str, float]:
        """Do one optimizer step and return its metrics. Raises TrainingError if loss or gradient is not finite."""
        started = time.perf_counter()
        work = self._work(step)
        generated = time.perf_counter() - started
        sources = BySource(work.rollouts)
        rate = learning_rate(step, self.settings)
        losses, norm = self.queue(work, rate, sources)
        self._lay_out_next(step + 1)
        values, (grad_norm,), *sums = fetch(losses, norm, *sources.sums())
        loss = self.processes.total(sum(values)) / work.tokens
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise TrainingError(f"step {step}: loss {loss}, gradient norm {grad_norm}")
        return {
            f"train/{self.objective.name}": loss,
            "train/completion_tokens": work.tokens,
            **sources.metrics(sums, self.objective.name, self.processes),
            **rollout_metrics(work.rollouts),
            **self.feed.metrics(),
            "optim/lr": rate,
            "optim/grad_norm": grad_norm,
            "time/generate_s": generated,
            "time/step_s": time.perf_counter() - started,
        }

    def queue(self, work: Work, rate: float, sources: BySource) -> tuple[Tensor, Tensor]:
        """Queue all that a step computes, and read nothing of it.

        Returns the loss of each micro-batch and the gradient's norm. Where one of them is not finite nothing changes.
        """
        losses = self.accumulate(work, sources)
        norm, factor = self.clip()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        update(self.optimizer, self.shadow.parameters(), factor, losses.isfinite().all() & norm.isfinite())
        self.shadow.write_back()
        return losses, norm

    def lay_out(self, rollouts: list[Rollout], step: int = 0) -> Work:
        """Copy one step's rollouts to the device, those of this process in micro-batches."""
        settings, device = self.settings, self.student.device
        parts = split(self.processes.share(rollouts), settings.micro_batch_size)
        batches = [collate(part, settings.max_tokens) for part in parts]
        tokens = int(self.processes.total(sum(batch.completion_tokens for batch in batches)))
        states = [self._kept_states(part, batch) for part, batch in zip(parts, batches, strict=True)]
        return Work(step, rollouts, parts, [batch.to(device) for batch in batches], states, tokens)

    def accumulate(self, work: Work, sources: BySource | None = None) -> Tensor:
        """Add up the gradients of one step's rollouts; return the loss of each micro-batch, summed over its tokens.

        Processes divide the rows and add their gradients after the last micro-batch. The sum over all micro-batches is
        divided once by the global token count, so 8 × 1 equals 1 × 8, in one process or several.
        """
        self.shadow.last_pass = len(work.batches) == 1
        losses: list[Tensor] = []
        for part, batch, states in zip(work.parts, work.batches, work.states, strict=True):
            each = sources.room(part, batch) if sources else None
            loss = self._loss(batch, states, each)
            (loss / work.tokens).backward()
            losses.append(loss.detach())
        if not self.processes.sharded:  # FSDP2 has added them
            self.processes.sum_([p.grad for p in self.shadow.parameters() if p.grad is not None])
        return torch.stack(losses)

    def clip(self) -> tuple[Tensor, Tensor]:
        """Return the gradient's norm, float32, and the factor that scales it down to ``max_grad_norm``, float64."""
        norm = gradient_norm(self.shadow.parameters())
        if self.processes.sharded:
            squares = norm.square()
            self.processes.sum_([squares])
            norm = (squares / self.processes.copies).sqrt()
        limit = self.settings.max_grad_norm or math.inf
        return norm, (limit / (norm.double() + 1e-6)).clamp(max=1.0)

    def _loss(self, batch: Batch, states: Tensor | None, each: Tensor | None) -> Tensor:
        """Sum the divergence over a batch's completion tokens; teacher and student activations never coexist.

        each: room for that of each token.
        """
        if states is None:
            states = predicting_states(self.teacher, batch)
        with recomputed(self.student):
            hidden = predicting_hidden(self.student, batch)
        return divergence(hidden, states, self.head, self.objective, self.head.chunk, each)

    def _kept_states(self, rollouts: Sequence[Rollout], batch: Batch) -> Tensor | None:
        """Return the teacher's final hidden states, (M, H), where they are kept."""
        if self.states is None:
            return None
        return upload(self.states.of(rollouts, batch.counts).to(self.student.dtype), self.student.device)

    def _work(self, step: int) -> Work:
        """Return a step's rollouts on the device, laid out while the last step ran or now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.step == step:
            return ahead
        return self.lay_out(self.feed.rows(step), step)

    def _lay_out_next(self, step: int) -> None:
        """Lay out a step's rollouts while the device is at work, where they are there; errors are its own step's."""
        if step < self.settings.steps and self.feed.ready(step):
            with suppress(KdctlError):
                self._ahead = self.lay_out(self.feed.rows(step), step)


@dataclass
class Outputs:
    """Where a variant's training leaves its traces."""

    checkpoints: Path
    tracker: Callable[[int], Tracker]
    """Opens the tracker, given the step that training resumes from."""
    identity: str
    progress: Progress
    note: Callable[[str], None]


def train(trainer: Trainer, yardstick: Yardstick, outputs: Outputs) -> Outcome:
    """Train to the last step or an early stop, from the newest checkpoint if there is one.

    Metrics go to the tracker. The student is left as it was after the outcome's ``kept_step``. Raises Preempted, with a
    checkpoint written, after a step at whose end any process is asked to stop.
    """
    state = trainer.shadow, trainer.optimizer, trainer.processes
    with Checkpoints(outputs.checkpoints, *state, outputs.note) as checkpoints:
        return _train(trainer, yardstick, outputs, checkpoints)


def _train(trainer: Trainer, yardstick: Yardstick, outputs: Outputs, checkpoints: Checkpoints) -> Outcome:
    settings, processes, root = trainer.settings, trainer.processes, outputs.checkpoints
    room = settings.keep_last + settings.stop_early
    size = checkpoint_bytes(trainer.shadow)
    size = int(processes.total(size)) // processes.copies if processes.sharded else size
    outputs.note(processes.on_main(lambda: require_room(root, size, room)))
    done = resume(trainer, outputs, checkpoints)
    tracker = outputs.tracker(done)
    try:
        processes.on_main(lambda: _check_metrics(root, done, tracker))
        monitor = Monitor.after(settings, processes.on_main(lambda: tracker.kept), done)
        processes.on_main(lambda: prune(root, settings.keep_last, monitor.best))  # a kill may have come before it
        while done < settings.steps and not monitor.exhausted:
            metrics = _guarded_step(trainer, done, checkpoints)
            done += 1
            if _measures(settings, done):
                metrics |= processes.on_models(lambda: heldout_metrics(trainer.student, yardstick))
            tracker.log(done, metrics)
            for warning in monitor.see({"step": done, **metrics}):
                outputs.note(f"step {done}: {warning}")
            outputs.progress(done, settings.steps)
            leaving = processes.total(stopping.asked()) > 0
            if leaving or _saves(settings, done, monitor):
                meta = CheckpointMeta(identity=outputs.identity, step=done, metrics=tracker.sha256())
                checkpoints.save(meta, settings.keep_last, monitor.best)
            if leaving:
                checkpoints.wait()
                processes.wait()  # a launcher ends all of them once one has left, the one that writes too
                stopping.preempt(f"after step {done} of {settings.steps}, with its checkpoint written")
    finally:
        tracker.close()
    outcome = monitor.outcome(done)
    if outcome.kept_step != done:
        checkpoints.load(outcome.kept_step)
    return outcome


def _check_metrics(root: Path, done: int, tracker: Tracker) -> None:
    """Raise StoreError if the metrics that training goes on from are not those that the checkpoint was written with."""
    written = open_checkpoint(root, done)[1].metrics if done else None
    if written not in (None, tracker.sha256()):
        why = f"its lines up to step {done} are not those that the checkpoint was written with"
        raise damaged(root.parent / "metrics.jsonl", why)


def _measures(settings: DistillSection, done: int) -> bool:
    """Tell whether held-out KL is measured after a step; the last one too where the lowest is to be kept."""
    every = settings.heldout_every
    return every > 0 and (done % every == 0 or (settings.stop_early and done == settings.steps))


def _saves(settings: DistillSection, done: int, monitor: Monitor) -> bool:
    """Tell whether a checkpoint is written after a step."""
    ended = done == settings.steps or monitor.exhausted or monitor.best == done
    return ended or (settings.checkpoint_every > 0 and done % settings.checkpoint_every == 0)


def _guarded_step(trainer: Trainer, step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """Do a step; if it is not finite, say where the last good state is."""
    try:
        with passes():
            return trainer.step(step)
    except TrainingError as error:
        with suppress(OSError):
            checkpoints.wait()
        kept = latest_checkpoint(checkpoints.root)
        where = f"the state after step {kept[1].step} is kept in {kept[0]}" if kept else "no checkpoint was written yet"
        raise TrainingError(
            f"{error}: training would only write broken weights from here; {where}. Lower distill.lr "
            f"(now {trainer.settings.lr:g}) or set distill.max_grad_norm"
        ) from None


def resume(trainer: Trainer, outputs: Outputs, checkpoints: Checkpoints) -> int:
    """Load the newest checkpoint and return its step, 0 without one.

    Raises StoreError if the checkpoint was made with other settings or inputs.
    """
    found = latest_checkpoint(outputs.checkpoints)
    if found is None:
        return 0
    path, meta = found
    if meta.identity != outputs.identity:
        raise StoreError(
            f"{path} was trained with other settings or from other inputs than are given now; --force starts the "
            "variant again, --name keeps both"
        )
    checkpoints.load(meta.step)
    if trainer.feed.on_policy is not None:
        trainer.feed.on_policy.resume(meta.step)
    outputs.note(f"going on from step {meta.step} of {trainer.settings.steps}")
    return meta.step


def heldout_metrics(student: PreTrainedModel, yardstick: Yardstick) -> dict[str, float]:
    """Measure the student during training."""
    found = compare(student, yardstick, measures=pair_measures())
    single = {f"{DOCUMENT}{index}": float(value) for index, value in enumerate(found[FORWARD_KL])}
    return {f"eval/{one.name}": found.value(one) for one in pair_measures()} | single
