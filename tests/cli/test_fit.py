"""Columns fit a width, numbers stay whole, and no letter is lost."""

import pytest

from kdctl.cli.fit import Column, bands, fit, fold

NAMES = ("teacher", "lambda0_beta0_lr2e-05_seed0", "文字" * 12)
KL = (("–",), ("0.1343", "[0.1250, 0.1432]"), ("12.1343", "[0.1250, 110.1432]"))
VERDICTS = (("–",), ("PTQ: better;", "teacher: worse"), ("PTQ: cannot tell;", "teacher: cannot tell"))


def columns() -> list[Column]:
    plain = (False,) * 3
    return [
        Column("model", tuple((name,) for name in NAMES), plain, words=True),
        Column("KL to teacher [95 %]", KL, (False, True, False)),
        Column("average", (("62.1 ± 0.5",),) * 3, plain),
        Column("verdict", VERDICTS, plain, words=True),
        Column("MiB", (("98.3",), ("31.0",), ("11031.0",)), plain),
    ]


@pytest.mark.parametrize("room", [60, 80, 100, 120, 200])
def test_a_table_fits_and_loses_nothing(room: int) -> None:
    found, gap = fit(columns(), room)
    assert sum(one.width for one in found) + gap * (len(found) - 1) <= room
    for before, after in zip(columns(), found, strict=True):
        assert after.bold == before.bold
        for parts, text in zip(before.cells, after.lines, strict=True):
            assert "".join(text.split()) == "".join("".join(parts).split())
            if not before.words:
                assert all(part in text for part in parts)


def test_everything_is_on_one_line_where_there_is_room() -> None:
    found, gap = fit(columns(), 200)
    assert gap == 2
    assert [one.lines[1] for one in found] == [
        "lambda0_beta0_lr2e-05_seed0",
        "0.1343 [0.1250, 0.1432]",
        "62.1 ± 0.5",
        "PTQ: better; teacher: worse",
        "31.0",
    ]


def test_what_cannot_fit_stands_out_rather_than_being_cut() -> None:
    found, _ = fit(columns(), 20)
    assert found[1].lines[1] == "0.1343\n[0.1250, 0.1432]"


def test_too_many_columns_are_several_tables_each_with_the_names() -> None:
    name, *rest = columns()
    many = [name, *rest * 4]
    found = bands(many, 80)
    assert len(found) > 1
    assert all(band[0] == name for band in found)
    assert [column for band in found for column in band[1:]] == many[1:]
    for band in found:
        shown, gap = fit(band, 80)
        assert sum(one.width for one in shown) + gap * (len(shown) - 1) <= 80
    assert bands(columns(), 80) == [columns()]


def test_text_breaks_after_spaces_and_underscores_first() -> None:
    assert fold("lambda0_beta0_lr2e-05", 14) == "lambda0_beta0_\nlr2e-05"
    assert fold("better than the teacher", 12) == "better than\nthe teacher"
    assert fold("abcdefghij", 4) == "abcd\nefgh\nij"
    assert fold("a\nb", 4) == "a\nb"
    assert fold("字字字字", 4) == "字字\n字字"
