"""metrics.jsonl is always written; wandb only when asked, and for real in its offline mode."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdctl.base.errors import StoreError
from kdctl.config.preset import TrackingSection
from kdctl.run.tracking import Tracker, create_sweep, open_wandb, read_metrics

SECRET = "5ecre7" * 6 + "abcd"
OFFLINE = TrackingSection(wandb="offline", project="kdctl-test")


def track(path: Path, steps: range, resume_step: int = 0) -> None:
    """Log some steps the way the training loop does."""
    tracker = Tracker(path, resume_step)
    for step in steps:
        tracker.log(step, {"train/forward_kl": 1 / step, "optim/lr": 1e-5})
    tracker.close()


def test_each_call_is_one_json_line_with_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "distill" / "v" / "metrics.jsonl"
    track(path, range(1, 4))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "train/forward_kl": 1 / step, "optim/lr": 1e-5} for step in (1, 2, 3)]
    assert read_metrics(path) == lines


def test_who_watches_hears_of_a_step_once_it_is_on_disk_and_may_end_the_training(tmp_path: Path) -> None:
    path, heard = tmp_path / "metrics.jsonl", []

    def watch(step: int, values: dict[str, float]) -> None:
        heard.append((step, values, len(read_metrics(path))))
        if step == 2:
            raise InterruptedError

    tracker = Tracker(path, 0, watch=watch)
    tracker.log(1, {"a": 1.0})
    with pytest.raises(InterruptedError):
        tracker.log(2, {"a": 0.5})
    tracker.close()
    assert heard == [(1, {"a": 1.0}, 1), (2, {"a": 0.5}, 2)]


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "metrics.jsonl", 0)
    tracker.log(1, {"a": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
    tracker.close()


def test_starting_anew_drops_old_lines(tmp_path: Path) -> None:
    track(tmp_path / "metrics.jsonl", range(1, 9))
    track(tmp_path / "metrics.jsonl", range(1, 3))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "train/forw', '{"step": 6}', '{"step": 6, "x": 1.2'])
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    path, undisturbed = tmp_path / "metrics.jsonl", tmp_path / "undisturbed.jsonl"
    track(path, range(1, 6))
    with open(path, "a") as file:
        file.write(torn)
    track(path, range(5, 8), resume_step=4)
    track(undisturbed, range(1, 8))
    assert path.read_bytes() == undisturbed.read_bytes()


def test_a_resumption_that_is_killed_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    track(path, range(1, 6))
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker(path, 3)
    assert path.read_bytes() == before
    tracker = Tracker(path, 3)
    tracker.close()
    assert [line["step"] for line in tracker.kept] == [1, 2, 3]


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    track(tmp_path / "metrics.jsonl", range(5, 7), resume_step=4)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 6]


def test_no_file_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def imports_wandb(code: str) -> bool:
    """Tell whether a fresh process has imported wandb after some code."""
    tell = "\nimport sys\nprint('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + tell], capture_output=True, text=True, check=True)
    return {"True\n": True, "False\n": False}[done.stdout]


def test_wandb_is_not_imported_when_tracking_is_off(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from kdctl.config.preset import TrackingSection\n"
        "from kdctl.run.tracking import Tracker, open_wandb\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "assert TrackingSection().wandb == 'off'\n"
        "run = open_wandb(TrackingSection(), folder, 'v', {})\n"
        "assert run is None\n"
        "tracker = Tracker(folder / 'metrics.jsonl', 0, run)\n"
        "tracker.log(1, {'a': 1.0})\n"
        "tracker.close()"
    )
    assert not imports_wandb(code)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


@pytest.mark.slow
def test_the_training_loop_does_not_import_wandb() -> None:
    assert not imports_wandb("import kdctl.distill.loop, kdctl.stages.pipeline, kdctl.cli.app")


def records(path: Path) -> list[Any]:
    """Read a small .wandb file: LevelDB log framing around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, offset, found = path.read_bytes(), 7, []
    assert len(data) < 2**15, "larger files are cut into blocks"
    while offset + 7 <= len(data):
        (length,) = struct.unpack_from("<H", data, offset + 4)
        found.append(Record.FromString(data[offset + 7 : offset + 7 + length]))
        offset += 7 + length
    return found


def logged(path: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Read a finished run's settings and history; wandb's local service writes the file a moment after finish()."""
    deadline = time.monotonic() + 30
    while not (found := records(path)) or not found[-1].HasField("exit"):
        assert time.monotonic() < deadline, "the file was never finished"
        time.sleep(0.05)
    config, history = {}, []
    for record in found:
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return config, history


@pytest.mark.slow
def test_wandb_offline_holds_what_metrics_jsonl_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    secrets = ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MY_PASSWORD")
    for name in secrets:
        monkeypatch.setenv(name, SECRET)
    run = open_wandb(OFFLINE, tmp_path, "lambda1_beta1", {"variant": "lambda1_beta1", "distill": {"lmbda": 1.0}})
    assert run is not None
    tracker = Tracker(tmp_path / "metrics.jsonl", 0, run)
    for step in (1, 2, 3):
        tracker.log(step, {"train/forward_kl": 1 / step, "optim/lr": 1e-5})
    tracker.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    config, history = logged(path)
    assert config["variant"] == "lambda1_beta1"
    assert config["distill"] == {"lmbda": 1.0}
    keys = ("train/forward_kl", "optim/lr")
    assert [{"step": row["_step"], **{key: row[key] for key in keys}} for row in history] == read_metrics(
        tmp_path / "metrics.jsonl"
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_runs_of_the_same_name_in_two_folders_are_two_wandb_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options))
    for folder in ("a", "b", "a"):
        open_wandb(TrackingSection(wandb="online"), tmp_path / folder, "v", {})
    ids = [options["id"] for options in asked]
    assert ids[0] == ids[2] != ids[1]
    assert all(options["resume"] == "allow" for options in asked)
    assert not any(set(name) & set("/\\#?%:") for name in ids)


def test_wandb_puts_tables_together_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **options: None)
    open_wandb(OFFLINE, tmp_path, "v", {})
    assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))


def test_a_sweep_without_a_login_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with pytest.raises(StoreError, match="wandb login"):
        create_sweep({"method": "grid", "parameters": {}}, OFFLINE)


def test_a_sweep_is_told_with_its_project_and_owner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(config: dict[str, Any], entity: str | None, project: str | None) -> str:
        print(f"Create sweep of {config} for {entity} in {project}")
        return "abc"

    monkeypatch.setattr("wandb.sweep", sweep)
    assert create_sweep({"method": "grid"}, OFFLINE) == "kdctl-test/abc"
    assert create_sweep({"method": "grid", "entity": "me", "project": "mine"}, OFFLINE) == "me/mine/abc"
    out, err = capsys.readouterr()
    assert out == ""
    assert "for me in mine" in err
