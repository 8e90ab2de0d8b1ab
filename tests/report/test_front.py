"""What is written where, what is printed, and what is refused before anything is written."""

import json
import re
import time
from pathlib import Path
from threading import Thread

import pytest
from made_up import answers, evaluated, make_run

from kdctl.base.errors import DataError, PresetError, StoreError
from kdctl.config.preset import TrackingSection
from kdctl.report.front import table_format, write_report
from kdctl.report.tables import TableFormat
from kdctl.run.locks import holding, lock_of
from kdctl.run.paths import RunDir

FIGURES = ("minutes", "verdicts", "accuracy", "training", "recovery", "cost")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a folder with one variant."""
    return make_run(tmp_path_factory.mktemp("front") / "run", {"v": {}})


@pytest.mark.parametrize("form", ["markdown", "csv", "json", "latex", "html"])
def test_every_form_is_what_the_files_say(run: RunDir, form: TableFormat) -> None:
    found = write_report([run], figures=False)
    tables = found.text(form)
    assert tables.strip()
    kept = {"markdown": "report.md", "csv": "tables/main.csv"}
    if form in kept:
        assert tables.split("### ")[-1].strip() in (run.report / kept[form]).read_text()
    if form == "json":
        assert json.loads(tables)[0] == json.loads((run.report / "report.json").read_text())["tables"][0]


def test_a_report_is_these_files(run: RunDir) -> None:
    write_report([run])
    files = {path.relative_to(run.report).as_posix() for path in run.report.rglob("*") if path.is_file()}
    assert files == {
        "report.md",
        "report.json",
        "report.html",
        *(f"figures/{name}.{ending}" for name in FIGURES for ending in ("svg", "png")),
        *(f"tables/{name}.csv" for name in ("main", "comparisons", "distances", "recovery", "provenance")),
    }


def test_undrawn_reports_refer_to_nothing_drawn(run: RunDir, tmp_path: Path) -> None:
    drawn, bare = write_report([run]), write_report([run], out=tmp_path / "bare", figures=False)
    assert bare.text() == drawn.text()
    files = {path.relative_to(run.report) for path in run.report.rglob("*") if path.is_file()}
    left = {path.relative_to(tmp_path / "bare") for path in (tmp_path / "bare").rglob("*") if path.is_file()}
    assert left == {path for path in files if path.parts[0] != "figures"}
    for name in ("report.md", "report.html"):
        text = re.sub(r"(?s)<style>.*</style>", "", (tmp_path / "bare" / name).read_text())
        assert re.findall(r"[Ff]igure|svg", text) == []
        assert re.findall(r"[Ff]igure|svg", (run.report / name).read_text()) != []
    assert (tmp_path / "bare" / "report.json").read_text() == (run.report / "report.json").read_text()


def test_verdicts_are_printed_before_the_table_that_is_asked_for(run: RunDir) -> None:
    verdicts, table = write_report([run], figures=False).text().split("### All models")
    assert verdicts.startswith("**ptq**: ")
    assert table.strip() in (run.report / "report.md").read_text()


def test_figures_are_linked_and_on_the_page(run: RunDir) -> None:
    write_report([run])
    text = (run.report / "report.md").read_text()
    links = re.findall(r"!\[.+\]\((.+)\)", text)
    assert links == [f"figures/{name}.svg" for name in FIGURES]
    assert all((run.report / link).exists() for link in links)
    assert (run.report / "report.html").read_text().count("<svg") == len(FIGURES)


def test_an_unchanged_report_is_not_written_again(run: RunDir) -> None:
    write_report([run])
    files = [path for path in run.report.rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    write_report([run])
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "betas"}, r"'betas'.*main, lambda, beta, .*auto"),
        ({"layout": "beta"}, r"--layout beta needs two variants of different β"),
        ({"margin": 0.0}, r"--margin 0 .*nothing is equivalent within 0"),
        ({"margin": -0.01}, r"--margin -1 "),
        ({"margin": 1.0}, r"--margin 100 "),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path, options: dict, words: str) -> None:
    run = make_run(tmp_path / "run", {"v": {}}, ["alpha"])
    with pytest.raises(PresetError, match=words):
        write_report([run], **options)
    assert not run.report.exists()


def test_an_unknown_form_is_refused_with_those_that_are_known() -> None:
    assert table_format("csv") == "csv"
    with pytest.raises(PresetError, match=r"'xls'.*markdown, csv, json, latex, html"):
        table_format("xls")


def test_an_empty_folder_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no run folder; .* with --run .*/run first"):
        write_report([RunDir(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", [None, "else"])
def test_two_reports_at_once_are_made_one_after_the_other(tmp_path: Path, place: str | None) -> None:
    run, said = make_run(tmp_path / "run", {}, ["alpha"]), []
    out = tmp_path / place if place else None
    lock = lock_of(out) if out else run.lock("report")
    other = Thread(target=write_report, args=[[run]], kwargs={"out": out, "figures": False, "say": said.append})
    with holding(lock, "it", print):
        other.start()
        while not said:
            time.sleep(0.01)
        assert not (out or run.report).exists()
    other.join()
    assert (out or run.report / "report.json").exists()
    assert [f"at work on the report {out or run.report}" in text for text in said] == [True]
    assert not (tmp_path / ".locks").exists()


def test_a_place_that_holds_no_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/report", "broken"):
        with pytest.raises(PresetError, match="is no folder, and a report is a folder of files"):
            write_report([RunDir(tmp_path / "run")], out=tmp_path / place)


def test_a_damaged_result_is_refused_by_path(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    (run.eval("ptq") / "results.json").write_text("{")
    with pytest.raises(StoreError, match=r"ptq/results\.json is damaged"):
        write_report([run])


@pytest.mark.slow
def test_several_folders_are_joined_beside_the_first_or_where_asked(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "runs" / name, {f"v{name}": {}}, ["alpha"]) for name in ("a", "b")]
    text = write_report(folders, figures=False).text()
    assert all(f"| {name} |" in text for name in ("teacher", "ptq", "va", "vb"))
    assert (tmp_path / "runs" / "report" / "report.md").read_text().startswith("# Report on a, b\n")
    assert not folders[0].report.exists()
    write_report(folders, out=tmp_path / "else", figures=False)
    assert (tmp_path / "else" / "report.json").exists()


def test_folders_that_were_asked_otherwise_are_refused_with_the_differences(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, {}, ["alpha"]) for name in ("a", "b")]
    for name in ("teacher", "ptq"):
        evaluated(folders[1], name, {"alpha": answers(0.6)}, limit=30, num_fewshot=5, kl=0.1)
    with pytest.raises(DataError, match=r"a/teacher and b/teacher: alpha: num_fewshot 0 and 5"):
        write_report(folders)


@pytest.mark.slow
def test_wandb_gets_the_same_tables(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {}, ["alpha"])
    write_report([run], tracking=TrackingSection(wandb="offline"), figures=False)
    logged = list((tmp_path / "run" / "wandb").rglob("report/*.table.json"))
    assert {path.name.split("_")[0] for path in logged} >= {"main", "comparisons", "provenance"}
    main = json.loads(next(path for path in logged if path.name.startswith("main")).read_text())
    assert main["columns"][0] == "model"
    assert [row[0] for row in main["data"]] == ["teacher", "ptq"]
