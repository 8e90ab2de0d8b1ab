"""One more entry in the tables of measures is all that a new measure needs, from evaluation to report."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import edit, make_run

from kdctl.base.sums import without_sum
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.details import answers, comparisons, distances, measures
from kdctl.report.front import write_report
from kdctl.report.layouts import main
from kdctl.report.study_reader import read_study
from kdctl.report.tables import records
from kdctl.run.measures import ITEM_MEASURES, TOKEN_MEASURES, Choices, ItemMeasure, TokenMeasure
from kdctl.run.paths import RunDir


def chance(said: Choices) -> float:
    """Return the share of the right choice in the likelihoods of all."""
    most = max(said.loglikelihoods)
    parts = [math.exp(value - most) for value in said.loglikelihoods]
    return parts[said.gold] / sum(parts)


P_CORRECT = ItemMeasure("p_correct", "probability of the right choice", "higher", chance, heading="p(right)")
VARIATION = TokenMeasure(
    name="variation",
    label="total variation",
    better="lower",
    unit="share",
    per_token=lambda at: (at.log_p.exp() - at.log_q.exp()).abs().sum(-1) / 2,
    column="variation",
    heading="total variation",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Return a folder whose items keep log-likelihoods, with two more measures; documents have one of them."""
    monkeypatch.setitem(TOKEN_MEASURES, "variation", VARIATION)
    monkeypatch.setitem(ITEM_MEASURES, "p_correct", P_CORRECT)
    made = make_run(tmp_path, {"v": {}})
    for path in sorted(made.eval_root.glob("*/samples/*.parquet")):
        table = pq.read_table(path)
        if path.stem == "heldout":
            columns = {"variation": table["forward_kl"].to_numpy() / 2}
        else:
            right = table["acc"].to_numpy()
            ease = np.random.default_rng(3).random(len(right))
            sure = [[1.0 + e, 0.0] if ok else [0.0, 1.0 + e] for ok, e in zip(right, ease, strict=True)]
            columns = {"loglikelihoods": sure, "lengths": [[1, 1]] * len(right), "gold": [0] * len(right)}
        for name, values in columns.items():
            table = table.append_column(name, [values])
        pq.write_table(table, path)
    return made


def test_a_measure_of_items_has_a_column_and_paired_differences(run: RunDir):
    study = read_study([run])
    results = Results(study, Contrasts(0.005))
    rows = {row["model"]: row for row in records(main(study, results.contrasts))}
    items = {name: pq.read_table(run.eval(name) / "samples" / "alpha.parquet") for name in ("ptq", "v")}
    both = {name: pq.read_table(run.eval(name) / "samples" / "beta.parquet") for name in ("ptq", "v")}
    each = {
        name: [np.array([chance(Choices(x, (1, 1), 0)) for x in t["loglikelihoods"].to_pylist()]) for t in tables]
        for name, tables in ((name, (items[name], both[name])) for name in items)
    }
    assert rows["v"]["p_correct"] == pytest.approx(np.mean(each["v"]), rel=1e-12)
    found = next(row for row in records(measures(results)) if (row["model"], row["baseline"]) == ("v", "PTQ"))
    differences = [after - before for before, after in zip(each["ptq"], each["v"], strict=True)]
    assert found["difference"] == pytest.approx(np.mean(differences), rel=1e-9)
    error = math.hypot(*(0.5 * part.std(ddof=1) / math.sqrt(len(part)) for part in differences))
    half = (float(found["difference_high"] or 0) - float(found["difference_low"] or 0)) / 2
    assert half == pytest.approx(1.97 * error, rel=0.01)


def test_a_measure_of_tokens_has_a_column_an_interval_and_a_difference(run: RunDir):
    study = read_study([run])
    results = Results(study, Contrasts(0.005))
    rows = {row["model"]: row for row in records(main(study, results.contrasts))}
    for name in ("ptq", "v"):
        for end in ("", "_low", "_high"):
            kl = rows[name][f"forward_kl{end}"]
            assert rows[name][f"variation{end}"] == pytest.approx(float(kl or 0) / 2, rel=1e-12)
    assert rows["teacher"]["variation"] is None
    (found,) = (row for row in records(distances(results)) if row["model"] == "v")
    assert found["variation_difference"] == pytest.approx(float(found["forward_kl_difference"] or 0) / 2, rel=1e-9)


