"""Results to tables: one row a model, honest averages, the best student in bold."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from kdctl.errors import PresetError, StoreError
from kdctl.records import (
    DistillReport,
    DistributionMetrics,
    Estimate,
    EvalResult,
    LayerError,
    QuantizeReport,
    TaskScore,
    TextMetrics,
    Versions,
)
from kdctl.report import ABSENT, read_rows, write_report
from kdctl.rundir import RunDir, write_record

VERSIONS = Versions(kdctl="0", torch="0", transformers="0", compressed_tensors="0", hqq="0")
FOLDER: dict[str, Any] = {
    "identity": "a" * 16,
    "teacher": "t",
    "bits": 4,
    "group_size": 32,
    "symmetric": False,
    "method": "hqq",
}
TASKS = {"arc_easy_offline": (0.5, 0.03), "mmlu_offline": (0.7, 0.04)}


def around(value: float) -> Estimate:
    return Estimate(value=value, low=value * 0.9, high=value * 1.1)


def distribution(kl: float, perplexity: float = 10.0) -> DistributionMetrics:
    return DistributionMetrics(
        forward_kl=around(kl),
        reverse_kl=around(2 * kl),
        top1_agreement=around(0.5),
        perplexity=around(perplexity),
        teacher_perplexity=9.0,
        documents=4,
        tokens=100,
    )


def text(perplexity: float) -> TextMetrics:
    return TextMetrics(perplexity=around(perplexity), tokens=100, documents=4)


def evaluated(run: RunDir, model: str, tasks: dict[str, tuple[float, float]], kl: float = 0.1, **fields: Any) -> None:
    """Write a model's results.json."""
    scores = {
        name: TaskScore(
            version="1", metric="acc", value=value, stderr=error, items=100, num_fewshot=0, metrics={"acc": value}
        )
        for name, (value, error) in tasks.items()
    }
    values = {
        "model": model,
        "identity": "b" * 16,
        "weights": "w",
        "limit": None,
        "tasks": scores,
        "distribution": distribution(kl, fields.pop("perplexity", 10.0)),
        "text": text(fields.pop("text_perplexity", 20.0)),
        "size_bytes": 2**20,
        "seconds_s": 1.0,
        "versions": VERSIONS,
    }
    write_record(run.eval(model) / "results.json", EvalResult.model_validate(values | fields))


def quantized(folder: Path, kl: float) -> None:
    """Write a student folder's quantize.json."""
    record = QuantizeReport(
        **FOLDER,
        skip=(),
        teacher_bytes=4 * 2**20,
        student_bytes=3 * 2**20,
        quantized_parameters=10,
        other_parameters=5,
        layers=(LayerError(name="a", relative_error=0.1, sqnr_db=20.0),),
        yardstick="y",
        distribution=distribution(kl),
        text=text(21.0),
        teacher_text=text(19.0),
        seconds_s=1.0,
        versions=VERSIONS,
    )
    write_record(folder / "quantize.json", record)


def distilled(run: RunDir, name: str, kl: float, **settings: Any) -> None:
    """Write a finished variant's distill.json and final/quantize.json."""
    variant = run.variant(name)
    quantized(variant.final, kl)
    record = DistillReport(
        **FOLDER,
        variant=name,
        settings={"lmbda": 1.0, "beta": 0.5, "lr": 2e-5, "seed": 0} | settings,
        student="s",
        stores={},
        before=distribution(0.2),
        after=distribution(kl),
        removed=around(0.5),
        final_loss=0.1,
        steps=1,
        train_seconds_s=1.0,
        step_seconds_median_s=1.0,
        completion_tokens_trained=10,
        versions=VERSIONS,
    )
    write_record(variant.report, record)


