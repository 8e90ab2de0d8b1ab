"""Tasks over whole documents: fewer bits per byte are better, in every table and sentence."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import DOCUMENTS, make_run, rolled

from kdctl.base.errors import DataError
from kdctl.report.bits import rolling
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts, per_byte
from kdctl.report.effects import effects
from kdctl.report.layouts import lay_out
from kdctl.report.short import headlines, shortened
from kdctl.report.study_reader import read_study
from kdctl.report.tables import Cell
from kdctl.report.verdicts import sentences
from kdctl.run.documents import whole_bits
from kdctl.run.paths import RunDir

SHIFT = {"teacher": 0.0, "ptq": 0.5, "near": 0.2, "far": 0.9}
VARIANTS = {"near": {"lr": 1e-5}, "far": {"lr": 2e-5}}


def made(folder: Path, tasks: tuple[str, ...] = ("alpha", "beta")) -> RunDir:
    run = make_run(folder / "run", VARIANTS, tasks)
    for name, shift in SHIFT.items():
        rolled(run, name, shift)
    return run


def results_of(run: RunDir) -> Results:
    return Results(read_study([run]), Contrasts(0.005))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Make a folder whose students are all worse than the teacher, ``near`` less and ``far`` more than PTQ."""
    return made(tmp_path_factory.mktemp("rolling"))


@pytest.fixture(scope="module")
def results(run: RunDir) -> Results:
    return results_of(run)


def bits(run: RunDir, name: str) -> tuple[np.ndarray, np.ndarray]:
    return whole_bits(pq.read_table(run.samples(name, "pages")).sort_by("item_id"))


def test_the_table_has_ratios_of_sums_and_their_paired_differences(run: RunDir, results: Results) -> None:
    rows = {row[0].value: row for row in rolling(results).rows}
    totals = {name: sum(bits(run, name)[0]) / sum(bits(run, name)[1]) for name in SHIFT}
    for name, total in totals.items():
        model = next(one for one in results.study.models if one.name == name)
        assert rows[name][2].value == pytest.approx(total)
        assert model.rolling["pages"].value == pytest.approx(total)
        assert model.result is not None
        assert rows[name][6].value == model.result.tasks["pages"].metrics["word_perplexity"]
        if name != "teacher":
            assert rows[name][4].value == pytest.approx(total - totals["teacher"])
    assert rows["near"][3].value == pytest.approx(totals["near"] - totals["ptq"])
    assert rows["near"][3].value < 0 < rows["far"][3].value  # pyright: ignore[reportOperatorIssue]


def test_the_interval_of_a_difference_is_that_of_leaving_documents_out(run: RunDir, results: Results) -> None:
    rows = {row.name: row for row in results.rows}
    found = per_byte(rows["near"], "pages", rows["ptq"])
    (after, sizes), (before, _) = bits(run, "near"), bits(run, "ptq")
    gained = after - before
    left_out = (gained.sum() - gained) / (sizes.sum() - sizes)
    error = np.sqrt((DOCUMENTS - 1) * np.var(left_out))
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(2.0227 * error, rel=0.05)  # t with 39 degrees of freedom


def test_fewer_bits_are_marked_as_better_and_rank_first(results: Results) -> None:
    scale = next(one for one in results.scales if one.rolling == "pages")
    cells = results.ranked(results.rows, scale)
    assert cells["teacher"].marks == ()
    assert cells["ptq"].marks == ("T↓",)
    assert cells["near"].marks == ("P↑", "T↓")
    assert cells["far"].marks == ("P↓", "T↓")
    assert [name for name, cell in cells.items() if cell.bold] == ["near"]


def test_it_is_no_accuracy(tmp_path: Path, results: Results) -> None:
    assert results.tasks == ("alpha", "beta")
    without = results_of(make_run(tmp_path / "run", VARIANTS))
    accuracies = [one for one in without.scales if one.measure is None]
    kept = {scale.key: results.ranked(results.rows, scale) for scale in results.scales}
    assert [kept[scale.key] for scale in accuracies] == [without.ranked(without.rows, scale) for scale in accuracies]
    assert results.averages == without.averages
    assert results.single == without.single


