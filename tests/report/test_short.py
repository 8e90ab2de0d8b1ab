"""What people compare: few columns with the numbers of the whole table, and every verdict in a line."""

from pathlib import Path

from made_up import make_run

from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.layouts import lay_out
from kdctl.report.short import headlines, shortened
from kdctl.report.study_reader import read_study
from kdctl.report.tables import Table


def column(table: Table, key: str) -> list[object]:
    index = [one.key for one in table.columns].index(key)
    return [row[index].value for row in table.rows]


def test_the_main_table_keeps_what_is_compared_with_its_numbers(full: Results) -> None:
    (main,) = lay_out("main", full.study, full.contrasts)
    short = shortened(main, full)
    assert [one.key for one in short.columns] == ["model", "forward_kl", "average", "verdict", "size_bytes"]
    for key in ("model", "forward_kl", "average", "size_bytes"):
        assert column(short, key) == column(main, key)
    assert all(cell.marks == () for row in short.rows for cell in row)
    assert column(short, "verdict")[:2] == [None, "teacher: worse"]


def test_a_verdict_is_that_of_the_sentence(full: Results) -> None:
    (main,) = lay_out("main", full.study, full.contrasts)
    told = {one.model: one.words for one in headlines(full)}
    names, words = column(main, "model"), column(shortened(main, full), "verdict")
    for kind, phrase, long in (("PTQ", "PTQ", "verdict_ptq"), ("teacher", "the teacher", "verdict_teacher")):
        for name, word, sentence in zip(names, words, column(main, long), strict=True):
            if sentence is None:
                assert f"{kind}:" not in str(word)
                continue
            verdict = next(
                one for one in ("better", "worse", "equivalent", "cannot tell") if str(sentence).startswith(one)
            )
            assert f"{kind}: {verdict}" in str(word)
            joint = {"equivalent": "to", "cannot tell": "from"}.get(verdict, "than")
            assert f"{verdict} {joint} {phrase}" in told[str(name)]


def test_a_headline_gives_the_difference_in_points_and_the_share_of_kl(full: Results) -> None:
    (found,) = [one for one in headlines(full) if one.model == "lambda1_beta1_lr2e-05_seed0"]
    assert (
        found.words
        == "better than PTQ by 12.50 points; worse than the teacher by 9.00 points; 50 % of PTQ's KL removed"
    )


def test_other_layouts_keep_settings_and_drop_single_tasks(full: Results) -> None:
    for layout in ("lambda", "beta", "lr", "mixed"):
        (table,) = lay_out(layout, full.study, full.contrasts)
        keys = [one.key for one in table.columns]
        assert keys[-5:] == ["alpha", "beta", "average", "forward_kl", "perplexity"]
        short = shortened(table, full)
        assert [one.key for one in short.columns] == [*keys[:-5], "average", "forward_kl"]
        assert [block.heading for block in short.blocks] == [block.heading for block in table.blocks]


def test_one_task_is_its_own_average(tmp_path: Path) -> None:
    results = Results(read_study([make_run(tmp_path / "run", {"v": {}}, ["alpha"])]), Contrasts(0.005))
    (main,) = lay_out("main", results.study, results.contrasts)
    assert [one.key for one in shortened(main, results).columns][1:3] == ["forward_kl", "alpha"]


def test_without_tasks_there_is_still_the_kl(bare: Results) -> None:
    (main,) = lay_out("main", bare.study, bare.contrasts)
    assert [one.key for one in shortened(main, bare).columns] == ["model", "forward_kl", "size_bytes"]
    assert [(one.model, one.words) for one in headlines(bare)] == [
        ("ptq", "not evaluated on any task yet (--task names some)")
    ]
