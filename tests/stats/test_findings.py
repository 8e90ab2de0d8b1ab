"""Findings are closed, frozen, and equal after a trip through JSON."""

import numpy as np
import pytest
from pydantic import ValidationError

from kdctl import stats
from kdctl.run.records import Record

ANSWERS = np.random.default_rng(0).random((3, 200)) < np.array([[0.9], [0.5], [0.8]])
FOUND = [
    stats.accuracy(ANSWERS[0]),
    stats.accuracy(ANSWERS[0], ["only"] * 200),
    stats.compare(stats.Paired(ANSWERS[1], ANSWERS[0])),
    stats.seeds(ANSWERS),
    stats.seeds(ANSWERS[:1]),
    stats.compare_seeds(ANSWERS[:1], ANSWERS),
    stats.recovery(ANSWERS[2], ANSWERS[1], ANSWERS[0]),
    stats.recovery(ANSWERS[2], ANSWERS[1], ANSWERS[1]),
]


@pytest.mark.parametrize("record", FOUND, ids=lambda record: type(record).__name__)
def test_findings_read_back_equal(record: Record) -> None:
    assert type(record).model_validate_json(record.model_dump_json()) == record


def test_findings_are_closed() -> None:
    with pytest.raises(ValidationError):
        stats.accuracy([1, 0]).model_copy().items = 3
