"""The training loop: what a step computes, and what survives a stop."""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from kdctl.base import stopping
from kdctl.base.errors import StoreError, TrainingError
from kdctl.config.preset import DistillSection, QuantizeSection
from kdctl.distill.by_source import BySource
from kdctl.distill.checkpoint import checkpoint_bytes, require_room
from kdctl.distill.divergence import Objective, divergence
from kdctl.distill.feed import Feed, Replay
from kdctl.distill.loop import Outputs, Trainer, learning_rate, train
from kdctl.distill.monitor import WINDOW
from kdctl.distill.shadow import ShadowWeights
from kdctl.eval.distribution import compare, make_yardstick, summarize
from kdctl.model import attention, head, varlen
from kdctl.model.attention import Layout, forward
from kdctl.model.batch import collate, predicting_hidden, predicting_states
from kdctl.model.head import head_of
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.run import files
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport, Rollout
from kdctl.run.tracking import Tracker, read_metrics
from kdctl.system.transfers import fetch
from tests.leftovers import dead_process, left_by
from tests.tally import Tally, masked_varlen

GRID = QuantizeSection(group_size=32, method="minmax")


def rollouts(count: int, seed: int = 0) -> list[Rollout]:
    """Make rollouts of random tokens with ragged prompts and completions."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        prompt, completion = (int(torch.randint(2, 12, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(0, 256, (prompt + completion,), generator=generator).tolist()
        made.append(Rollout(str(index), index, 0, ids[:prompt], ids[prompt:], None, "length", 0, 0, "teacher"))
    return made


def trainer_on(teacher: PreTrainedModel, data: list[Rollout], **settings) -> Trainer:
    """Build a trainer that replays ``data``."""
    section = DistillSection(**({"steps": 4, "lr": 1e-3, "warmup_ratio": 0.0, "max_tokens": 64} | settings))
    weights = quantize_layers(teacher, select_layers(teacher, GRID), GRID)
    student = build_student(teacher, weights)
    shadow = ShadowWeights(student, weights, teacher)
    return Trainer(teacher, student, shadow, Feed(section, data), section)


def accumulated(trainer: Trainer, data: list[Rollout]) -> tuple[float, int]:
    """Add up the gradients of rollouts; return the mean loss per completion token, and the tokens."""
    work = trainer.lay_out(data)
    losses = trainer.accumulate(work).tolist()
    return trainer.processes.total(sum(losses)) / work.tokens, work.tokens


def test_eight_rows_at_once_equal_one_row_eight_times(teacher_fp32: PreTrainedModel) -> None:
    data = rollouts(8)
    whole = trainer_on(teacher_fp32, data, micro_batch_size=8)
    single = trainer_on(teacher_fp32, data, micro_batch_size=1, gradient_accumulation=8)
    loss, tokens = accumulated(whole, data)
    other_loss, other_tokens = accumulated(single, data)
    assert tokens == other_tokens == sum(len(r.completion_ids) for r in data)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for name, master in whole.shadow.trained.items():
        other = single.shadow.trained[name].grad
        assert master.grad is not None
        assert other is not None
        torch.testing.assert_close(master.grad, other, rtol=1e-3, atol=1e-6)


def test_loss_is_the_divergence_over_completion_tokens_divided_once(teacher_fp32: PreTrainedModel) -> None:
    data = rollouts(5)
    trainer = trainer_on(teacher_fp32, data, micro_batch_size=2, gradient_accumulation=3)
    loss, tokens = accumulated(trainer, data)
    total = 0.0
    for rollout in data:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        first = len(rollout.prompt_ids) - 1
        log_p, log_q = (
            model(input_ids=ids).logits[0, first:-1].double().log_softmax(-1)
            for model in (teacher_fp32, trainer.student)
        )
        total += float((log_p.exp() * (log_p - log_q)).sum().detach())
    assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_learning_rate_zero_changes_nothing(teacher: PreTrainedModel) -> None:
    data = rollouts(4)
    trainer = trainer_on(teacher, data, micro_batch_size=4)
    trainer.settings = trainer.settings.model_copy(update={"lr": 0.0})
    before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    metrics = trainer.step(0)
    assert metrics["optim/grad_norm"] > 0
    for name, tensor in trainer.student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_step_changes_quantized_weights_and_nothing_else(teacher: PreTrainedModel) -> None:
    trainer = trainer_on(teacher, rollouts(4), micro_batch_size=4, lr=1e-2)
    before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    trainer.step(0)
    changed = {n for n, tensor in trainer.student.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {f"{name}.weight" for name, _ in trainer.shadow.quantized()}


def test_student_always_holds_what_its_masters_quantize_to(teacher: PreTrainedModel) -> None:
    from kdctl.quant.apply import dense

    trainer = trainer_on(teacher, rollouts(4), micro_batch_size=4, lr=1e-2)
    trainer.step(0)
    for name, weight in trainer.shadow.quantized():
        assert torch.equal(trainer.student.get_parameter(f"{name}.weight"), dense(weight))


@pytest.mark.parametrize(("beta", "lr"), [(0.0, 3e-3), (0.5, 3e-3), (1.0, 3e-3)])
def test_training_lowers_the_divergence_it_minimises(teacher_fp32: PreTrainedModel, beta: float, lr: float) -> None:
    data = rollouts(4)
    trainer = trainer_on(teacher_fp32, data, micro_batch_size=4, beta=beta, lr=lr, steps=20, schedule="constant")
    losses = [trainer.step(step)[f"train/{trainer.objective.name}"] for step in range(20)]
    assert losses[-1] < 0.6 * losses[0]


def test_clipping_bounds_the_gradient_norm(teacher: PreTrainedModel) -> None:
    trainer = trainer_on(teacher, rollouts(4), micro_batch_size=4, max_grad_norm=1e-4)
    accumulated(trainer, rollouts(4))
    norm, factor = map(float, trainer.clip())
    whole = math.sqrt(
        sum(float(m.grad.double().square().sum()) for m in trainer.shadow.parameters() if m.grad is not None)
    )
    assert norm > 1e-4
    assert norm == pytest.approx(whole, rel=1e-4)
    assert factor * whole == pytest.approx(1e-4, rel=1e-2)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(teacher: PreTrainedModel) -> None:
    trainer = trainer_on(teacher, rollouts(4), micro_batch_size=4)
    name, _ = next(iter(trainer.shadow.quantized()))
    master = trainer.shadow.trained[f"{name}.master"]
    with torch.no_grad():
        trainer.student.get_parameter(f"{name}.weight").fill_(math.inf)
    before = master.detach().clone()
    with pytest.raises(TrainingError, match="step 0"):
        trainer.step(0)
    assert torch.equal(master, before)


def test_learning_rate_warms_up_then_falls_or_stays() -> None:
    cosine = DistillSection(steps=100, lr=1.0, warmup_ratio=0.2, schedule="cosine")
    rates = [learning_rate(step, cosine) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
    constant = cosine.model_copy(update={"schedule": "constant"})
    assert {learning_rate(step, constant) for step in range(20, 100)} == {1.0}
    assert learning_rate(0, DistillSection(steps=1, lr=1.0, warmup_ratio=0.0)) == 1.0


def test_prompt_tokens_carry_no_loss(teacher_fp32: PreTrainedModel) -> None:
    """Only where completion tokens are predicted may the student's hidden states receive a gradient."""
    batch = collate(rollouts(3), 64)
    states = predicting_states(teacher_fp32, batch)
    hidden = forward(teacher_fp32, batch.input_ids, batch.position_ids, Layout(batch.seq_lens)).detach() * 1.1
    hidden.requires_grad_(True)
    divergence(hidden[batch.predicting], states, head_of(teacher_fp32), Objective()).backward()
    assert hidden.grad is not None
    touched = hidden.grad.abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == batch.predicting.tolist()


