"""report.html: well-formed, complete, in need of nothing else, and never fooled by what it shows."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import answers, evaluated, make_run

from kdctl.report.columns import Results
from kdctl.report.document import Report, make_report
from kdctl.report.figure_files import write_figures
from kdctl.report.figures import figures
from kdctl.report.page import inline, page
from kdctl.report.study_reader import read_study

EVIL = "<img src=x onerror=alert(1)>&\"'$x$"
DRAWN = ("grid", "cost")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects elements and text, and checks that elements close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def written(report: Report, folder: Path) -> str:
    return page(report, write_figures(figures(report.results), folder))


@pytest.fixture(scope="session")
def full_report(full: Results) -> Report:
    return make_report(full.study, 0.005)


@pytest.fixture(scope="session")
def full_page(full_report: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    charts = [chart for chart in figures(full_report.results) if chart.name in DRAWN]
    return page(full_report, write_figures(charts, tmp_path_factory.mktemp("figures")))


def test_it_refers_to_nothing_outside_itself(full_page: str) -> None:
    reader = Reader(full_page)
    ids = {attributes["id"] for _, attributes in reader.elements if "id" in attributes}
    for tag, attributes in reader.elements:
        assert "src" not in attributes
        assert tag not in ("link", "img", "iframe", "object", "image")
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or (target.startswith("#") and target[1:] in ids)
    assert "url(http" not in full_page
    assert "@import" not in full_page


def test_ids_are_unique_and_labels_exist(full_page: str) -> None:
    reader = Reader(full_page)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [attributes["aria-labelledby"] for _, attributes in reader.elements if "aria-labelledby" in attributes]
    assert set(labels) <= set(ids)


def test_it_can_be_read_without_eyes(full_page: str) -> None:
    reader = Reader(full_page)
    assert len(reader.all("html")) == len(reader.all("h1")) == len(reader.all("main")) == 1
    assert reader.all("html")[0]["lang"] == "en"
    assert all("scope" in attributes for attributes in reader.all("th"))
    sortable = [attributes for attributes in reader.all("table") if attributes.get("class") == "sortable"]
    assert len(reader.all("caption")) == len(sortable) > 5
    assert len(reader.all("svg")) == len(reader.all("figcaption")) == len(DRAWN)
    assert all(attributes["role"] == "img" for attributes in reader.all("svg"))
    assert "prefers-color-scheme: dark" in full_page


def test_verdicts_go_first_and_everything_is_there(full_report: Report, full_page: str) -> None:
    reader = Reader(full_page)
    text = "".join(reader.text)
    assert full_page.index('<h2 id="verdicts"') < full_page.index("<table") < full_page.index("<svg")
    for verdict in full_report.verdicts:
        assert verdict.replace("**", "") in text
    for table in full_report.tables:
        assert table.title in text
    model = full_report.study.models[-1]
    assert model.result is not None
    assert model.distilled is not None
    assert all(one in text for one in (model.result.weights, model.distilled.student, "distill.weight_decay"))
    assert "kdctl eval --run NEW" in text


def test_the_columns_that_people_compare_are_in_sight_and_all_others_a_click_away(full_page: str) -> None:
    results = full_page[full_page.index('<h2 id="results"') : full_page.index('<h2 id="figures"')]
    in_sight = re.sub(r"(?s)<details>.*?</details>", "", results)
    (main,) = re.findall(r'(?s)id="table-main".*?<thead>(.*?)</thead>', in_sight)
    assert re.findall(r"<th[^>]*>(.*?)</th>", main) == ["model", "KL to teacher [95 %]", "average", "verdict", "MiB"]
    assert all(f'id="table-{name}"' in in_sight for name in ("main", "lambda", "beta", "lr", "mixed"))
    (folded,) = re.findall(
        r'(?s)<details><summary>All columns</summary>(?:(?!</details>).)*id="table-main-all".*?</table>', results
    )
    assert all(f">{label}</th>" in folded for label in ("model", "alpha", "beta", "perplexity", "average against PTQ"))


def test_values_that_tables_sort_by_are_the_full_ones(full_report: Report, full_page: str) -> None:
    found = [attributes.get("data-value") for attributes in Reader(full_page).all("td")]
    values = [cell.value for table in full_report.layouts for row in table.rows for cell in row[1:]]
    assert {str(value) for value in values if value is not None} <= set(found)


def test_names_are_never_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / f"run {EVIL}", {EVIL: {"steps": 2}})
    evaluated(run, EVIL, {task: answers(0.7, 2) for task in ("alpha", "beta")}, reference=None, settings={})
    text = written(make_report(read_study([run]), 0.005), tmp_path)
    reader = Reader(text)
    assert reader.all("img") == []
    assert not any("onerror" in attributes for _, attributes in reader.elements)
    assert "".join(reader.text).count(EVIL) > 10
    assert len(reader.all("script")) == 1


def test_a_study_without_figures_has_no_such_section(bare: Results) -> None:
    text = page(make_report(bare.study, 0.005), [])
    assert "Figures" not in "".join(Reader(text).text)
    assert "ptq" in text


def test_an_inlined_figure_keeps_its_ids_to_itself() -> None:
    svg = '<?xml?>\n<svg a="b"><metadata>\n<x/></metadata><g id="p" clip-path="url(#c)"/><use href="#m"/></svg>'
    start = '<svg role="img" aria-labelledby="figure-f" a="b">'
    assert inline(svg, "f") == f'{start}<g id="f-p" clip-path="url(#f-c)"/><use href="#f-m"/></svg>'
