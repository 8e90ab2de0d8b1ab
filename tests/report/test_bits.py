"""Bits per byte of right answers, from what evaluations keep."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import make_run

from kdctl.report.bits import bits
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.study_reader import read_study
from kdctl.report.tables import Cell, Table
from kdctl.run.paths import RunDir

SHIFT = {"teacher": 0.0, "ptq": 0.5, "v": 0.2}
ITEMS = 200


def said(run: RunDir, name: str, kept_bytes: bool) -> None:
    """Write likelihoods, those of right choices SHIFT nats lower than the teacher's; one item has no right choice."""
    drawn = np.random.default_rng(0)
    right, sizes = -drawn.uniform(1, 9, ITEMS) - SHIFT[name], drawn.integers(2, 30, ITEMS)
    path = run.samples(name, "alpha")
    table = pq.read_table(path).append_column("loglikelihoods", pa.array([[-1.0, value] for value in right]))
    table = table.append_column("lengths", pa.array([[3, int(size)] for size in sizes]))
    table = table.append_column("gold", pa.array([1] * (ITEMS - 1) + [-1]))
    if kept_bytes:
        table = table.append_column("bytes", pa.array([[3, int(size) + 1] for size in sizes]))
    pq.write_table(table, path)


def table_of(folder: Path, kept_bytes: bool) -> tuple[Table, RunDir]:
    run = make_run(folder / "run", {"v": {"share": 0.7}}, ("alpha",))
    for name in SHIFT:
        said(run, name, kept_bytes)
    return bits(Results(read_study([run]), Contrasts(0.005))), run


def differs(cell: Cell, sign: int) -> bool:
    return cell.low is not None and cell.high is not None and min(sign * cell.low, sign * cell.high) > 0


@pytest.mark.parametrize("kept_bytes", [True, False])
def test_bits_are_over_bytes_or_over_characters_where_none_were_kept(tmp_path: Path, kept_bytes: bool) -> None:
    table, run = table_of(tmp_path, kept_bytes)
    rows = {row[0].value: row for row in table.rows}
    found = pq.read_table(run.samples("teacher", "alpha")).to_pylist()[:-1]
    size = sum(row["bytes" if kept_bytes else "lengths"][1] for row in found)
    nats = {name: sum(shift - row["loglikelihoods"][1] for row in found) for name, shift in SHIFT.items()}
    for name, total in nats.items():
        assert rows[name][2].value == pytest.approx(total / math.log(2) / size)
    assert rows["v"][3].value == pytest.approx((nats["v"] - nats["ptq"]) / math.log(2) / size)
    assert rows["v"][4].value == pytest.approx((nats["v"] - nats["teacher"]) / math.log(2) / size)
    assert differs(rows["v"][3], -1)
    assert differs(rows["v"][4], 1)
    assert rows["teacher"][3].value is None


def test_without_likelihoods_there_is_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}}, ("alpha",))
    assert bits(Results(read_study([run]), Contrasts(0.005))).rows == []
