"""A good student folder is proven; every kind of damage is named, also where SHA256SUMS were written anew over it."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

from kdctl.base.errors import ModelError, StoreError
from kdctl.base.sums import without_sum
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.formats import verify
from kdctl.formats.records import VerifyReport
from kdctl.formats.student import write_sums
from kdctl.run import files
from kdctl.stages import pipeline, publish
from kdctl.stages.context import open_run

CPU = torch.device("cpu")
GATE = ["integrity", "record", "tensors", "grid", "loaders", "logits", "tokenizer"]
MEASURED = ["teacher", "configuration", "error of each layer", "KL to the teacher"]
AWKWARD = {"hidden_size": 48, "intermediate_size": 88, "num_key_value_heads": 1}
LAYER = "model.layers.0.mlp.down_proj"
GRIDS: dict[str, dict[str, object]] = {
    "asymmetric": {"quantize.symmetric": False},
    "symmetric": {"quantize.symmetric": True},
    "awkward": {"quantize.bits": 3, "quantize.group_size": 8, "quantize.method": "minmax"},
}
RunOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Return a function that quantizes once for each kind of grid and names the run folder."""
    found: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in found:
            teacher = tiny_dir
            if kind == "awkward":
                place = tmp_path_factory.mktemp("awkward")
                teacher = sys.modules["tiny"].build(place, tie_word_embeddings=False, attention_bias=True, **AWKWARD)
            preset = load_preset("smoke", {"teacher.model": str(teacher), "eval.tasks": [], **GRIDS[kind]})
            found[kind] = tmp_path_factory.mktemp(kind)
            pipeline.quantize(*open_run(preset, found[kind]))
        return found[kind]

    return make


@pytest.fixture
def run(made: RunOf, tmp_path: Path) -> Path:
    """Return a copy of a run folder to damage."""
    return shutil.copytree(made("asymmetric"), tmp_path / "run")


@pytest.fixture
def student(run: Path) -> Path:
    """Return its student folder."""
    return run / "student"


def verified(folder: Path, teacher: str | None = None) -> VerifyReport:
    return verify.verify(folder, verify.find_teacher(folder, teacher), CPU)


