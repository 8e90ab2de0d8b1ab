"""Steps of decoding that are replayed from a recording draw what those that are started one by one draw."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kdctl.rollout import steps
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Prompt, Rollout
from tests.tally import Recorder

ITEMS = [(Prompt(str(n), n, list(range(40, 40 + n))), sample) for n in (2, 7, 20, 3, 11) for sample in range(2)]
NUCLEUS = Sampling(0.8, 0.9, 40, 50, 9, 0)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Let a CPU record and replay; hand out what was recorded."""
    made: list[Callable[[], None]] = []

    def recorded(work: Callable[[], None]) -> Callable[[], None]:
        made.append(Recorder.record(work))
        return made[-1]

    monkeypatch.setattr(steps, "replays", lambda _: True)
    monkeypatch.setattr(steps, "no_waiting", nullcontext)
    monkeypatch.setattr(steps, "record", recorded)
    return made


def complete(model: PreTrainedModel, sampling: Sampling, size: int, said: list[str], **changes: Any) -> list[Rollout]:
    return InProcess(model, [258], "teacher", size, look=4, say=said.append, **changes).complete(ITEMS, sampling)


@pytest.mark.parametrize("sampling", [NUCLEUS, Sampling(0.0, 1.0, 0, 50, 0, 0)], ids=["nucleus", "greedy"])
@pytest.mark.parametrize("size", [3, 64])
def test_what_is_replayed_draws_the_same_tokens(
    teacher_fp32: PreTrainedModel, sampling: Sampling, size: int, request: pytest.FixtureRequest
) -> None:
    said: list[str] = []
    expected = complete(teacher_fp32, sampling, size, said)
    recordings = request.getfixturevalue("recordings")
    found = complete(teacher_fp32, sampling, size, said)
    assert len(recordings) == 1
    assert said == []
    for one, other in zip(found, expected, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_longer_span_has_a_recording_of_its_own(
    teacher_fp32: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(steps, "SPAN", 16)
    expected = complete(teacher_fp32, NUCLEUS, 64, [])
    recordings = request.getfixturevalue("recordings")
    assert [one.completion_ids for one in complete(teacher_fp32, NUCLEUS, 64, [])] == [
        one.completion_ids for one in expected
    ]
    assert len(recordings) == 4, "up to 32, 48, 64 and 70 tokens"


@pytest.mark.parametrize("failing", ["numbers", "recording"])
def test_what_cannot_be_replayed_is_said_once_and_done_one_by_one(
    teacher_fp32: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, failing: str
) -> None:
    expected = complete(teacher_fp32, NUCLEUS, 64, [])
    request.getfixturevalue("recordings")

    def other(_: Callable[[], None]) -> Callable[[], None]:
        if failing == "recording":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: None

    monkeypatch.setattr(steps, "record", other)
    said: list[str] = []
    found = complete(teacher_fp32, NUCLEUS, 64, said)
    assert [one.completion_ids for one in found] == [one.completion_ids for one in expected]
    (line,) = said
    assert line.startswith("each operator of generation is started by itself, which takes longer: ")
    assert line.endswith({"numbers": "gives other numbers", "recording": "when stream is capturing"}[failing])


def test_a_cpu_records_nothing(teacher_fp32: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "record", lambda _: pytest.fail("recorded"))
    assert complete(teacher_fp32, NUCLEUS, 64, [])
    assert not steps.replays(torch.zeros(1))
