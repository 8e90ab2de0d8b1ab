"""Layouts: one setting varied and all others equal, and the tables of the published study from its numbers.

``published_study.json``: results of https://github.com/tom-pollak/on-policy-quantization, README.md and
training_log.md, as published: accuracies without items or errors.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from made_up import compared, distribution, edit, evaluated, make_run, wrote_rollouts

from kdctl.base.errors import PresetError
from kdctl.report.contrasts import Contrasts, rows_of
from kdctl.report.layouts import LAYOUTS, NO_ITEMS, lay_out
from kdctl.report.marks import kl_mark
from kdctl.report.study import Model, Score, Settings, Study
from kdctl.report.study_reader import read_study
from kdctl.report.tables import Table, markdown, records
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import EvalResult, MethodResult

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_study.json").read_text())
FIELDS = {"learning_rate": "lr", "lmbda": "lmbda", "beta": "beta", "steps": "steps", "batch_size": "batch_size"}
FIELDS |= {"max_new_tokens": "max_new_tokens"}


def table_of(layout: str, study: Study) -> Table:
    (table,) = lay_out(layout, study, Contrasts(0.005))
    return table


def blocks(table: Table) -> dict[str, list[Any]]:
    """Return the first column of every block."""
    return {block.heading: [row[0].value for row in block.rows] for block in table.blocks}


# --- run folders ------------------------------------------------------------------------------------------------------


def test_a_sweep_varies_one_setting_and_keeps_the_others_apart(tmp_path: Path) -> None:
    variants = {f"b{beta}l{share}": {"beta": beta, "lmbda": share} for beta in (1.0, 0.0) for share in (0.0, 1.0)}
    study = read_study([make_run(tmp_path / "run", variants | {"other": {"beta": 0.3, "lr": 1.0}})])
    assert blocks(table_of("beta", study)) == {"λ = 0": [0.0, 1.0], "λ = 1": [0.0, 1.0]}
    assert blocks(table_of("lambda", study)) == {"β = 0": [0.0, 1.0], "β = 1": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("layout", "first", "second", "values"),
    [
        ("lr", {"lr": 1e-3}, {"lr": 1e-5}, [1e-5, 1e-3]),
        ("steps", {"steps": 20}, {"steps": 10}, [10, 20]),
        ("batch-size", {"micro_batch_size": 2, "gradient_accumulation": 8}, {"micro_batch_size": 8}, [8, 16]),
        ("rank", {"train": "lora", "lora_rank": 4}, {"train": "lora", "lora_rank": 2}, [2, 4]),
    ],
)
def test_every_sweep_is_sorted_by_what_varies(
    tmp_path: Path, layout: str, first: dict, second: dict, values: list
) -> None:
    study = read_study([make_run(tmp_path / "run", {"a": first, "b": second})])
    assert blocks(table_of(layout, study)) == {"λ = 0": values}


def test_rollout_length_is_read_from_the_stores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"lmbda": 1.0}, "b": {"lmbda": 1.0}})
    wrote_rollouts(run.variant("a").rollouts, 64)
    wrote_rollouts(run.variant("b").rollouts, 32)
    assert blocks(table_of("rollout-length", read_study([run]))) == {"λ = 1": [32, 64]}


def test_steps_come_with_the_training_loss(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {"a": {"steps": 10}, "b": {"steps": 1}})])
    assert [row["train_loss"] for row in records(table_of("steps", study))] == [1.0, 0.1]


def test_mixed_is_everything_between(tmp_path: Path) -> None:
    variants = {"a": {"lmbda": 0.5}, "b": {"lmbda": 0.25, "beta": 1.0}, "c": {"lmbda": 1.0}}
    assert blocks(table_of("mixed", read_study([make_run(tmp_path / "run", variants)]))) == {"": ["a", "b"]}


def test_methods_are_those_of_joined_folders_or_of_a_comparison(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", {}), make_run(tmp_path / "b", {})
    report = second.student / "quantize.json"
    edit(report, method="gptq")
    items = {task: read_study([second]).models[1].items(task).values for task in ("alpha", "beta")}  # type: ignore
    evaluated(second, "ptq", items, kl=0.3, weights="another")
    assert [row["method"] for row in records(table_of("method", read_study([first, second])))] == ["hqq", "gptq"]
    found = read_study([first]).models[1].quantized
    assert found is not None
    shared = {name: value for name, value in found.model_dump().items() if name in MethodResult.model_fields}
    for name in ("minmax", "hqq"):
        result = MethodResult.model_validate(shared | {"method": name, "sqnr_db": 20.0})
        write_record(first.compared(name), result)
    assert [row["method"] for row in records(table_of("method", read_study([first])))] == ["hqq", "minmax"]


def test_auto_is_what_can_be_filled(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {"a": {"lr": 1.0}, "b": {"lr": 2.0}, "c": {"lmbda": 0.5}})])
    assert [table.name for table in lay_out("auto", study, Contrasts(0.005))] == ["main", "lr", "mixed"]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "main"])
def test_a_layout_that_cannot_be_filled_is_refused_with_those_that_can(tmp_path: Path, layout: str) -> None:
    study = read_study([make_run(tmp_path / "run", {"a": {}})])
    with pytest.raises(PresetError, match=rf"--layout {layout} needs .* can be filled: main$") as caught:
        lay_out(layout, study, Contrasts(0.005))
    assert ("kdctl distill can train" in str(caught.value)) == (layout not in ("method", "minutes"))


def test_minutes_stand_beside_what_is_left_of_the_compared_methods_kl(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {}})
    edit(run.student / "quantize.json", method="kl", seconds_s=240.0)
    edit(run.variant("a").report, train_seconds_s=60.0)
    for method, seconds in (("minmax", 6.0), ("gptq", 90.0)):
        compared(run, method, seconds)
    table = table_of("minutes", study := read_study([run]))
    kl = {row.name: mark.value for row in rows_of(study) if (mark := kl_mark(row))}
    gptq = next(one for one in study.sources[0].methods if one.method == "gptq").distribution.forward_kl.value
    assert [[cell.value for cell in row] for row in table.rows] == [
        ["minmax", 6.0, gptq, 0.0],
        ["gptq", 90.0, gptq, None],
        ["PTQ student (kl)", 240.0, kl["ptq"], 1 - kl["ptq"] / gptq],
        ["a", 300.0, kl["a"], 1 - kl["a"] / gptq],
    ]


def test_seeds_are_one_row_of_a_sweep(tmp_path: Path) -> None:
    variants = {f"lr{lr}_seed{seed}": {"lr": lr, "seed": seed, "draw": seed} for lr in (1.0, 2.0) for seed in (0, 1)}
    table = table_of("lr", read_study([make_run(tmp_path / "run", variants)]))
    assert blocks(table) == {"λ = 0": [1.0, 2.0]}
    assert any("several seeds" in note for note in table.notes)


def test_kl_on_what_a_student_wrote_itself_has_a_column_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {}})
    assert "student_written_kl" not in [column.key for column in table_of("main", read_study([run])).columns]
    for name, kl in (("teacher", 0.0), ("ptq", 0.7), ("a", 0.3)):
        path = run.eval(name) / "results.json"
        found = read_record(path, EvalResult)
        write_record(path, found.model_copy(update={"student_written": distribution(kl)}))
    table = table_of("main", read_study([run]))
    place = [column.key for column in table.columns].index("student_written_kl")
    cells = [row[place] for block in table.blocks for row in block.rows]
    assert [cell.value for cell in cells] == [None, 0.7, 0.3]
    assert cells[2].low == pytest.approx(0.27)
    assert "0.3000 [0.2700, 0.3300]" in markdown([table])


def test_the_legend_states_margin_and_correction(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {"a": {}})])
    notes = " ".join(lay_out("main", study, Contrasts(0.02))[0].notes)
    assert "±2 points" in notes
    assert "3 comparisons of averages" in notes  # a and ptq against the teacher, a against ptq
    assert "6 of single tasks" in notes
    assert "one seed" in notes


# --- the published study ----------------------------------------------------------------------------------------------


def fact(entry: dict[str, Any], **known: Any) -> Model:
    """Make a model of one published line."""
    settings = known | {FIELDS[key]: value for key, value in entry.items() if key in FIELDS}
    scores = {task: Score(value) for task, value in entry["acc"].items()}
    kind = "teacher" if entry.get("kind") == "teacher" else "variant"
    return Model(entry["name"], kind, Settings(**settings), scores, train_loss=entry.get("train_loss"))


def published(name: str) -> list[Model]:
    part = PUBLISHED[name]
    if isinstance(part, list):
        return [fact(entry) for entry in part]
    return [
        fact(entry | {"name": f"{share} {entry['name']}"}, lmbda=float(share))
        for share in part
        for entry in part[share]
    ]


def reproduced(table: Table, entries: list[dict[str, Any]]) -> None:
    """Check that a table's rows are the published ones, number by number and as printed."""
    rows = records(table)
    assert len(rows) == len(entries)
    for row, entry in zip(rows, entries, strict=True):
        assert {task: row[task] for task in entry["acc"]} == entry["acc"]
        assert row["average"] == pytest.approx(sum(entry["acc"].values()) / 5)
        line = " | ".join(f"{100 * value:.1f}" for value in entry["acc"].values())
        assert line in markdown([table])
    assert not any(cell.bold or cell.marks for row in table.rows for cell in row)
    assert any(NO_ITEMS in note for note in table.notes)