def test_a_packed_batch_has_the_loss_and_gradient_of_padded_rows(teacher_fp32: PreTrainedModel) -> None:
    """The reference pads, masks and takes full logits, as transformers does."""
    data, student = rollouts(5), copy.deepcopy(teacher_fp32).requires_grad_(True)
    for parameter in student.parameters():
        parameter.data.mul_(1.05)
    batch, head = collate(data, 64), head_of(teacher_fp32)
    reference = copy.deepcopy(student)
    packed = divergence(predicting_hidden(student, batch), predicting_states(teacher_fp32, batch), head, Objective())
    packed.backward()
    ids = pad_sequence(list(batch.input_ids.split(batch.seq_lens)), batch_first=True)
    places, lengths = torch.arange(ids.shape[1]), torch.tensor(batch.seq_lens).unsqueeze(-1)
    prompts = torch.tensor([len(item.prompt_ids) for item in data]).unsqueeze(-1)
    carries = ((places < lengths) & (places >= prompts))[:, 1:]
    mask = (places < lengths).long()
    hidden = reference.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][carries]
    with torch.no_grad():
        wanted = teacher_fp32(input_ids=ids, attention_mask=mask).logits[:, :-1][carries].log_softmax(-1)
    found = torch.nn.functional.linear(hidden, head.weight).log_softmax(-1)
    padded = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
    padded.backward()
    assert len(hidden) == batch.completion_tokens
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    for (name, one), two in zip(student.named_parameters(), reference.parameters(), strict=True):
        if name.endswith("_proj.weight"):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