def status(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def details(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks}


def failures(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if check.status == "failed"}


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change stored tensors and write SHA256SUMS anew, so that integrity holds."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_sums(folder)


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level values of a JSON file and write SHA256SUMS anew, as someone who means it does."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "sum"}))
    write_sums(path.parent)


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


# --- good folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRIDS)
def test_a_good_folder_passes_every_check(made: RunOf, kind: str) -> None:
    report = verified(made(kind) / "student")
    assert status(report) == dict.fromkeys(GATE + MEASURED, "passed"), details(report)
    assert report.passed
    assert "equal to its record" in details(report)["KL to the teacher"]


@pytest.mark.slow
def test_a_distilled_folder_passes_every_check(smoke: Preset, tmp_path: Path) -> None:
    job = open_run(smoke, tmp_path)
    final = job.context.paths.variant(pipeline.distill(*job).variant).final
    report = verified(final)
    assert status(report) == dict.fromkeys(GATE + MEASURED, "passed"), details(report)


def test_without_a_teacher_its_checks_are_unknown_and_do_not_fail(student: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(student, tmp_path / "elsewhere" / "deep" / "alone")
    report = verified(alone)
    unknown = ["tokenizer", *MEASURED]
    assert status(report) == {name: "unknown" if name in unknown else "passed" for name in GATE + MEASURED}
    assert "--teacher" in details(report)["teacher"]
    assert report.passed


def test_a_named_teacher_is_used_and_the_lost_yardstick_is_unknown(
    student: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(student, tmp_path / "elsewhere" / "deep" / "alone")
    report = verified(alone, str(tiny_dir))
    assert {name for name, found in status(report).items() if found != "passed"} == {"KL to the teacher"}
    assert "held-out completions are not beside" in details(report)["KL to the teacher"]
    assert report.passed


def test_a_teacher_that_is_gone_is_unknown_with_the_reason(run: Path, student: Path) -> None:
    preset = json.loads((run / "preset.json").read_text())
    preset["teacher"]["model"] = "/nowhere/at/all"
    del preset["sum"]
    (run / "preset.json").write_text(json.dumps(preset))
    report = verified(student)
    assert report.passed
    assert "/nowhere/at/all" in details(report)["error of each layer"]


def test_another_yardstick_is_unknown(run: Path, student: Path) -> None:
    manifest = run / "rollouts" / "heldout" / "manifest.json"
    manifest.write_text(without_sum(manifest.read_text()) + "\n")
    report = verified(student)
    assert status(report)["KL to the teacher"] == "unknown"
    assert report.passed


# --- damage that SHA256SUMS show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "quantize.json", "README.md"])
@pytest.mark.parametrize("position", [0, 30, -1])
def test_a_flipped_byte_of_any_file_is_caught(student: Path, name: str, position: int) -> None:
    flip_byte(student / name, position)
    report = verified(student)
    assert not report.passed
    assert status(report)["integrity"] == "failed"
    assert name in details(report)["integrity"]


def test_without_sums_integrity_is_unknown_and_that_is_not_enough(student: Path) -> None:
    (student / "SHA256SUMS").unlink()
    report = verified(student)
    assert status(report)["integrity"] == "unknown"
    assert failures(report) == set()
    assert not report.passed


def test_a_file_that_the_sums_do_not_cover_is_named(student: Path) -> None:
    (student / "added_tokens.json").write_text("{}")
    (student / ".gitattributes").write_text("")
    report = verified(student)
    assert failures(report) == {"integrity"}
    assert details(report)["integrity"] == "SHA256SUMS does not cover added_tokens.json"


# --- damage that only a closer look shows -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.01])
def test_a_scale_that_is_no_scale_is_caught(student: Path, value: float) -> None:
    edit_tensors(student, lambda tensors: tensors[f"{LAYER}.weight_scale"].view(-1)[3:4].fill_(value))
    report = verified(student)
    assert status(report)["integrity"] == "passed"
    assert "grid" in failures(report)
    assert f"{LAYER}.weight_scale" in details(report)["grid"]


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_one_changed_code_scale_or_zero_point_is_caught_by_the_layers_error(student: Path, part: str) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{part}"].view(torch.uint8).view(-1)[0] ^= 1

    edit_tensors(student, flip)
    report = verified(student)
    assert [check.status for check in report.checks][: len(GATE)] == ["passed"] * len(GATE)
    assert "error of each layer" in failures(report)
    assert LAYER in details(report)["error of each layer"]
    assert not report.passed


def test_bits_that_belong_to_no_code_are_caught(made: RunOf, tmp_path: Path) -> None:
    folder = shutil.copytree(made("awkward"), tmp_path / "run") / "student"

    def fill(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight_packed"][0, -1] |= -(2**31)

    edit_tensors(folder, fill)
    report = verified(folder)
    assert failures(report) == {"grid"}
    assert "belong to no code" in details(report)["grid"]


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "missing: model.norm.weight": lambda t: t.pop("model.norm.weight"),
    "not expected: stranger": lambda t: t.update(stranger=torch.ones(1)),
    f"{LAYER}.weight_scale is": lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].float()}),
    f"{LAYER}.weight_packed is": lambda t: t.update(
        {f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:, :-1].contiguous()}
    ),
    f"{LAYER}.weight_shape says": lambda t: t[f"{LAYER}.weight_shape"].add_(1),
    "missing: ": lambda t: t.pop(f"{LAYER}.weight_zero_point"),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_missing_extra_and_misshapen_tensors_are_named(student: Path, expected: str) -> None:
    edit_tensors(student, CHANGES[expected])
    report = verified(student)
    assert "tensors" in failures(report)
    assert expected in details(report)["tensors"]


def test_a_file_that_is_no_safetensors_is_a_failure_not_a_traceback(student: Path) -> None:
    (student / "model.safetensors").write_bytes(b"\xff" * 64)
    write_sums(student)
    report = verified(student)
    assert {"record", "tensors", "grid", "loaders", "logits", "error of each layer"} <= failures(report)
    assert not report.passed