def test_the_published_main_table_is_reproduced_and_concludes_nothing() -> None:
    table = table_of("main", Study(tuple(published("main"))))
    reproduced(table, PUBLISHED["main"])
    rows = records(table)
    assert [row["average"] for row in rows] == [pytest.approx(entry["avg"], abs=6e-4) for entry in PUBLISHED["main"]]
    assert [row["lmbda"] for row in rows] == [None, 0, 0.5, 1]
    assert [row["verdict_teacher"] for row in rows] == [None, NO_ITEMS, NO_ITEMS, NO_ITEMS]


@pytest.mark.parametrize(
    ("layout", "name"),
    [("steps", "steps"), ("batch-size", "batch_size"), ("rollout-length", "rollout_length"), ("mixed", "mixed")],
)
def test_published_lists_are_reproduced(layout: str, name: str) -> None:
    table = table_of(layout, Study(tuple(published(name))))
    reproduced(table, PUBLISHED[name])
    assert len(table.blocks) == 1
    if layout == "steps":
        assert [row["train_loss"] for row in records(table)] == [0.118, 0.068]


@pytest.mark.parametrize("layout", ["beta", "lr"])
def test_published_sweeps_are_reproduced_one_block_a_lambda(layout: str) -> None:
    table = table_of(layout, Study(tuple(published(layout))))
    assert [block.heading for block in table.blocks] == ["λ = 0", "λ = 1"]
    reproduced(table, [entry for share in PUBLISHED[layout] for entry in PUBLISHED[layout][share]])


def test_the_published_lambdas_at_equal_beta_are_found() -> None:
    study = Study(tuple(published("beta") + published("mixed")))
    assert blocks(table_of("lambda", study)) == {"β = 0": [0, 0.5, 1], "β = 0.5": [0, 1], "β = 1": [0, 0.5, 1]}