# --- stop and resume, with real processes -----------------------------------------------------------------------------


def kdctl(*arguments: str, **options) -> subprocess.Popen:
    """Start kdctl in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdctl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for a process that must succeed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out + err


def distill_arguments(tiny_dir: Path, run: Path, lmbda: str) -> list[str]:
    """Build the arguments of a short run with checkpoints at every second step."""
    sets = [f"teacher.model={tiny_dir}", "distill.steps=8", "distill.refresh_every=3", "quantize.method=minmax"]
    flags = [part for value in sets for part in ("--set", value)]
    return ["distill", "--preset", "smoke", "--run", str(run), "--lambda", lmbda, "--name", "v", *flags]


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def comparable(variant: Path) -> dict[str, bytes]:
    """Read what must be equal: weights, checkpoint tensors and rollouts; reports and metrics hold clock times."""
    files = tree(variant)
    return {
        name: data
        for name, data in files.items()
        if name.endswith((".safetensors", ".arrow", "manifest.json", "config.json"))
    }


@pytest.mark.slow
def test_killed_and_resumed_training_equals_undisturbed_bit_for_bit(tiny_dir: Path, tmp_path: Path) -> None:
    """Half of the rows are replayed and half are generated during training."""
    finish(kdctl(*distill_arguments(tiny_dir, tmp_path / "a", "0.5")))
    process = kdctl(*distill_arguments(tiny_dir, tmp_path / "b", "0.5"))
    metrics = tmp_path / "b" / "distill" / "v" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "b" / "distill" / "v" / "distill.json").exists()
    assert "going on from step" in finish(kdctl(*distill_arguments(tiny_dir, tmp_path / "b", "0.5")))
    undisturbed, resumed = (comparable(tmp_path / name / "distill" / "v") for name in "ab")
    assert undisturbed.keys() == resumed.keys()
    assert "final/model.safetensors" in undisturbed
    assert [name for name in undisturbed if undisturbed[name] != resumed[name]] == []
    steps = [line.split(",")[0] for line in metrics.read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 9)]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(teacher: PreTrainedModel, tmp_path: Path) -> None:
    data = rollouts(4)
    trainer = trainer_on(teacher, data, micro_batch_size=4, checkpoint_every=1)

    class Poisoned(Feed):
        """Breaks the student before the third step."""

        def rows(self, step: int) -> list[Rollout]:
            if step == 2:
                name, _ = next(iter(trainer.shadow.quantized()))
                with torch.no_grad():
                    trainer.student.get_parameter(f"{name}.weight").fill_(math.inf)
            return super().rows(step)

    trainer.feed = Poisoned(trainer.settings, data)
    with pytest.raises(TrainingError, match=r"the state after step 2 is kept in .*step_000002"):
        train(trainer, make_yardstick(teacher, data), outputs_in(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_step_that_is_asked_to_be_the_last_leaves_a_checkpoint_that_goes_on_bit_for_bit(
    teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, yardstick = rollouts(4), make_yardstick(teacher, rollouts(2))
    undisturbed = trainer_on(teacher, data, micro_batch_size=4, checkpoint_every=0)
    train(undisturbed, yardstick, outputs_in(tmp_path / "a"))
    answers = iter([False, True, True, False])
    monkeypatch.setattr(stopping, "asked", lambda: next(answers))
    monkeypatch.setattr(stopping, "_State", type("State", (stopping._State,), {}))
    for step in (2, 3):
        with pytest.raises(stopping.Preempted, match=f"stopped after step {step} of 4, with its checkpoint written"):
            train(
                trainer_on(teacher, data, micro_batch_size=4, checkpoint_every=0), yardstick, outputs_in(tmp_path / "b")
            )
        assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == [f"step_00000{step}"]
    resumed = trainer_on(teacher, data, micro_batch_size=4, checkpoint_every=0)
    train(resumed, yardstick, outputs_in(tmp_path / "b"))
    for name, trained in undisturbed.shadow.trained.items():
        assert torch.equal(trained, resumed.shadow.trained[name])
    final = [(tmp_path / run / "checkpoints" / "step_000004" / "shard_00001.safetensors").read_bytes() for run in "ab"]
    assert final[0] == final[1]


def test_too_little_disk_is_refused_before_the_first_step(
    teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1))
    trainer = trainer_on(teacher, rollouts(4), micro_batch_size=4)
    outputs = Outputs(tmp_path, lambda step: pytest.fail("trained"), "x", lambda done, total: None, lambda text: None)
    with pytest.raises(StoreError, match="KiB free"):
        train(trainer, make_yardstick(teacher, rollouts(2)), outputs)


@pytest.mark.slow
def test_non_finite_loss_exits_2_with_one_message(tiny_dir: Path, tmp_path: Path) -> None:
    arguments = distill_arguments(tiny_dir, tmp_path / "run", "0")
    process = kdctl(
        *arguments, "--set", "distill.train=lora", "--set", "distill.lora_alpha=1e30", "--set", "distill.lr=100"
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "distill.lr" in err
    assert "no checkpoint was written yet" in err
    assert not (tmp_path / "run" / "distill" / "v" / "final").exists()


# --- early stop, and what is kept of a long run -----------------------------------------------------------------------


def outputs_in(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Outputs:
    """Leave traces of training in a folder."""
    return Outputs(
        folder / "checkpoints",
        lambda step: Tracker(folder / "metrics.jsonl", step),
        "identity",
        progress,
        lambda text: None,
    )


def codes(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.codes for name, weight in trainer.shadow.quantized()}


EARLY: dict[str, Any] = {
    "steps": 40,
    "lr": 1e-2,
    "warmup_ratio": 1.0,
    "micro_batch_size": 4,
    "heldout_every": 2,
    "patience": 2,
    "stop_early": True,
    "checkpoint_every": 3,
}
"""A learning rate that grows until it loses what it won."""


def test_early_stop_leaves_the_student_of_the_lowest_held_out_kl(teacher: PreTrainedModel, tmp_path: Path) -> None:
    data = rollouts(6)
    trainer, yardstick = trainer_on(teacher, data, **EARLY), make_yardstick(teacher, rollouts(8, seed=1))
    outcome = train(trainer, yardstick, outputs_in(tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    measured = {int(line["step"]): line["eval/forward_kl"] for line in lines if "eval/forward_kl" in line}
    best = min(measured, key=lambda step: measured[step])
    assert (outcome.stopped, outcome.kept_step) == ("patience", best)
    assert outcome.steps == len(lines) == best + 4 < 40
    found = summarize(compare(trainer.student, yardstick)).forward_kl.value
    assert found == measured[best]
    straight = trainer_on(teacher, data, **EARLY)
    for step in range(best):
        straight.step(step)
    assert all(torch.equal(tensor, codes(straight)[name]) for name, tensor in codes(trainer).items())


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 7, 9])
def test_early_stop_does_not_depend_on_where_training_was_cut(
    teacher: PreTrainedModel, tmp_path: Path, cut: int
) -> None:
    data, yardstick = rollouts(6), make_yardstick(teacher, rollouts(8, seed=1))

    def stopping(done: int, total: int) -> None:
        if done == cut:
            raise KeyboardInterrupt

    whole = trainer_on(teacher, data, **EARLY)
    expected = train(whole, yardstick, outputs_in(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(trainer_on(teacher, data, **EARLY), yardstick, outputs_in(tmp_path / "cut", stopping))
    for _ in range(2):  # the second time everything is done already
        resumed = trainer_on(teacher, data, **EARLY)
        assert train(resumed, yardstick, outputs_in(tmp_path / "cut")) == expected
        assert all(torch.equal(tensor, codes(whole)[name]) for name, tensor in codes(resumed).items())
    kept = [sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "cut")]
    assert kept[0] == kept[1] == [f"step_{expected.kept_step:06d}", f"step_{expected.steps:06d}"]


def test_the_last_step_is_a_candidate_too(teacher: PreTrainedModel, tmp_path: Path) -> None:
    trainer = trainer_on(teacher, rollouts(4), **(EARLY | {"lr": 1e-4, "steps": 5}))
    outcome = train(trainer, make_yardstick(teacher, rollouts(4)), outputs_in(tmp_path))
    assert "eval/forward_kl" in read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert outcome.stopped == "steps"


@pytest.mark.parametrize(("keep_last", "stop_early"), [(1, False), (2, False), (1, True), (3, True)])
def test_checkpoints_are_bounded_at_any_time(
    teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int, stop_early: bool
) -> None:
    seen, folder = [], tmp_path / "checkpoints"

    def watched(operation: str, path: Path) -> None:
        if operation == "sync" and path.suffix == ".safetensors":
            seen.append(len(list(folder.iterdir())))

    monkeypatch.setattr(files, "before", watched)
    left_by(dead_process(), folder / "step_000009").mkdir(parents=True)
    settings = EARLY | {"patience": 9, "steps": 14, "checkpoint_every": 1, "keep_last": keep_last}
    trainer = trainer_on(teacher, rollouts(6), **(settings | {"stop_early": stop_early}))
    said: list[str] = []
    outputs = replace(outputs_in(tmp_path), note=said.append)
    train(trainer, make_yardstick(teacher, rollouts(4, seed=1)), outputs)
    bound = keep_last + stop_early
    assert max(seen) == bound + 1
    assert len(list(folder.iterdir())) == bound
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    stated = float(said[0].split()[1].replace(",", ""))
    assert stated == pytest.approx(used / bound * (bound + 1) / 2**20, rel=0.05)


def test_checkpoints_that_are_there_do_not_need_their_room_again(
    teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on(teacher, rollouts(4), micro_batch_size=4, checkpoint_every=1)
    size = checkpoint_bytes(trainer.shadow)
    outputs = outputs_in(tmp_path)
    train(trainer, make_yardstick(teacher, rollouts(2)), outputs)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=9 * size, used=8 * size, free=size + 9))
    require_room(outputs.checkpoints, size, 1)
    with pytest.raises(StoreError, match="KiB free"):
        require_room(tmp_path / "elsewhere", size, 1)


def test_a_checkpoint_that_a_killed_run_did_not_come_to_remove_is_removed(
    teacher: PreTrainedModel, tmp_path: Path
) -> None:
    data, yardstick, outputs = rollouts(4), make_yardstick(teacher, rollouts(2)), outputs_in(tmp_path)
    train(trainer_on(teacher, data, micro_batch_size=4), yardstick, outputs)
    (newest,) = outputs.checkpoints.iterdir()
    shutil.copytree(newest, newest.with_name("step_000001"))
    train(trainer_on(teacher, data, micro_batch_size=4), yardstick, outputs)
    assert [path.name for path in outputs.checkpoints.iterdir()] == [newest.name]


def test_a_checkpoint_without_the_metrics_behind_it_is_refused(teacher: PreTrainedModel, tmp_path: Path) -> None:
    data, yardstick = rollouts(4), make_yardstick(teacher, rollouts(2))
    train(trainer_on(teacher, data, micro_batch_size=4), yardstick, outputs_in(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(StoreError, match=r"metrics\.jsonl is damaged.* its lines up to step 4"):
        train(trainer_on(teacher, data, micro_batch_size=4), yardstick, outputs_in(tmp_path))


@dataclass
class Drifting(Replay):
    """Student-written completions that grow and stop ending, as those of a run that goes astray."""

    def row(self, slot: int) -> Rollout:
        """Return the rollout of a slot."""
        late = slot >= 2 * WINDOW
        tokens = [slot % 251] * (20 if late else 8)
        return Rollout(str(slot), slot, slot, [65], tokens, None, "length" if late else "stop", 0, 0, "student")


def test_live_completions_that_go_astray_are_said_during_training(teacher: PreTrainedModel, tmp_path: Path) -> None:
    live = {"lmbda": 1.0, "micro_batch_size": 8, "steps": 26, "heldout_every": 0, "checkpoint_every": 0}
    trainer = trainer_on(teacher, [], **live)
    trainer.feed.on_policy = Drifting([], 0)
    said: list[str] = []
    train(trainer, make_yardstick(teacher, rollouts(2)), replace(outputs_in(tmp_path), note=said.append))
    warned = [text.partition(":")[0::2] for text in said if text.startswith("step ")]
    assert ["grow: 8.0 tokens each at first" in text for _, text in warned] == [True, False]
    assert "100 % ended by themselves at first" in warned[1][1]
    assert all(2 * WINDOW < 8 * int(step.split()[1]) <= 3 * WINDOW for step, _ in warned)


def killed_at(run: Path, arguments: list[str], line: int) -> None:
    """Start a run and kill it with SIGKILL as soon as metrics.jsonl has so many lines."""
    process, metrics = kdctl(*arguments), run / "distill" / "v" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= line):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_run_killed_twice_stops_early_where_it_would_have(tiny_dir: Path, tmp_path: Path) -> None:
    sets = ["distill.steps=24", "distill.keep_last=2", "distill.checkpoint_every=4", "distill.heldout_every=2"]
    sets += ["distill.lr=0.03", "distill.warmup_ratio=1.0", "distill.patience=4", "distill.stop_early=true"]
    flags = [part for value in sets for part in ("--set", value)]
    finish(kdctl(*distill_arguments(tiny_dir, tmp_path / "a", "0.5"), *flags))
    arguments = [*distill_arguments(tiny_dir, tmp_path / "b", "0.5"), *flags]
    for line in (3, 7):
        killed_at(tmp_path / "b", arguments, line)
        checkpoints = tmp_path / "b" / "distill" / "v" / "checkpoints"
        assert len(list(checkpoints.glob("*"))) <= 4
    finish(kdctl(*arguments))
    undisturbed, resumed = (comparable(tmp_path / name / "distill" / "v") for name in "ab")
    assert undisturbed.keys() == resumed.keys()
    assert [name for name in undisturbed if undisturbed[name] != resumed[name]] == []
    lines, others = (read_metrics(tmp_path / name / "distill" / "v" / "metrics.jsonl") for name in "ba")
    assert [line["step"] for line in lines] == list(range(1, len(others) + 1))
    clock = ("time/step_s", "time/generate_s")
    assert [{k: v for k, v in line.items() if k not in clock} for line in lines] == [
        {k: v for k, v in line.items() if k not in clock} for line in others
    ]
    report = read_record(tmp_path / "b" / "distill" / "v" / "distill.json", DistillReport)
    assert report.steps == len(lines)
    assert report.stopped == "patience"
    assert report.kept_step == len(lines) - 8


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend as on a GPU, by the kernel's documented arithmetic, and work on all logits of a chunk at once."""
    monkeypatch.setattr(head, "ROWS_IN_CACHE", 10**6)
    monkeypatch.setattr(attention, "takes", lambda *_: True)
    monkeypatch.setattr(varlen.varlen, "varlen_attn", masked_varlen)


