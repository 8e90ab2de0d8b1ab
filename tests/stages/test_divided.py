"""Models divided by rows: what a process holds of them, and that they become and measure what whole ones do."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats.student import load_student, unquantized_tensors
from kdctl.model.folder import StoredTensors
from kdctl.rollout.store import RolloutStore
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport, QuantizeReport
from kdctl.run.tracking import read_metrics
from kdctl.stages import pipeline
from kdctl.stages.context import open_run
from kdctl.system.distributed import Processes
from kdctl.system.memory import give_back

Together = Callable[..., None]
LARGE: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1664,
    "num_hidden_layers": 24,
    "initializer_range": 0.03,
}
"""A network of 212 MB in bfloat16, each decoder layer 9 of them."""
SMALL: dict[str, Any] = {
    "quantize.method": "minmax",
    "rollout.num_prompts": 4,
    "rollout.max_new_tokens": 4,
    "heldout.num_prompts": 3,
    "heldout.max_new_tokens": 4,
    "heldout.min_completion_tokens": 2,
    "heldout.text_tokens": 16,
    "distill.steps": 2,
    "distill.micro_batch_size": 2,
    "distill.gradient_accumulation": 1,
    "distill.warmup_ratio": 0.0,
    "distill.refresh_every": 0,
}


def prepared(smoke: Preset, folder: Path, model: Path, group_size: int, **changes: Any) -> Preset:
    """Make two equal run folders, up to where training begins, and a preset of one of their variants."""
    for name, count in (("train", 8), ("held", 3)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": f"{name}{i}"}) for i in range(count)))
    given = {"teacher.model": str(model), "distill.lmbda": 0.0, "quantize.group_size": group_size}
    given |= {"prompts.train": str(folder / "train.jsonl"), "prompts.heldout": str(folder / "held.jsonl")}
    preset = build_preset(smoke.model_dump(), SMALL | given, "test")
    job = open_run(preset, folder / "one")
    pipeline.quantize(*job)
    pipeline.ensure_stores(*job)
    copytree(folder / "one", folder / "two")
    preset = build_preset(
        preset.model_dump(), {key.replace("__", "."): value for key, value in changes.items()}, "test"
    )
    (folder / "preset.json").write_text(preset.model_dump_json())
    return preset


def distill_gathered(processes: Processes, folder: Path) -> None:
    """Do the same with layers that stay gathered from their forward pass to their backward pass."""
    distill_divided(replace(processes, freed=False), folder)


def distill_divided(processes: Processes, folder: Path) -> None:
    """Train in the folder that the other run does not use, and note how much memory that took at most."""
    preset = Preset.model_validate_json((folder / "preset.json").read_text(), strict=False)
    with watched() as peak:
        pipeline.distill(*open_run(preset, folder / "two", ranks=replace(processes, sharded=True)), name="variant")
    (folder / f"peak{processes.rank}").write_text(str(peak.size))


@dataclass
class Peak:
    """The most memory of its own that this process had in a block, in bytes."""

    size: int = 0


@contextmanager
def watched() -> Iterator[Peak]:
    """Look at this process's private memory all the time, and count what is more than at the start."""
    os.sync()  # mapped pages of a file that is not on disk yet would count as this process's own
    give_back()
    start, peak, ended = private_bytes(), Peak(), threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            peak.size = max(peak.size, private_bytes() - start)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def private_bytes() -> int:
    """Return what this process alone holds, in bytes; pages of mapped files are not its own."""
    rollup = Path("/proc/self/smaps_rollup")
    lines = rollup.read_text().splitlines() if rollup.is_file() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def same_students(folder: Path, share: float) -> None:
    """Check that both runs wrote one student, but for a share of the codes and the rounding of what is trained."""
    one, two = (folder / run / "distill" / "variant" / "final" for run in ("one", "two"))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    said = [read_record(path / "quantize.json", QuantizeReport) for path in (one, two)]
    for field in ("teacher_bytes", "student_bytes", "quantized_parameters", "other_parameters", "teacher_text"):
        assert getattr(said[0], field) == getattr(said[1], field), field
    errors = [{layer.name: layer.relative_error for layer in each.layers} for each in said]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    first, second = (load_student(path, torch.device("cpu")) for path in (one, two))
    assert first.weights.keys() == second.weights.keys()
    pairs = [(weight, second.weights[name]) for name, weight in first.weights.items()]
    assert sum(int((a.codes != b.codes).sum()) for a, b in pairs) <= share * sum(a.codes.numel() for a, _ in pairs)
    for a, b in pairs:
        torch.testing.assert_close(a.qparams.scale, b.qparams.scale, rtol=3e-2, atol=0)
    rest = unquantized_tensors(second.model, second.weights)
    for name, tensor in unquantized_tensors(first.model, first.weights).items():
        torch.testing.assert_close(tensor, rest[name], rtol=3e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="asks Linux for memory")
