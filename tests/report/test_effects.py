"""What each setting changes: pairs that differ in it alone, against references computed here."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import answers, evaluated, make_run, wrote_rollouts

from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.effects import KL_MARGIN, Compared, Sums, effects, setting_changes, verdict
from kdctl.report.figures import changes, verdicts
from kdctl.report.study_reader import read_study
from kdctl.report.tables import Table
from kdctl.rollout.store import RolloutStore
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import DistillReport, Estimate, EvalResult, Rollout, StoreManifest

LAMBDAS = {"off": 0.0, "mixed": 0.5, "on": 1.0}
OWN = {"ptq": 0.5, "off": 0.4, "mixed": 0.3, "on": 0.2}
PROMPTS = 30


def on_ptq_text(run: RunDir, name: str, kl: float, text: str = "ptq's") -> None:
    """Write what a model is like on the PTQ student's completions."""
    drawn = np.random.default_rng(7)
    tokens = drawn.integers(10, 60, PROMPTS).astype(float)
    sums = kl * tokens * drawn.uniform(0.2, 1.8, PROMPTS)
    columns = {"tokens": tokens, "forward_kl": sums, "reverse_kl": sums / 2}
    pq.write_table(
        pa.table({"prompt_id": [f"{i:02d}" for i in range(PROMPTS)], **columns}), run.samples(name, "ptq_written")
    )
    path = run.eval(name) / "results.json"
    write_record(path, read_record(path, EvalResult).model_copy(update={"ptq_text": text}))


