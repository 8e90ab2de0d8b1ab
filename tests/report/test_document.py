"""report.md and report.json: whole, in order, and equal in what they say."""

import json
from pathlib import Path

from made_up import make_run, quantized

from kdctl.report.document import as_json, as_markdown, make_report
from kdctl.report.study_reader import read_study
from kdctl.run.paths import RunDir


def test_verdicts_go_first_and_commands_last(tmp_path: Path) -> None:
    text = as_markdown(make_report(read_study([make_run(tmp_path / "run", {"v": {}})]), 0.005))
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Verdicts", "## Results", "## Behind the verdicts", "## Settings", "## To reproduce"]
    assert text.count("```") == 2
    table = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ptq")]
    assert all(line.endswith("|") for line in table)


def test_json_holds_every_record_and_comparison(tmp_path: Path) -> None:
    report = make_report(read_study([make_run(tmp_path / "run", {"v": {"share": 0.75}})]), 0.01)
    found = json.loads(as_json(report))
    assert (found["margin"], found["verdicts"]) == (0.01, report.verdicts)
    assert [model["name"] for model in found["models"]] == ["teacher", "ptq", "v"]
    assert found["models"][2]["distilled"]["variant"] == found["models"][2]["result"]["model"] == "v"
    names = {(one["model"], one["baseline"], tuple(one["tasks"])) for one in found["comparisons"]}
    assert len(names) == len(found["comparisons"]) == 9
    assert all({"bootstrap", "p_mcnemar", "p_holm", "mde"} <= one.keys() for one in found["comparisons"])
    assert [table["name"] for table in found["tables"]] == [table.name for table in report.tables]


def test_a_folder_with_nothing_but_a_student_has_a_report(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    quantized(run.student, 0.4)
    text = as_markdown(make_report(read_study([run]), 0.005))
    assert "**ptq**: Not evaluated on any task yet" in text
    assert "Behind" not in text
