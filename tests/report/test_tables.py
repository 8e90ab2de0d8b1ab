"""One table in five forms: the same numbers, each form well-formed by its own parser."""

import csv
import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from kdctl.report.tables import (
    ABSENT,
    Block,
    Cell,
    Column,
    Table,
    as_csv,
    as_html,
    as_json,
    escape_latex,
    latex,
    markdown,
    show,
    without_empty,
)

COLUMNS = (
    Column("model", "model"),
    Column("acc", "acc|uracy", "percent"),
    Column("kl", "KL <λ>", "kl"),
    Column("p", "p", "p"),
)
ROWS = (
    (Cell("a_b"), Cell(0.12345, error=0.01, bold=True, marks=("P↑", "T=")), Cell(), Cell(0.04)),
    (Cell("c & d"), Cell(), Cell(0.25, low=0.2, high=0.3), Cell(1e-9)),
)
TABLE = Table("name", "Title, 5 %", COLUMNS, (Block("λ = 0", ROWS[:1]), Block("λ = 1", ROWS[1:])), ("A note.",))


def test_cells_are_shown_with_their_uncertainty() -> None:
    assert show(ROWS[0][1], "percent") == "12.3 ± 1.0"
    assert show(ROWS[1][2], "kl") == "0.2500 [0.2000, 0.3000]"
    assert show(Cell(3.2e-5, low=0.0, high=1e-4), "kl") == "3.2e-5 [0.0000, 0.0001]"
    assert show(Cell(0.0213), "points") == "+2.13"
    assert show(Cell(3 * 2**20), "mib") == "3.0"
    assert show(Cell(1e-05), "number") == "1e-05"
    assert [show(Cell(p), "p") for p in (0.04, 1e-9)] == ["0.040", "<0.001"]
    assert show(Cell(), "percent") == ABSENT
    assert show(Cell("word"), "percent") == "word"


def test_markdown_has_as_many_cells_in_every_line() -> None:
    text = markdown([TABLE])
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}
    assert "| a_b | **12.3 ± 1.0** P↑ T= | – | 0.040 |" in text
    assert text.startswith("### Title, 5 %\n\n**λ = 0**\n")
    assert text.endswith("A note.\n")


def test_csv_and_json_hold_the_same_numbers_in_full() -> None:
    flat = list(csv.DictReader(io.StringIO(as_csv([TABLE]))))
    ((rows,), (name,)) = zip(*[(table["rows"], table["name"]) for table in json.loads(as_json([TABLE]))], strict=True)
    assert name == "name"
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == flat
    assert list(rows[0]) == ["block", "model", "acc", "acc_stderr", "acc_marks", "kl", "kl_low", "kl_high", "p"]
    assert (rows[0]["acc"], rows[1]["kl_high"]) == (0.12345, 0.3)


def test_html_is_well_formed_and_escaped() -> None:
    tree = ET.fromstring(f"<body>{as_html([TABLE])}</body>")
    cells = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr") if row[0].tag == "td"]
    assert cells == [["a_b", "12.3 ± 1.0P↑T=", ABSENT, "0.040"], ["c & d", ABSENT, "0.2500 [0.2000, 0.3000]", "<0.001"]]
    assert [one.text for one in tree.iter("strong")] == ["12.3 ± 1.0"]


def test_latex_is_balanced_and_only_ascii() -> None:
    text = latex([TABLE])
    assert text.isascii()
    assert text.count("{") == text.count("}")
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in body} == {3}
    assert r"a\_b & \textbf{12.3 $\pm$ 1.0}\textsuperscript{P$\uparrow$}\textsuperscript{T=} & -- & 0.040 \\" in text


@pytest.mark.parametrize("text", ["50 % & $x_1$ #{a}~^\\", "λ β ± ↑ ↓ ≈ − – ‖ < >"])
def test_everything_latex_would_take_for_a_command_is_escaped(text: str) -> None:
    escaped = escape_latex(text)
    assert escaped.isascii()
    for character in "%&#_":
        assert escaped.count(character) == escaped.count("\\" + character)


def test_empty_columns_are_dropped() -> None:
    bare = replace(TABLE, blocks=(Block("", ROWS[:1]),))
    assert [column.key for column in without_empty(bare).columns] == ["model", "acc", "p"]
    assert without_empty(TABLE) == TABLE