def wrote(run: RunDir, name: str, kl: float, order: int) -> None:
    """Write what a model's own completions were like, in an order of its own."""
    drawn = np.random.default_rng(5)
    tokens = drawn.integers(10, 60, PROMPTS) + order
    sums = kl * tokens * drawn.uniform(0.8, 1.2, PROMPTS)
    ids = [f"{index:02d}" for index in range(PROMPTS)]
    shuffled = np.random.default_rng(order).permutation(PROMPTS)
    columns = {"tokens": tokens.astype(float), "forward_kl": sums}
    table = pa.table({"prompt_id": ids, **columns}).take(shuffled)
    pq.write_table(table, run.samples(name, "student_written"))
    rollouts = [
        Rollout(ids[i], i, 0, [1], [2] * int(tokens[i]), None, "stop" if i % 3 else "length", 0, 0, "student")
        for i in shuffled
    ]
    store = RolloutStore(run.eval(name) / "rollouts")
    entry = store.write_shard(0, rollouts, "x")
    store.finish(StoreManifest(source="student", identity="x", writer="x", sampling=None, shards=(entry,)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Make a folder of three λ at one β, and one at another learning rate and another mix."""
    variants = {
        name: {"lmbda": lmbda, "kl": 0.3 - 0.1 * index, "draw": index}
        for index, (name, lmbda) in enumerate(LAMBDAS.items())
    }
    variants |= {"apart": {"lr": 9.0, "lmbda": 0.25}}
    made = make_run(tmp_path_factory.mktemp("effects") / "run", variants, ("alpha",))
    evaluated(made, "ptq", {"alpha": answers(0.6, 1)}, kl=0.4)
    for order, (name, kl) in enumerate(OWN.items()):
        wrote(made, name, kl, order)
        on_ptq_text(made, name, 2 * kl)
    return made


@pytest.fixture(scope="module")
def results(run: RunDir) -> Results:
    return Results(read_study([run]), Contrasts(0.005))


def column(table: Table, key: str) -> list[object]:
    place = [one.key for one in table.columns].index(key)
    return [row[place].value for row in table.rows]


def test_every_pair_that_differs_in_one_setting_is_compared(results: Results) -> None:
    found = [one.change for one in setting_changes(results)]
    assert found == ["λ 0 → 0.5", "λ 0 → 1", "λ 0.5 → 1"]  # and none with the variant of another learning rate


def test_differences_are_those_of_means_in_units_of_the_ptq_students(run: RunDir, results: Results) -> None:
    table = effects(results)[0]
    documents = {name: pq.read_table(run.samples(name, "heldout")) for name in ("ptq", "off", "on")}
    kl = {name: np.sum(one["forward_kl"]) / np.sum(one["tokens"]) for name, one in documents.items()}
    row = column(table, "change").index("λ 0 → 1")
    assert column(table, "measure")[row] == "KL on the teacher's text"
    assert column(table, "difference")[row] == pytest.approx(kl["on"] - kl["off"])
    assert column(table, "share")[row] == pytest.approx((kl["on"] - kl["off"]) / kl["ptq"])
    assert column(table, "verdict")[row] == "better"


def test_own_completions_are_paired_by_prompt_whatever_their_order(results: Results) -> None:
    found = {one.change: one for one in setting_changes(results)}["λ 0 → 1"].on["student_written"]
    assert found.value == pytest.approx((OWN["on"] - OWN["off"]) / OWN["ptq"], rel=0.02)
    assert found.high - found.low < 0.05  # unpaired, the prompts' own spread would be four times as much


def test_on_the_ptq_students_text_pairs_are_exact_where_each_document_changes_alike(results: Results) -> None:
    found = {one.change: one for one in setting_changes(results)}["λ 0 → 1"].on["ptq_written"]
    wanted = (OWN["on"] - OWN["off"]) / OWN["ptq"]
    assert found.value == pytest.approx(wanted)
    assert found.low < wanted < found.high
    table = effects(results)[0]
    pairs = zip(column(table, "change"), column(table, "measure"), strict=True)
    rows, place = dict(zip(pairs, table.rows, strict=True)), [one.key for one in table.columns].index("difference")
    kinds = ("KL", "reverse KL")
    forward, reverse = (rows["λ 0 → 1", f"{kind} on the PTQ student's text"][place].value for kind in kinds)
    assert isinstance(forward, float)
    assert reverse == pytest.approx(forward / 2)


def test_students_on_texts_of_two_ptq_students_are_not_compared_on_them(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    on_ptq_text(other, "on", 0.1, "another's")
    found = {one.change: one.on for one in setting_changes(Results(read_study([other]), Contrasts(0.005)))}
    assert "ptq_written" not in found["λ 0 → 1"]
    assert "ptq_written" in found["λ 0 → 0.5"]


def test_length_and_ends_are_compared_by_prompt(results: Results) -> None:
    table = next(one for one in effects(results) if one.name == "effects_text")
    found = dict(zip(zip(column(table, "change"), column(table, "measure"), strict=True), table.rows, strict=True))
    places = [one.key for one in table.columns]
    longer = found["λ 0 → 1", "tokens"][places.index("difference")]
    assert (longer.value, longer.low, longer.high) == pytest.approx((2.0, 2.0, 2.0))
    ended = found["λ 0 → 1", "end by themselves, %"]
    assert ended[places.index("base")].value == pytest.approx(200 / 3)
    assert ended[places.index("difference")].value == 0.0


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.5, -0.2, "better"),
        (0.2, 0.5, "worse"),
        (-0.09, -0.01, "better, by less than the margin"),
        (-0.05, 0.09, "equivalent"),
        (-0.2, 0.2, "cannot tell; 400 documents would see differences of the margin"),
        (-0.4, 0.0, "cannot tell; 400 documents would see differences of the margin"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_margin(low: float, high: float, words: str) -> None:
    found, sums = Estimate(value=(low + high) / 2, low=low, high=high), Sums(np.ones((1, 100)), np.ones((1, 100)))
    assert verdict(Compared(sums, sums, 1.0, found, found), 0.1) == words


def test_where_seeds_leave_it_open_no_number_of_documents_is_named() -> None:
    sums = Sums(np.ones((2, 100)), np.ones((2, 100)))
    wide, narrow = Estimate(value=0.0, low=-9.0, high=9.0), Estimate(value=0.0, low=-0.05, high=0.05)
    words = "cannot tell; seeds differ, and more of them would see differences of the margin"
    assert verdict(Compared(sums, sums, 1.0, wide, narrow), 0.1) == words


def test_students_of_other_rollout_lengths_are_no_pair(tmp_path: Path) -> None:
    """λ may differ along with the length, which λ = 0 has not; two lengths are two settings."""
    variants = {"off": {"lmbda": 0.0}, "half": {"lmbda": 0.5}, "on": {"lmbda": 1.0}, "long": {"lmbda": 1.0, "steps": 2}}
    made = make_run(tmp_path / "run", variants)
    for name, length in (("half", 8), ("on", 8), ("long", 16)):
        wrote_rollouts(made.variant(name).rollouts, length)
    report = read_record(made.variant("long").report, DistillReport)
    same = read_record(made.variant("on").report, DistillReport).settings
    write_record(made.variant("long").report, report.model_copy(update={"settings": same}))
    results = Results(read_study([made]), Contrasts(0.005))
    found = {(one.change, one.where) for one in setting_changes(results) if one.change.startswith("λ")}
    short = {(change, "rollout length = 8") for change in ("λ 0 → 0.5", "λ 0 → 1", "λ 0.5 → 1")}
    assert found == short | {("λ 0 → 1", "rollout length = 16")}


def test_figures_shade_what_is_too_small_to_matter(results: Results) -> None:
    found, shown = changes(results), verdicts(results)
    assert found is not None
    assert shown is not None
    assert found.panels[0].margin == pytest.approx(100 * KL_MARGIN)
    headings = [entry.label for entry in found.panels[0].entries if not entry.marks]
    assert headings == ["λ 0 → 0.5", "λ 0 → 1", "λ 0.5 → 1"]
    assert [panel.margin for panel in shown.panels] == pytest.approx([100 * KL_MARGIN, 0.5])


def test_without_a_pair_there_is_nothing(tmp_path: Path) -> None:
    alone = Results(read_study([make_run(tmp_path / "run", {"a": {}})]), Contrasts(0.005))
    assert effects(alone) == []
    assert changes(alone) is None
