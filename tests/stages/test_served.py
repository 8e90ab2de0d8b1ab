"""Live generation on a server: new weights at each refresh, what is stale or cannot be refreshed, and what is kept."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from stub_server import Stub, serving

from kdctl.base.errors import PresetError, ServerError
from kdctl.base.sums import without_sum
from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.distill.feed import Live
from kdctl.formats.student import load_student, read_student
from kdctl.model.folder import read_tensors
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import Rollout, ShardEntry
from kdctl.run.tracking import read_metrics
from kdctl.stages import pipeline
from kdctl.stages.context import Context, Run, open_run
from kdctl.stages.served import StudentFiles

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
LIVE = {"distill.lmbda": 1.0, "distill.steps": 4, "distill.refresh_every": 2, "rollout.engine": "server"}


@contextmanager
def live(
    smoke: Preset, folder: Path, *faults: str, kind: str = "vllm", **changes: object
) -> Iterator[tuple[Run, Stub]]:
    """Serve the PTQ student of a new run folder that generates live."""
    pipeline.ensure_student(*open_run(smoke, folder))
    with serving(kind, load_student(folder / "student", CPU).model, *faults) as stub:
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        preset = build_preset(smoke.model_dump(), {**LIVE, "rollout.url": [stub.url], **dotted}, "test")
        yield open_run(preset, folder), stub


def same(one: Path, other: Path) -> bool:
    """Compare the tensors of two model folders to the bit."""
    first, second = dict(read_tensors(one)), dict(read_tensors(other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_each_refresh_gives_the_server_the_student_as_it_is(smoke: Preset, tmp_path: Path, kind: str) -> None:
    with live(smoke, tmp_path, kind=kind) as (run, stub):
        report = pipeline.distill(*run, name="live")
        held = stub.model
    assert [path.name for path in stub.loaded] == ["step-000000", "step-000002"]
    variant = run.context.paths.variant("live")
    store = RolloutStore(variant.rollouts)
    assert [shard.policy_step for shard in store.manifest().shards] == [0, 2]
    engine = store.manifest().engine
    assert engine.server is not None
    assert (engine.name, engine.reproducible, engine.server.kind) == ("server", False, kind)
    gaps = [line["rollout/server_gap"] for line in read_metrics(variant.metrics)]
    assert len(gaps) == 4
    assert max(gaps) < 1e-3
    assert report.steps == 4
    started = load_student(tmp_path / "student", CPU).model
    assert any(not torch.equal(a, b) for a, b in zip(held.parameters(), started.parameters(), strict=True))
    # A store from a server trains like any other: replayed, it leaves the same student.
    again = build_preset(run.context.preset.model_dump(), {"distill.replay": "live"}, "test")
    pipeline.distill(*open_run(again, tmp_path), name="again")
    assert same(variant.final, run.context.paths.variant("again").final)


def test_a_server_that_keeps_its_old_weights_is_told(smoke: Preset, tmp_path: Path) -> None:
    with (
        live(smoke, tmp_path, "stale", distill__lr=1e-4) as (run, _),
        pytest.raises(ServerError, match=r"still has the weights of before step 2: .*0\.\d\d of the way"),
    ):
        pipeline.distill(*run, name="live")


def test_a_server_that_holds_another_variants_weights_is_given_the_first(smoke: Preset, tmp_path: Path) -> None:
    with live(smoke, tmp_path) as (run, stub):
        pipeline.distill(*run, name="one")
        pipeline.distill(*run, name="two")
    stores = [RolloutStore(run.context.paths.variant(name).rollouts).shard_path(0) for name in ("one", "two")]
    assert stub.loaded[2].parts[-3:] == ("two", "served", "step-000000")
    tokens = [RolloutStore(path.parent).read()[0].logprobs for path in stores]
    torch.testing.assert_close(torch.tensor(tokens[0]), torch.tensor(tokens[1]), atol=1e-3, rtol=0)
    assert not list(run.context.paths.variant("two").served.glob("step-*"))


def test_a_shard_that_an_interruption_left_is_named(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Live._take

    def cut_off(self: Live, entry: ShardEntry, rollouts: Sequence[Rollout]) -> None:
        if len(self._shards) == 2:
            raise RuntimeError("killed")
        taken(self, entry, rollouts)

    with live(smoke, tmp_path) as (run, _):
        monkeypatch.setattr(Live, "_take", cut_off)
        with pytest.raises(RuntimeError, match="killed"):
            pipeline.distill(*run, name="live")
        monkeypatch.setattr(Live, "_take", taken)
        pipeline.distill(*run, name="live")
    manifest = RolloutStore(run.context.paths.variant("live").rollouts).manifest()
    assert [shard.policy_step for shard in manifest.shards] == [0, 2]
    assert list(manifest.steps) == ["0-1", "2-3"]


def test_a_server_that_takes_no_weights_is_refused_with_the_ways_out(smoke: Preset, tmp_path: Path) -> None:
    with (
        live(smoke, tmp_path, "no_reload") as (run, _),
        pytest.raises(ServerError, match=r"does not take new weights.*VLLM_SERVER_DEV_MODE=1.*rollout\.restart"),
    ):
        pipeline.distill(*run, name="live")


def test_a_command_restarts_what_cannot_reload(smoke: Preset, tmp_path: Path) -> None:
    code = "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '/restart', sys.argv[2].encode())"
    with live(smoke, tmp_path, "no_reload") as (run, stub):
        command = f'{sys.executable} -c "{code}" {stub.url} {{weights}}'
        preset = build_preset(run.context.preset.model_dump(), {"rollout.restart": command}, "test")
        pipeline.distill(*open_run(preset, tmp_path), name="live")
    assert [path.name for path in stub.loaded] == ["step-000000", "step-000002"]


def test_a_restart_that_fails_says_what_it_said(smoke: Preset, tmp_path: Path) -> None:
    command = f"{sys.executable} -c \"raise SystemExit('no such unit {{weights}}')\""
    with (
        live(smoke, tmp_path, rollout__restart=command) as (run, _),
        pytest.raises(ServerError, match=r"rollout\.restart ended with 1 .no such unit"),
    ):
        pipeline.distill(*run, name="live")


def test_with_lag_completions_come_from_the_student_before(smoke: Preset, tmp_path: Path) -> None:
    with live(smoke, tmp_path, rollout__lag=1, distill__steps=6) as (run, stub):
        pipeline.distill(*run, name="live")
    shards = RolloutStore(run.context.paths.variant("live").rollouts).manifest().shards
    assert [shard.policy_step for shard in shards] == [0, 0, 2]
    assert [path.name for path in stub.loaded] == ["step-000000", "step-000002"]


def test_training_goes_on_after_a_stop_with_the_weights_of_its_checkpoint(smoke: Preset, tmp_path: Path) -> None:
    def stop(step: int, _: object) -> None:
        if step == 3:
            raise RuntimeError("stopped")

    with live(smoke, tmp_path, distill__checkpoint_every=1) as (run, stub):
        with pytest.raises(RuntimeError, match="stopped"):
            pipeline.distill(*run, name="live", watch=stop)
        store = RolloutStore(run.context.paths.variant("live").rollouts)
        kept = [store.shard_path(number).read_bytes() for number in range(2)]
        drawn = sum(stub.seen.values())
        pipeline.distill(*run, name="live")
        assert sum(stub.seen.values()) == drawn  # every interval was written before
    assert [store.shard_path(number).read_bytes() for number in range(2)] == kept


def test_shards_of_several_processes_generate_live_on_a_server(smoke: Preset, tmp_path: Path) -> None:
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launched += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launched += [
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "-m",
        "kdctl",
        "distill",
        "--run",
        str(tmp_path),
        "--name",
        "live",
    ]
    with live(smoke, tmp_path) as (run, stub):
        file = tmp_path / "sharded.json"
        file.write_text(run.context.preset.model_dump_json())
        done = subprocess.run([*launched, "--preset", str(file)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in stub.loaded] == ["step-000000", "step-000002"]
    variant = run.context.paths.variant("live")
    assert max(line["rollout/server_gap"] for line in read_metrics(variant.metrics)) < 0.05
    assert [shard.rows for shard in RolloutStore(variant.rollouts).manifest().shards] == [8, 8]


def test_when_all_servers_are_gone_what_is_complete_is_kept(smoke: Preset, tmp_path: Path) -> None:
    """The command line: exit code 2, and only what is missing is asked for again."""
    with live(smoke, tmp_path, rollout__num_prompts=24) as (run, stub):
        said = ["rollout.num_prompts=24", "rollout.prompts_per_block=8", "rollout.batch_size=1"]
        command = [sys.executable, "-m", "kdctl", "rollout", "--run", str(tmp_path), "--source", "student"]
        command += ["--engine", "server", "--url", stub.url, *(word for text in said for word in ("--set", text))]
        looked = 8 + 8 + 1  # drawn to be looked at, scored, and one stop token forced
        stub.faults.add(f"dies_after_{looked + 10}")
        first = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert first.returncode == 2, first.stderr
        assert "no other is left; start it again and repeat the command" in " ".join(first.stderr.split())
        store = RolloutStore(run.context.paths.rollouts("student"))
        assert not store.finished
        kept = store.shard_path(0).read_bytes()
        stub.faults.clear()
        before = stub.seen["/v1/completions"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert second.returncode == 0, second.stderr
        assert stub.seen["/v1/completions"] - before == looked + 16
    assert store.shard_path(0).read_bytes() == kept
    manifest = json.loads(without_sum(store.manifest_path.read_text()))
    assert sum(shard["rows"] for shard in manifest["shards"]) == 24
    assert manifest["engine"]["server"]["request"]["temperature"] == 1.0
    assert "127.0.0.1" not in json.dumps(manifest)


def test_what_is_written_for_a_server_is_the_student(smoke: Preset, tmp_path: Path) -> None:
    run = open_run(smoke, tmp_path)
    pipeline.ensure_student(*run)
    files = StudentFiles(Context(run.context.preset, run.context.paths), tmp_path / "served")
    student = load_student(tmp_path / "student", CPU)
    dense = read_dense(files.start("dense"))
    for name, tensor in student.model.state_dict().items():
        torch.testing.assert_close(dense[name], tensor, atol=0, rtol=0) if name in dense else None
    assert files.start("packed") == tmp_path / "student"
    assert files.start("gguf").suffix == ".gguf"
    assert read_student(files.write("packed", 0), CPU).weights.keys() == student.weights.keys()


def read_dense(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a plain model folder."""
    return dict(read_tensors(folder))


def test_a_server_writes_the_answers_of_an_evaluation(smoke: Preset, tmp_path: Path) -> None:
    """The same, but for rounding, as in this process: the stub computes with the student's own weights."""
    tasks = {"eval.tasks": ["triviaqa_offline"], "eval.limit": 3, "eval.student_written": False}
    with live(smoke, tmp_path, **{name.replace(".", "__"): value for name, value in tasks.items()}) as (run, stub):
        preset = run.context.preset.model_dump()
        asked = open_run(build_preset(preset, {"eval.engine": "server"}, "test"), tmp_path)
        there = pipeline.evaluate(*asked, names=["ptq"])["ptq"]
        assert stub.loaded
        here = pipeline.evaluate(*run, names=["ptq"])["ptq"]
    assert there.identity != here.identity
    assert there.tasks["triviaqa_offline"].answers is not None
    assert not (tmp_path / "served" / "ptq").exists()
    own = run.context.paths.samples("ptq", "triviaqa_offline")
    assert [len(one) for one in pq.read_table(own)["answers"].to_pylist()] == [1, 1, 1]
    with pytest.raises(PresetError, match=r"eval.engine='server'.*set rollout.engine='server'"):
        build_preset(smoke.model_dump(), {"eval.engine": "server"}, "test")
