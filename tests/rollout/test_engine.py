"""An engine is one entry of a dict; what an entry of its own writes is identified, and kdctl's own as it always was."""

import json
from typing import ClassVar

import pytest

from kdctl.base.errors import PresetError
from kdctl.base.progress import Silent
from kdctl.base.sums import without_sum
from kdctl.config.preset import RolloutSection
from kdctl.config.resolve import build_preset, identity
from kdctl.data.prompts import PromptSet
from kdctl.rollout.engine import ENGINES, engine_named
from kdctl.rollout.fill import Plan, fill
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.work import Work
from kdctl.run.records import EngineRecord, Prompt, Rollout, StoreManifest
from kdctl.run.tracking import read_metrics
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

SAMPLING = Sampling(1.0, 1.0, 0, 4, 0, 0)
PLAN = Plan("teacher", "identity", "writer", PromptSet([Prompt("p", 0, [1, 2]), Prompt("q", 1, [3])], 0), 2)


class Constant:
    """Always says 7 and stops; notes the policy steps whose weights it was given."""

    loaded: ClassVar[list[int]] = []
    closed: ClassVar[list[bool]] = []

    def __init__(self, work):
        self.stop, self.source = work.stop, work.source

    def record(self):
        return EngineRecord(name="constant", reproducible=False)

    def metrics(self):
        return {"rollout/constant": 7.0}

    def close(self):
        self.closed.append(True)

    def load(self, model, policy_step):
        self.loaded.append(policy_step)

    blocks_at_once = 1

    def complete(self, items, sampling, policy_step=0, progress=None, finished=None, until=None):
        ids = [7, self.stop[0]]
        return [
            Rollout(p.id, p.index, i, p.prompt_ids, ids, None, "stop", policy_step, sampling.seed, self.source)
            for p, i in items
        ]


@pytest.fixture(autouse=True)
def _entry(monkeypatch):
    monkeypatch.setitem(ENGINES, "constant", Constant)
    monkeypatch.setattr(Constant, "loaded", [])
    monkeypatch.setattr(Constant, "closed", [])


def test_unknown_engine_is_named_with_those_there_are():
    with pytest.raises(PresetError, match=r"rollout\.engine='transfomers'.*did you mean 'transformers'.*constant"):
        engine_named("transfomers")


def test_manifest_says_who_sampled_and_whether_it_can_be_had_again(tmp_path, teacher):
    made = engine_named("constant")(Work(teacher, (258,), "teacher", RolloutSection()))
    store = RolloutStore(tmp_path)
    fill(store, PLAN, made, SAMPLING, Silent())
    assert store.manifest().engine == EngineRecord(name="constant", reproducible=False)
    assert [rollout.completion_ids for rollout in store.read()] == [[7, 258], [7, 258]]


def test_own_engine_leaves_manifest_and_identity_as_they_were(tmp_path, teacher):
    store = RolloutStore(tmp_path)
    fill(store, PLAN, InProcess(teacher, [258], "teacher"), SAMPLING, Silent())
    written = json.loads(without_sum(store.manifest_path.read_text()))
    assert list(written) == ["source", "identity", "writer", "sampling", "shards", "steps", "skipped_prompts"]
    assert store.manifest().engine == EngineRecord(name="transformers", reproducible=True)
    assert StoreManifest.model_validate(written) == store.manifest()
    assert "engine" not in RolloutSection(engine="transformers").decisive()
    assert RolloutSection(engine="constant").decisive()["engine"] == "constant"
    assert identity("rollout", {"rollout": RolloutSection().decisive()}, {}) == "83c51e7dceee914f"


@pytest.mark.slow
def test_an_entry_is_all_that_a_new_engine_needs(smoke, tmp_path):
    changes = {"rollout.engine": "constant", "distill.lmbda": 0.5, "distill.refresh_every": 2, "distill.steps": 4}
    run = open_run(build_preset(smoke.model_dump(), changes, "test"), tmp_path)
    report = pipeline.distill(*run)
    assert report.steps == 4
    assert Constant.loaded == [0, 0, 2]  # the teacher's store, then two intervals
    live = RolloutStore(run[0].paths.variant(report.variant).rollouts)
    assert {rollout.completion_ids[0] for rollout in live.read()} == {7}
    assert live.manifest().engine.name == "constant"
    assert live.manifest().engine == EngineRecord(name="constant", reproducible=False)
    assert {line["rollout/constant"] for line in read_metrics(run[0].paths.variant(report.variant).metrics)} == {7.0}
    assert Constant.closed == [True, True]
