"""Filling a store: resumed equals undisturbed, other settings are refused."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdctl.base.errors import StoreError
from kdctl.base.progress import Advance, Silent
from kdctl.cli.app import app
from kdctl.data.prompts import PromptSet
from kdctl.rollout.fill import Plan, fill, fill_from_dataset, usable
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import Prompt, Rollout
from tests.leftovers import dead_process, left_by

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=6, min_new_tokens=1, seed=0)
PROMPTS = [Prompt(f"p{i}", i, [(37 * i + 11 * j) % 256 for j in range(2 + 3 * i)]) for i in range(7)]
PLAN = Plan("teacher", "identity-one", "writer", PromptSet(PROMPTS, 2), prompts_per_block=2, num_generations=2)


@pytest.fixture
def engine(teacher) -> InProcess:
    return InProcess(teacher, (258,), "teacher")


@pytest.fixture
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the command line sets in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class Dying(InProcess):
    """Fails when asked for more than ``lives`` blocks; counts those asked for."""

    lives = 0
    asked = 0

    def complete(self, items, sampling, policy_step=0, progress=None, finished=None, until=None):
        """Generate, or die."""
        if self.asked == self.lives:
            raise KeyboardInterrupt
        self.asked += 1
        return super().complete(items, sampling, policy_step, progress, finished)


class Counting(Silent):
    """Notes every progress step."""

    def __init__(self):
        self.seen: list[tuple[int, int]] = []
        self.labels: list[str] = []

    @contextmanager
    def task(self, label: str, unit: str = "") -> Iterator[Advance]:
        """Note the label and (done, total)."""
        self.labels.append(label)
        yield lambda done, total: self.seen.append((done, total))


def dying(engine: InProcess, lives: int) -> Dying:
    made = Dying(engine.model, tuple(engine.stop), engine.source)
    made.lives = lives
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("generations", [1, 3])
def test_blocks_hold_whole_prompts_once_each_in_order(size, generations):
    plan = dataclasses.replace(PLAN, prompts_per_block=size, num_generations=generations)
    blocks = plan.blocks()
    pairs = [(prompt.index, sample) for block in blocks for prompt, sample in block]
    assert pairs == [(i, g) for i in range(7) for g in range(generations)]
    assert {len(block) for block in blocks[:-1]} <= {size * generations}
    assert 0 < len(blocks[-1]) <= size * generations


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_independent_fills_are_equal_bytes(tmp_path, engine):
    for name in ("one", "two"):
        fill(RolloutStore(tmp_path / name), PLAN, engine, SAMPLING, Silent())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 5


@pytest.mark.parametrize("lives", [0, 1, 3])
def test_resumed_fill_equals_an_undisturbed_one_and_repeats_no_block(tmp_path, engine, lives):
    fill(RolloutStore(tmp_path / "whole"), PLAN, engine, SAMPLING, Silent())
    store = RolloutStore(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        fill(store, PLAN, dying(engine, lives), SAMPLING, Silent())
    assert not usable(store, PLAN.identity)
    store.path.mkdir(exist_ok=True)
    left_by(dead_process(), store.shard_path(lives)).write_bytes(b"half")
    second = dying(engine, 4)
    fill(store, PLAN, second, SAMPLING, Silent())
    assert second.asked == 4 - lives
    assert contents(store.path) == contents(tmp_path / "whole")


def test_damaged_shard_of_an_unfinished_store_is_generated_again(tmp_path, engine):
    fill(RolloutStore(tmp_path / "whole"), PLAN, engine, SAMPLING, Silent())
    store = RolloutStore(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        fill(store, PLAN, dying(engine, 3), SAMPLING, Silent())
    for index, damage in enumerate((lambda data: data[:-9], lambda data: data[:99] + b"damage" + data[105:])):
        path = store.shard_path(index)
        path.write_bytes(damage(path.read_bytes()))
    second = dying(engine, 4)
    fill(store, PLAN, second, SAMPLING, Silent())
    assert second.asked == 3
    assert contents(store.path) == contents(tmp_path / "whole")


def test_shards_of_another_identity_are_not_reused(tmp_path, engine):
    store = RolloutStore(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        fill(store, PLAN, dying(engine, 2), SAMPLING, Silent())
    other = dying(engine, 4)
    fill(store, dataclasses.replace(PLAN, identity="identity-two"), other, SAMPLING, Silent())
    assert other.asked == 4
    assert usable(store, "identity-two")


def test_fewer_prompts_leave_no_old_shards(tmp_path, engine):
    store = RolloutStore(tmp_path / "s")
    fill(store, PLAN, engine, SAMPLING, Silent())
    shorter = dataclasses.replace(PLAN, identity="identity-two", prompts=PromptSet(PROMPTS[:3], 0))
    fill(store, shorter, engine, SAMPLING, Silent())
    assert sorted(contents(store.path)) == ["manifest.json", "shard-00000.arrow", "shard-00001.arrow"]
    assert [r.prompt_id for r in store.read()] == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_store_has_no_manifest_while_it_is_filled_anew(tmp_path, engine):
    store = RolloutStore(tmp_path / "s")
    fill(store, PLAN, engine, SAMPLING, Silent())
    with pytest.raises(KeyboardInterrupt):
        fill(store, dataclasses.replace(PLAN, identity="identity-two"), dying(engine, 1), SAMPLING, Silent())
    assert not usable(store, PLAN.identity)
    assert not usable(store, "identity-two")


# --- the finished store -----------------------------------------------------------------------------------------------


def test_manifest_says_how_and_from_what(tmp_path, engine):
    manifest = fill(RolloutStore(tmp_path / "s"), PLAN, engine, SAMPLING, Silent())
    assert manifest == RolloutStore(tmp_path / "s").manifest()
    assert manifest.sampling == SAMPLING.record()
    assert manifest.sampling is not None
    assert manifest.sampling.min_new_tokens == 1
    assert (manifest.source, manifest.identity, manifest.writer) == ("teacher", "identity-one", "writer")
    assert (manifest.rows, manifest.skipped_prompts) == (14, 2)


def test_progress_ends_at_its_total_and_never_goes_back(tmp_path, engine):
    reporter = Counting()
    fill(RolloutStore(tmp_path / "s"), PLAN, engine, SAMPLING, reporter)
    done = [step for step, _ in reporter.seen]
    assert done == sorted(done)
    assert len(set(done)) > 8
    assert reporter.seen[-1] == (14 * 6, 14 * 6)


def test_progress_names_whose_completions_they_are(tmp_path, engine):
    reporter = Counting()
    fill(RolloutStore(tmp_path / "teacher"), PLAN, engine, SAMPLING, reporter)
    fill(RolloutStore(tmp_path / "rollouts"), dataclasses.replace(PLAN, whose="ptq's"), engine, SAMPLING, reporter)
    assert reporter.labels == ["generating teacher completions", "generating ptq's completions"]


def test_dataset_store_holds_the_answers(tmp_path):
    def answer(prompt: Prompt) -> Rollout:
        return Rollout(prompt.id, prompt.index, 0, prompt.prompt_ids, [1, 258], None, "stop", 0, 0, "dataset")

    rollouts: Sequence[Rollout] = [answer(prompt) for prompt in PROMPTS]
    manifest = fill_from_dataset(RolloutStore(tmp_path / "s"), PLAN, iter(rollouts))
    assert manifest.sampling is None
    assert [shard.rows for shard in manifest.shards] == [2, 2, 2, 1]
    assert list(RolloutStore(tmp_path / "s").read()) == rollouts


def test_store_of_other_settings_is_refused_with_what_it_holds(tmp_path, engine):
    store = RolloutStore(tmp_path / "s")
    assert not usable(store, PLAN.identity)
    fill(store, PLAN, engine, SAMPLING, Silent())
    assert usable(store, PLAN.identity)
    with pytest.raises(StoreError, match=r"14 completions sampled with temperature=1\.0.*seed=0") as caught:
        usable(store, "identity-two")
    assert "kdctl rollout --source teacher --force" in str(caught.value)
    assert store.read()


def test_refused_yardstick_does_not_recommend_a_command_that_cannot_help(tmp_path, engine):
    store = RolloutStore(tmp_path / "heldout")
    fill(store, dataclasses.replace(PLAN, source="heldout"), engine, SAMPLING, Silent())
    with pytest.raises(StoreError, match="another --run") as caught:
        usable(store, "identity-two")
    assert "--force" not in str(caught.value)


# --- the command ------------------------------------------------------------------------------------------------------

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["--num-prompts", "4", "--max-new-tokens", "4", "--set", "rollout.prompts_per_block=2"]


@pytest.mark.usefixtures("_own_environment")
def test_command_refuses_other_settings_and_force_rewrites(tiny_dir, tmp_path):
    def run(*extra: str):
        teacher = ["--set", f"teacher.model={tiny_dir}"]
        command = ["rollout", "--preset", "smoke", "--run", str(tmp_path / "run"), "--source", "teacher"]
        return CliRunner().invoke(app, [*command, *teacher, *SMALL, *extra])

    store = RolloutStore(tmp_path / "run" / "rollouts" / "teacher")
    assert run().exit_code == 0
    first = contents(store.path)
    again = run()
    assert again.exit_code == 0
    assert "skipped" in again.output
    refused = run("--temperature", "0.5")
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert "Traceback" not in refused.output
    assert contents(store.path) == first
    assert run("--temperature", "0.5", "--force").exit_code == 0
    manifest = store.manifest()
    assert manifest.sampling is not None
    assert manifest.sampling.temperature == 0.5
    assert contents(store.path) != first
    assert run("--force").exit_code == 0
    assert contents(store.path) == first


def command(run: Path) -> list[str]:
    """Name the command whose process is killed."""
    settings = {"prompts_per_block": 2, "num_prompts": 24, "max_new_tokens": 48}
    assignments = [part for key, value in settings.items() for part in ("--set", f"rollout.{key}={value}")]
    program = [sys.executable, "-m", "kdctl", "rollout", "--preset", "smoke", "--source", "teacher"]
    return [*program, "--run", str(run), *assignments]


def kill_after_first_shards(run: Path) -> int:
    """Start filling a store, kill the process as soon as it has written two shards, and count what is there."""
    shards = run / "rollouts" / "teacher"
    process = subprocess.Popen(command(run), env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (shards / "shard-00001.arrow").exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(list(shards.glob("shard-*.arrow")))


@pytest.mark.slow
def test_store_of_a_killed_process_is_completed_to_the_same_bytes(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    assert 2 <= kill_after_first_shards(killed) < 12
    assert not (killed / "rollouts" / "teacher" / "manifest.json").exists()
    kept = [killed / "rollouts" / "teacher" / f"shard-0000{index}.arrow" for index in (0, 1)]
    written = [path.stat().st_mtime_ns for path in kept]
    for run in (killed, undisturbed):
        subprocess.run(command(run), env=ONE_THREAD, check=True, capture_output=True, timeout=300)
    finished = contents(killed / "rollouts" / "teacher")
    assert finished == contents(undisturbed / "rollouts" / "teacher")
    assert len(finished) == 13
    assert (killed / "preset.json").read_bytes() == (undisturbed / "preset.json").read_bytes()
    assert [path.stat().st_mtime_ns for path in kept] == written