def test_sentences_say_which_is_better(results: Results) -> None:
    said = {text.split("**")[1]: text for text in sentences(results)}
    number = r"[-+\d.]+"
    for name, words in (
        ("near", rf"less than the PTQ student's \({number} to {number}\), which is better"),
        ("far", rf"more than the PTQ student's \({number} to {number}\), which is worse"),
        ("near", rf"more than the teacher's \({number} to {number}\), which is worse"),
    ):
        assert re.search(words, said[name])
    told = {one.model: one.words for one in headlines(results)}
    for name, words in (("near", "less than PTQ's"), ("far", "more than PTQ's"), ("ptq", "more than the teacher's")):
        assert f"bits per byte of pages {_gap(results, name)} {words}" in told[name]


def _gap(results: Results, name: str) -> str:
    rows = {row.name: row for row in results.rows}
    found = per_byte(rows[name], "pages", rows["teacher" if name == "ptq" else "ptq"])
    assert found is not None
    return f"{abs(found.value):.4f}"


def test_what_a_setting_changes_names_the_better_one(results: Results) -> None:
    (table,) = [one for one in effects(results) if one.name == "effects_answers"]
    (row,) = [row for row in table.rows if row[2].value == "bits per byte, pages"]
    assert (row[0].value, row[-1].value) == ("lr 1e-05 → 2e-05", "worse")


def test_models_that_read_other_documents_are_not_compared(tmp_path: Path) -> None:
    run = made(tmp_path)
    rolled(run, "near", 0.2, prompt="other")
    with pytest.raises(DataError, match="near: pages: 40 of 40 items were asked with another prompt"):
        read_study([run])


def test_without_other_tasks_there_are_still_results(tmp_path: Path) -> None:
    results = results_of(made(tmp_path, ()))
    (main,) = lay_out("main", results.study, results.contrasts)
    assert [one.key for one in shortened(main, results).columns] == ["model", "forward_kl", "pages", "size_bytes"]
    assert not any("evaluated" in one.words for one in headlines(results))
    assert not any("evaluated" in text for text in sentences(results))


def test_what_cannot_be_told_apart_is_not_called_better(tmp_path: Path) -> None:
    run = made(tmp_path)
    rolled(run, "near", 0.5, noise=1)
    rolled(run, "far", 0.5, noise=2)
    results = results_of(run)
    scale = next(one for one in results.scales if one.rolling)
    cells = results.ranked(results.rows, scale)
    assert [cells[name].marks for name in ("near", "far")] == [("T↓", "≈")] * 2
    assert not any(cell.bold for cell in cells.values() if isinstance(cell, Cell))
    assert all("pages not distinguishable from PTQ's" in one.words for one in headlines(results)[1:])


def test_one_document_has_no_interval_and_decides_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", VARIANTS, ())
    for name, shift in SHIFT.items():
        rolled(run, name, shift, documents=1)
    said = " ".join(sentences(results_of(run)))
    assert "(one document has no interval)" in said
    assert "which one document does not tell from the PTQ student's" in said
    assert "inf" not in said


def test_seeds_that_differ_widen_the_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {f"v_seed{seed}": {"seed": seed} for seed in (0, 1)}, ())
    for name in ("teacher", "ptq"):
        rolled(run, name, SHIFT[name])
    widths = []
    for apart in (0.0, 0.1):
        for seed in (0, 1):
            rolled(run, f"v_seed{seed}", 0.3 + apart * seed)
        results = results_of(run)
        (both,) = [row for row in results.rows if len(row.models) == 2]
        found = per_byte(both, "pages")
        assert found is not None
        widths.append(found.high - found.low)
    assert widths[1] > 1.5 * widths[0]