def test_folders_from_before_have_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TOKEN_MEASURES, "variation", VARIATION)
    study = read_study([make_run(tmp_path, {"v": {}})])
    assert "variation" not in {column.key for column in main(study, Contrasts(0.005)).columns}
    (table,) = (distances(Results(study, Contrasts(0.005))),)
    assert [column.key for column in table.columns] == ["model", "forward_kl_difference", "removed", "nll_difference"]


@pytest.fixture
def wrote(tmp_path: Path) -> RunDir:
    """Return a folder with a task whose items are worth any share, and one of right and wrong."""
    made = make_run(tmp_path, {"v": {}})
    for path in sorted(made.eval_root.glob("*/samples/alpha.parquet")):
        table = pq.read_table(path)
        worth = np.random.default_rng(3).random(len(table)) * (0.5 + 0.5 * table["acc"].to_numpy())
        lists = {"scores": [[one] for one in worth], "answers": [["said"]] * len(table), "tokens": [[3]] * len(table)}
        table = table.drop_columns(["acc", "acc_norm"]).append_column("score", [worth])
        for name, values in lists.items():
            table = table.append_column(name, [values])
        pq.write_table(table, path)
        record = path.parent.parent / "results.json"
        values = json.loads(without_sum(record.read_text()))
        values["tasks"]["alpha"] |= {
            "metric": "f1",
            "value": float(worth.mean()),
            "answers": {"samples": 1, "tokens": 3.0, "ended": 0.5, "repetition": 0.25, "seconds_s": 1.0},
        }
        edit(record, **values)
    return made


def test_scores_that_are_shares_are_compared_and_averaged_with_right_and_wrong_ones(wrote: RunDir):
    study = read_study([wrote])
    results = Results(study, Contrasts(0.005))
    rows = {row["model"]: row for row in records(main(study, results.contrasts))}
    worth = {
        name: pq.read_table(wrote.eval(name) / "samples" / "alpha.parquet")["score"].to_numpy() for name in ("ptq", "v")
    }
    assert rows["v"]["alpha"] == pytest.approx(worth["v"].mean(), rel=1e-12)
    found = {(row["model"], row["baseline"], row["task"]): row for row in records(comparisons(results))}
    assert found["v", "PTQ", "alpha"]["difference"] == pytest.approx(np.mean(worth["v"] - worth["ptq"]), rel=1e-9)
    assert found["v", "PTQ", "alpha"]["p_mcnemar"] is None
    assert found["v", "PTQ", "beta"]["p_mcnemar"] is not None
    assert found["v", "PTQ", "average"]["difference"] == pytest.approx(
        (float(found["v", "PTQ", "alpha"]["difference"] or 0) + float(found["v", "PTQ", "beta"]["difference"] or 0)) / 2
    )


def test_answers_are_described_and_every_form_of_a_report_is_written(wrote: RunDir):
    rows = records(answers(Results(read_study([wrote]), Contrasts(0.005))))
    assert [(row["model"], row["task"], row["metric"]) for row in rows] == [
        (name, "alpha", "f1") for name in ("teacher", "ptq", "v")
    ]
    assert (rows[0]["tokens"], rows[0]["ended"], rows[0]["repetition"]) == (3.0, 0.5, 0.25)
    write_report([wrote])
    assert "Written answers" in (wrote.path / "report" / "report.md").read_text()


def test_a_difference_in_probability_is_never_said_in_points(run: RunDir):
    ITEM_MEASURES.pop("p_correct")
    table = measures(Results(read_study([run]), Contrasts(0.005)))
    said = [row for row in records(table) if row["measure"] == "p_right"]
    assert said
    assert not any("points" in str(row["verdict"]) for row in said)
    assert any("in probability" in str(row["verdict"]) for row in said)
    own = next(row for row in said if (row["model"], row["baseline"]) == ("v", "PTQ"))
    half = (float(own["difference_high"] or 0) - float(own["difference_low"] or 0)) / 2
    cost = next(row for row in said if (row["model"], row["baseline"]) == ("ptq", "teacher"))
    assert own["blur"] == pytest.approx(half / abs(float(cost["difference"] or 0)), rel=1e-9)