def test_a_configuration_of_another_grid_is_caught(student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    edit_json(student / "config.json", **config)
    report = verified(student)
    assert {"record", "tensors"} <= failures(report)


@pytest.mark.parametrize(("key", "value"), [("targets", ["Liner"]), ("input_activations", {"num_bits": 8})])
def test_a_description_for_other_programs_that_was_changed_is_caught(student: Path, key: str, value: object) -> None:
    config = json.loads((student / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"][key] = value
    edit_json(student / "config.json", **config)
    report = verified(student)
    assert "quantization_config.config_groups" in details(report)["tensors"]
    assert not report.passed


def test_a_setting_of_the_network_that_was_changed_is_caught(student: Path) -> None:
    rope = json.loads((student / "config.json").read_text())["rope_parameters"]
    edit_json(student / "config.json", rope_parameters=rope | {"rope_theta": 5e5})
    report = verified(student)
    assert failures(report) == {"configuration", "KL to the teacher"}
    assert details(report)["configuration"].endswith("differ in rope_parameters")


def test_a_folder_without_packed_weights_is_a_failure_not_a_traceback(student: Path) -> None:
    edit_tensors(student, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".weight_" in name])
    assert {"tensors", "grid", "loaders"} <= failures(verified(student))


def test_a_configuration_that_cannot_be_read_is_caught(student: Path) -> None:
    (student / "config.json").write_text("{")
    write_sums(student)
    assert {"record", "tensors", "loaders"} <= failures(verified(student))


@pytest.mark.parametrize(("field", "check"), [("student_bytes", "record"), ("layers", "error of each layer")])
def test_a_record_that_was_changed_is_caught(student: Path, field: str, check: str) -> None:
    stored = json.loads((student / "quantize.json").read_text())
    stored["student_bytes"] += field == "student_bytes"
    if field == "layers":
        stored["layers"][0]["sqnr_db"] += 1e-6
    edit_json(student / "quantize.json", **stored)
    assert failures(verified(student)) == {check}


def test_a_kl_that_was_changed_is_caught_with_and_without_the_teacher(student: Path) -> None:
    stored = json.loads((student / "quantize.json").read_text())
    stored["distribution"]["forward_kl"]["value"] *= 0.9
    edit_json(student / "quantize.json", **stored)
    assert failures(verified(student)) == {"record", "KL to the teacher"}


def test_another_tokenizer_is_caught(student: Path) -> None:
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    edit_json(student / "tokenizer.json", model=tokenizer["model"])
    report = verified(student)
    assert failures(report) == {"tokenizer"}
    assert details(report)["tokenizer"] == "not the teacher's: vocabulary, splitting of text"


def test_another_chat_template_and_other_stop_tokens_are_caught(student: Path) -> None:
    template = student / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    edit_json(student / "generation_config.json", eos_token_id=[5])
    assert details(verified(student))["tokenizer"] == "not the teacher's: chat template, stop tokens"


def test_another_teacher_that_the_user_names_is_a_failure(student: Path, tmp_path: Path) -> None:
    other = sys.modules["tiny"].build(tmp_path / "other", seed=5)
    report = verified(student, str(other))
    assert failures(report) == {"teacher"}
    assert not report.passed


# --- the command and the gate -----------------------------------------------------------------------------------------


def test_the_command_shows_every_check_and_ends_with_0(student: Path, invoke: Callable[..., Result]) -> None:
    done = invoke("verify", student)
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith("\nverified")
    assert all(name in done.stdout for name in GATE + MEASURED)


def test_the_command_ends_with_1_when_a_check_fails(student: Path, invoke: Callable[..., Result]) -> None:
    flip_byte(student / "tokenizer.json", 0)
    done = invoke("verify", student, "--json")
    assert done.exit_code == 1
    report = VerifyReport.model_validate_json(done.stdout)
    assert not report.passed
    assert "integrity" in failures(report)


def test_a_reason_that_several_checks_have_is_said_once(student: Path, invoke: Callable[..., Result]) -> None:
    (student / "config.json").write_text("{")
    done = invoke("verify", student)
    assert done.exit_code == 1
    (reason,) = {details(verified(student))[name] for name in ("record", "tensors", "grid")}
    shown = " ".join(done.stdout.split())
    assert shown.count(" ".join(reason.split())) == 1
    assert shown.count("for the same reason as record") >= 2


def test_the_command_ends_with_1_without_sums(student: Path, invoke: Callable[..., Result]) -> None:
    (student / "SHA256SUMS").unlink()
    done = invoke("verify", student)
    assert done.exit_code == 1
    assert "NOT verified; unknown: integrity" in done.stdout


def test_what_is_no_student_folder_is_named_with_the_way_to_one(student: Path, tmp_path: Path) -> None:
    run, teacher = tmp_path / "another", verify.find_teacher(student)
    shutil.copytree(student, run / "student")
    for folder, words in ((run, f"SHA256SUMS.*did you mean {run / 'student'}"), (tmp_path / "none", "no such folder")):
        with pytest.raises(StoreError, match=words):
            verify.verify(folder, teacher, torch.device("cpu"))


def test_wrong_input_ends_with_2(student: Path, tiny_dir: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    for arguments in (("verify", tmp_path / "none"), ("verify", tiny_dir), ("verify", student, "--teacher", "./none")):
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("error: ")
    with pytest.raises(ModelError, match="none"):
        verify.find_teacher(student, "./none")


@pytest.fixture
def damaging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every student folder that is written from now on a damaged one."""
    save = publish.save_student

    def save_damaged(folder: Path, *arguments: Any) -> None:
        save(folder, *arguments)
        edit_tensors(folder, lambda tensors: tensors[f"{LAYER}.weight_scale"].fill_(-1.0))

    monkeypatch.setattr(publish, "save_student", save_damaged)


@pytest.mark.usefixtures("damaging")
def test_the_gate_keeps_a_failed_student_under_another_name(smoke: Preset, tmp_path: Path) -> None:
    job = open_run(smoke, tmp_path)
    with pytest.raises(StoreError, match=r"tensors: .*weight_scale.*student\.failed"):
        pipeline.quantize(*job)
    assert sorted(path.name for path in tmp_path.glob("*student*")) == ["student.failed"]
    assert (tmp_path / "student.failed" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["SHA256SUMS", "quantize.json"])
def test_a_disk_that_fails_at_the_gate_is_no_verdict(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(operation: str, path: Path) -> None:
        if (operation, path.name) == ("read", name) and ".student." in str(path.parent):
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(files, "before", fail)
    with pytest.raises(OSError, match=f"Input/output error.*{name}"):
        pipeline.quantize(*open_run(smoke, tmp_path))
    assert list(tmp_path.glob("*student*")) == []


def test_a_failed_student_leaves_the_earlier_one_where_it_was(
    run: Path, tiny_dir: Path, request: pytest.FixtureRequest
) -> None:
    before = (run / "student" / "SHA256SUMS").read_bytes()
    request.getfixturevalue("damaging")
    job = open_run(load_preset("smoke", {"teacher.model": str(tiny_dir), "eval.tasks": []}), run)
    with pytest.raises(StoreError, match="does not verify"):
        pipeline.quantize(*job, force=True)
    assert (run / "student" / "SHA256SUMS").read_bytes() == before
    assert (run / "student.failed").is_dir()


@pytest.mark.slow
def test_the_gate_keeps_a_failed_variant_under_another_name(
    run: Path, tiny_dir: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("damaging")
    job = open_run(load_preset("smoke", {"teacher.model": str(tiny_dir), "eval.tasks": []}), run)
    with pytest.raises(StoreError, match=r"final\.failed"):
        pipeline.distill(*job, name="broken")
    variant = job.context.paths.variant("broken")
    assert (variant.path / "final.failed").is_dir()
    assert not variant.final.exists()
    assert not variant.report.exists()