def table(markdown: str) -> list[dict[str, str]]:
    """Parse a Markdown table to one dictionary a row."""
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return [dict(zip(header, row, strict=True)) for row in body]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return a run folder with a teacher, the PTQ student and two variants, all evaluated."""
    run = RunDir(tmp_path / "run")
    for name in ("zeta", "alpha"):
        distilled(run, name, 0.05)
        evaluated(run, name, TASKS, kl=0.05, settings={"lmbda": 1.0, "beta": 0.5, "lr": 2e-5, "seed": 0})
    evaluated(run, "ptq", TASKS, kl=0.2)
    evaluated(run, "teacher", TASKS, kl=0.0)
    return run


def test_rows_are_teacher_ptq_and_variants_in_this_order(run: RunDir) -> None:
    assert [row.model for row in read_rows(run)] == ["teacher", "ptq", "alpha", "zeta"]
    assert [row["model"] for row in table(write_report(run))] == ["teacher", "ptq", "alpha", "zeta"]


def test_cells_show_percent_with_one_standard_error(run: RunDir) -> None:
    teacher, _, alpha, _ = table(write_report(run))
    assert teacher["arc_easy"] == "50.0 ± 3.0"
    assert teacher["mmlu"] == "70.0 ± 4.0"
    assert teacher["average"] == "60.0 ± 2.5"  # √(0.03² + 0.04²) / 2 = 0.025
    assert (alpha["λ"], alpha["β"], alpha["lr"]) == ("1", "0.5", "2e-05")
    assert alpha["KL to teacher [95 %]"].strip("*") == "0.0500 [0.0450, 0.0550]"


def test_what_a_row_has_not_is_marked_absent(run: RunDir) -> None:
    distilled(run, "beta", 0.04)
    teacher, ptq, alpha, beta, _ = table(write_report(run))
    assert teacher["KL to teacher [95 %]"] == ABSENT
    assert (teacher["λ"], ptq["β"], ptq["lr"]) == (ABSENT, ABSENT, ABSENT)
    assert (beta["arc_easy"], beta["mmlu"], beta["average"]) == (ABSENT, ABSENT, ABSENT)
    assert ABSENT not in alpha.values()


def test_an_average_over_other_tasks_is_not_shown(run: RunDir) -> None:
    evaluated(run, "ptq", {"arc_easy_offline": (0.99, 0.01)})
    _, ptq, alpha, _ = table(write_report(run))
    assert ptq["arc_easy"] == "**99.0 ± 1.0**"
    assert (ptq["mmlu"], ptq["average"]) == (ABSENT, ABSENT)
    assert alpha["average"] == "**60.0 ± 2.5**"


COLUMNS = ("arc_easy", "mmlu", "average", "KL to teacher [95 %]", "perplexity", "text perplexity")


@pytest.mark.parametrize("best", ["ptq", "alpha", "zeta"])
def test_the_best_student_is_bold_in_every_column_and_no_other_row(run: RunDir, best: str) -> None:
    better = {name: (value + 0.1, error) for name, (value, error) in TASKS.items()}
    evaluated(run, best, better, kl=0.01, perplexity=5.0, text_perplexity=6.0)
    evaluated(run, "teacher", dict.fromkeys(TASKS, (1.0, 0.0)), kl=0.0, perplexity=1.0, text_perplexity=1.0)
    for row in table(write_report(run)):
        bold = {name for name, cell in row.items() if cell.startswith("**")}
        assert bold == (set(COLUMNS) if row["model"] == best else set())


def test_equal_bests_are_all_bold(run: RunDir) -> None:
    bold = {row["model"]: row["arc_easy"].startswith("**") for row in table(write_report(run))}
    assert bold == {"teacher": False, "ptq": True, "alpha": True, "zeta": True}
    kl = {row["model"]: row["KL to teacher [95 %]"].startswith("**") for row in table(write_report(run))}
    assert kl == {"teacher": False, "ptq": False, "alpha": True, "zeta": True}


def test_csv_holds_one_full_precision_number_a_cell(run: RunDir) -> None:
    evaluated(run, "alpha", {"arc_easy_offline": (1 / 3, 0.1 / 3), "mmlu_offline": (2 / 7, 0.01)}, kl=1 / 7)
    rows = list(csv.DictReader(io.StringIO(write_report(run, "csv"))))
    assert [row["model"] for row in rows] == ["teacher", "ptq", "alpha", "zeta"]
    alpha = rows[2]
    assert float(alpha["arc_easy_offline"]) == 1 / 3
    assert float(alpha["arc_easy_offline_stderr"]) == 0.1 / 3
    assert float(alpha["average"]) == pytest.approx((1 / 3 + 2 / 7) / 2, rel=1e-15)
    assert float(alpha["average_stderr"]) == pytest.approx(math.sqrt((0.1 / 3) ** 2 + 0.01**2) / 2, rel=1e-15)
    assert float(alpha["forward_kl"]) == 1 / 7
    assert rows[0]["forward_kl"] == ""


def test_json_holds_the_same_numbers_as_csv(run: RunDir) -> None:
    distilled(run, "beta", 0.04)
    rows = json.loads(write_report(run, "json"))
    flat = list(csv.DictReader(io.StringIO(write_report(run, "csv"))))
    assert [list(row) for row in rows] == [list(row) for row in flat]
    for row, cells in zip(rows, flat, strict=True):
        assert {key: "" if value is None else str(value) for key, value in row.items()} == cells


def test_before_evaluation_rows_come_from_quantize_and_distill(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    quantized(run.student, 0.2)
    assert [row["model"] for row in table(write_report(run))] == ["ptq"]
    distilled(run, "v", 0.1, lmbda=0.25)
    ptq, variant = table(write_report(run))
    assert ptq["KL to teacher [95 %]"] == "0.2000 [0.1800, 0.2200]"
    assert variant["KL to teacher [95 %]"] == "**0.1000 [0.0900, 0.1100]**"
    assert (variant["λ"], variant["MiB"]) == ("0.25", "3.0")
    assert "average" not in variant


def test_an_evaluation_takes_the_place_of_what_quantize_measured(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    quantized(run.student, 0.2)
    evaluated(run, "ptq", TASKS, kl=0.3)
    (row,) = read_rows(run)
    assert row.forward_kl == around(0.3)
    assert row.tasks == TASKS


def test_an_unfinished_variant_has_no_row(run: RunDir) -> None:
    quantized(run.variant("unfinished").final, 0.1)
    assert "unfinished" not in [row.model for row in read_rows(run)]


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_folder_has_no_report(tmp_path: Path, made: bool) -> None:
    run = RunDir(tmp_path / "run")
    if made:
        run.prepare()
    with pytest.raises(StoreError, match="has no results yet"):
        write_report(run)
    assert run.path.exists() == made
    assert not run.report.exists()


def test_an_unknown_form_is_refused_before_anything_is_written(run: RunDir) -> None:
    with pytest.raises(PresetError, match=r"'html'.*markdown, csv, json"):
        write_report(run, "html")
    assert not run.report.exists()


@pytest.mark.parametrize("form", ["markdown", "csv", "json"])
def test_every_form_leaves_the_same_files(run: RunDir, form: str) -> None:
    write_report(run, form)
    assert (run.report / "report.md").read_text() == write_report(run, "markdown")
    assert (run.report / "tables" / "main.csv").read_text() == write_report(run, "csv")


def test_an_unchanged_report_is_not_written_again(run: RunDir) -> None:
    write_report(run)
    files = [path for path in run.report.rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    write_report(run)
    assert [path.stat().st_mtime_ns for path in files] == before
    evaluated(run, "ptq", TASKS, kl=0.3)
    write_report(run)
    assert "0.3000" in (run.report / "report.md").read_text()


def test_a_damaged_result_is_refused_by_path(run: RunDir) -> None:
    (run.eval("ptq") / "results.json").write_text("{")
    with pytest.raises(StoreError, match=r"ptq/results\.json is damaged"):
        write_report(run)