def test_no_process_ever_holds_a_whole_model(
    together: Together, smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(tmp_path / "teacher", **LARGE)
    changes = {"distill__train": "scales", "distill__steps": 1, "runtime__activation_checkpointing": "full"}
    prepared(smoke, tmp_path, model, 128, **changes)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back, so it is not counted
    together(__file__, "distill_divided", timeout=300)
    stored = StoredTensors(model)
    whole = sum(stored[name].nbytes for name in stored if "_proj" in name)
    rows = whole // 2 + whole // 2 + whole // 4  # of teacher, student and codes
    peaks = [int((tmp_path / f"peak{rank}").read_text()) for rank in range(2)]
    assert min(peaks) > rows
    assert max(peaks) < rows + 3 * whole // 4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["weights", "scales"])
def test_divided_models_become_and_measure_what_whole_ones_do(
    together: Together, smoke: Preset, tmp_path: Path, untied_dir: Path, way: str
) -> None:
    changes: dict[str, Any] = {"distill__train": way, "distill__train_norms": way == "scales"}
    changes |= {"distill__heldout_every": 1, "distill__stop_early": True, "rollout__keep_states": "exact"}
    changes |= {"heldout__text_tokens": 24}  # so that no folder states how far its student is on this yardstick
    if way == "scales":  # norms' steps so small that sums in another order keep the same student
        changes |= {"distill__norm_lr_ratio": 1.0}
    preset = prepared(smoke, tmp_path, untied_dir, 8, **changes)
    pipeline.distill(*open_run(preset, tmp_path / "one"), name="variant")
    together(__file__, "distill_gathered" if way == "weights" else "distill_divided")
    one, two = (tmp_path / run for run in ("one", "two"))
    states = sorted((one / "rollouts").rglob("*.states.safetensors"))
    assert states
    for path in states:
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    first, second = (read_record(run / "distill" / "variant" / "distill.json", DistillReport) for run in (one, two))
    assert first.before == second.before
    assert first.after.forward_kl.value == pytest.approx(second.after.forward_kl.value, rel=2e-2)
    assert (first.identity, first.kept_step) == (second.identity, second.kept_step)
    lines = [read_metrics(run / "distill" / "variant" / "metrics.jsonl") for run in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert a["eval/forward_kl"] == pytest.approx(b["eval/forward_kl"], rel=2e-2)
    same_students(tmp_path, 0.02)


def distill_in_copies(processes: Processes, folder: Path) -> None:
    """Do the same in two copies, each divided by two processes."""
    distill_divided(replace(processes, copies=2), folder)


@pytest.mark.slow
def test_copies_of_divided_models_go_on_from_a_step_of_one_and_become_what_it_does(
    together: Together, smoke: Preset, tmp_path: Path, untied_dir: Path
) -> None:
    exact = build_preset(smoke.model_dump(), {"teacher.dtype": "float32"}, "test")
    changes: dict[str, Any] = {"distill__train": "lora", "distill__lora_rank": 3, "distill__train_norms": True}
    changes |= {"distill__micro_batch_size": 4, "distill__heldout_every": 1, "distill__max_grad_norm": 1e-3}
    changes |= {"distill__checkpoint_every": 1, "distill__keep_last": 2}
    preset = prepared(exact, tmp_path, untied_dir, 8, **changes)
    pipeline.distill(*open_run(preset, tmp_path / "one"), name="variant")
    begun = tmp_path / "two" / "distill" / "variant"
    copytree(tmp_path / "one" / "distill" / "variant", begun)
    for made in (begun / "final", begun / "checkpoints" / "step_000002"):
        rmtree(made)
    (begun / "distill.json").unlink()
    together(__file__, "distill_in_copies", timeout=300, count=4)
    lines = [read_metrics(tmp_path / run / "distill" / "variant" / "metrics.jsonl") for run in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        for key in ("train/forward_kl", "optim/grad_norm", "eval/forward_kl"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    same_students(tmp_path, 0)
    assert written(tmp_path / "two") == written(tmp_path / "one"), "each row once"


def written(run: Path) -> int:
    """Count the bytes of all tensors in a run's last checkpoint."""
    files = (run / "distill" / "variant" / "checkpoints" / "step_000002").glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


@pytest.mark.slow
def test_divided_models_write_what_whole_ones_do_while_they_train(
    together: Together, smoke: Preset, tmp_path: Path, untied_dir: Path
) -> None:
    exact = build_preset(smoke.model_dump(), {"teacher.dtype": "float32"}, "test")
    changes: dict[str, Any] = {"distill__train": "scales", "distill__lmbda": 1.0, "distill__refresh_every": 1}
    preset = prepared(exact, tmp_path, untied_dir, 8, **changes, rollout__keep_states="exact")
    pipeline.distill(*open_run(preset, tmp_path / "one"), name="variant")
    together(__file__, "distill_divided")
    one, two = (RolloutStore(tmp_path / run / "distill" / "variant" / "rollouts") for run in ("one", "two"))
    assert [r.completion_ids for r in one.read()] == [r.completion_ids for r in two.read()]
    states = sorted(one.path.glob("*.states.safetensors"))
    assert len(states) == 2, "one a refresh"
    for path in states:
        torch.testing.assert_close(load_file(path)["states"], load_file(two.path / path.name)["states"])
    same_students(tmp_path, 0)