def tallied(trainer: Trainer, step: int = 1) -> tuple[Tally, Tally]:
    """Do a step, after a first one that builds what lasts; return what laying out and what queueing asked for."""
    trainer.step(0)
    rollouts_of_step = trainer.feed.rows(step)
    with Tally() as laying:
        work = trainer.lay_out(rollouts_of_step, step)
    with Tally() as queueing:
        trainer.queue(work, 1e-4, BySource(work.rollouts))
    return laying, queueing


@pytest.mark.parametrize("settings", [{}, {"learn_scales": True}, {"beta": 0.5, "max_grad_norm": 0.0}], ids=str)
def test_a_step_reads_nothing_and_its_operators_do_not_grow_with_sequences(
    teacher: PreTrainedModel, one_call: None, settings: dict[str, Any]
) -> None:
    counts = []
    for rows in (2, 16):
        trainer = trainer_on(teacher, rollouts(rows), micro_batch_size=rows, **settings)
        laying, queueing = tallied(trainer)
        assert laying.reads == queueing.reads == 0
        assert laying.made <= 5
        counts.append((queueing.operators, queueing.made))
    assert counts[0] == counts[1]


def test_queueing_a_step_needs_no_number_of_the_device(teacher_fp32: PreTrainedModel) -> None:
    """Tensors without numbers say so where one is asked for, in whatever way."""
    trainer = trainer_on(teacher_fp32, named(rollouts(4)), micro_batch_size=2, gradient_accumulation=2)
    work = trainer.lay_out(trainer.feed.rows(0))
    sources = BySource(work.rollouts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses, norm = trainer.queue(work, 1e-4, sources)
        for asked in (lambda: losses.tolist(), lambda: float(norm), lambda: fetch(losses, norm, *sources.sums())):
            with pytest.raises((DataDependentOutputException, RuntimeError)):
                asked()


def named(data: list[Rollout]) -> list[Rollout]:
    """Let rollouts come from two sources in turn."""
    return [replace(one, prompt_id=f"{'ab'[i % 2]}:{one.prompt_id}") for i, one in enumerate(data)]


def test_what_is_laid_out_ahead_is_what_the_step_would_have_laid_out(teacher_fp32: PreTrainedModel) -> None:
    data = rollouts(8)
    ahead, late = (trainer_on(teacher_fp32, data, micro_batch_size=4, steps=3) for _ in range(2))
    late.feed.ready = lambda _: False  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(3):
        found, expected = ahead.step(step), late.step(step)
        assert {k: v for k, v in found.items() if k[:5] != "time/"} == {
            k: v for k, v in expected.items() if k[:5] != "time/"
        }
        assert (ahead._ahead is None) == (step == 2)
    for name, tensor in ahead.shadow.trained.items():
        assert torch.equal(tensor, late.shadow.trained[name])
