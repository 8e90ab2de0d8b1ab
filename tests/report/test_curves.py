"""Sweeps, training curves and costs: every point is where the records say."""

from pathlib import Path

from made_up import compared, edit, make_run, wrote_rollouts

from kdctl.report.charts import Mark, Point, mark
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.curves import costs, generated_tokens, learning_rates, minutes, training
from kdctl.report.marks import accuracy_mark, kl_mark
from kdctl.report.study import Model
from kdctl.report.study_reader import read_study
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import ShardEntry, StoreManifest


def model(run: RunDir, name: str) -> Model:
    return next(one for one in read_study([run]).models if one.name == name)


def counted(folder: Path, tokens: int, sampled: bool = True) -> None:
    """Write the manifest of a store with so many tokens."""
    wrote_rollouts(folder, 64)
    shard = ShardEntry(file="a", rows=1, completion_tokens=tokens, sha256="0")
    made = read_record(folder / "manifest.json", StoreManifest).model_copy(update={"shards": (shard,)})
    write_record(folder / "manifest.json", made if sampled else made.model_copy(update={"sampling": None}))


def reads(run: RunDir, name: str, *sources: str) -> None:
    """Put the stores that a variant read into its record."""
    path = run.variant(name).report
    edit(path, stores=dict.fromkeys(sources, "f" * 64))


def test_sweeps_stand_beside_each_other_by_lambda(full: Results) -> None:
    chart = learning_rates(full)
    assert chart is not None
    assert [panel.title for panel in chart.rows[0]] == ["λ = 0 (off-policy)", "λ = 1 (on-policy)"]
    assert [row[0].y_label.split(",")[0] for row in chart.rows] == [
        "average accuracy",
        "KL to teacher",
        "training loss",
    ]
    swept = sorted(
        (row for row in full.rows if (row.settings.lmbda, row.settings.beta) == (0.0, 0.0)),
        key=lambda row: row.settings.lr or 0,
    )
    for row, measured in zip(chart.rows, (lambda one: accuracy_mark(one, full.tasks), kl_mark), strict=False):
        (series,) = row[0].series
        assert series.points == tuple(Point(one.settings.lr or 0, measured(one) or Mark(0)) for one in swept)
        assert row[0].ticks == (2e-5, 1e-4)
        assert row[0].bands[0].y == measured(full.rows[1])
    losses = [one.train_loss for one in swept[-1].models]
    assert chart.rows[2][0].series[0].points[-1].y == Mark(losses[0] or 0)


def test_without_two_rates_there_is_no_sweep(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"lr": 1e-4}, "b": {"lr": 1e-5, "steps": 3}})
    assert learning_rates(Results(read_study([run]), Contrasts(0.005))) is None


def test_training_curves_are_the_lines_of_the_metrics(full: Results) -> None:
    chart = training(full)
    assert chart is not None
    panels = [panel for row in chart.rows for panel in row]
    variants = [row for row in full.rows if row.kind == "variant"]
    assert len(panels) == len(variants)
    panel = next(one for one in panels if one.title == "on-policy: λ 1, β 1, lr 0.0001, seed 0")
    loss, during, ends = panel.series
    trained = next(one for one in full.study.models if one.name == "lambda1_beta1_lr0.0001_seed0")
    assert loss.points == tuple(Point(line["step"], Mark(line["train/forward_kl"])) for line in trained.curve)
    assert during.points == (Point(4, Mark(0.21)),)
    assert trained.distilled is not None
    assert [point.y for point in ends.points] == [
        mark(trained.distilled.before.forward_kl),
        mark(trained.distilled.after.forward_kl),
    ]
    seeds = next(one for one in panels if "seeds" in one.title)
    assert len(seeds.series) == 6


def test_the_last_point_stands_at_the_step_whose_student_was_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {"steps": 9}})
    path = run.variant("v").report
    for kept, expected in ((None, 9), (6, 6)):
        edit(path, kept_step=kept)
        chart = training(Results(read_study([run]), Contrasts(0.005)))
        assert chart is not None
        assert [point.x for point in chart.rows[0][0].series[-1].points] == [0, expected]


def test_costs_have_a_point_for_every_seed(full: Results) -> None:
    chart = costs(full)
    assert chart is not None
    for panel in chart.rows[0]:
        assert sum(len(series.points) for series in panel.series) == 9
        assert all(point.y.low is not None for series in panel.series for point in series.points)
        assert panel.bands[0].y == kl_mark(full.rows[1])


def test_with_many_settings_methods_share_a_marker(tmp_path: Path) -> None:
    variants = {f"v{index}": {"lr": 1e-5 * (index + 1), "lmbda": float(index % 2)} for index in range(9)}
    chart = minutes(Results(read_study([make_run(tmp_path / "run", variants)]), Contrasts(0.005)))
    assert chart is not None
    assert [series.label for series in chart.rows[0][0].series[1:]] == ["off-policy", "on-policy"]


def test_minutes_are_those_of_quantizing_and_of_training_after_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}})
    edit(run.student / "quantize.json", method="kl", seconds_s=240.0)
    edit(run.variant("v").report, train_seconds_s=120.0)
    for method, seconds in (("kl", 241.0), ("minmax", 6.0)):
        compared(run, method, seconds)
    results = Results(read_study([run]), Contrasts(0.005))
    chart = minutes(results)
    assert chart is not None
    found = {series.label: series.points[0] for series in chart.rows[0][0].series}
    assert {label: point.x for label, point in found.items()} == {"minmax": 0.1, "PTQ student (kl)": 4.0, "v": 6.0}
    levels = {row.name: kl_mark(row) for row in results.rows}
    assert (found["PTQ student (kl)"].y, found["v"].y) == (levels["ptq"], levels["v"])


def test_tokens_are_those_that_models_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"off": {}, "data": {"off_policy_source": "dataset"}, "mixed": {"lmbda": 0.5}})
    counted(run.rollouts("teacher"), 300)
    counted(run.rollouts("dataset"), 500, sampled=False)
    counted(run.variant("mixed").rollouts, 70)
    reads(run, "off", "teacher")
    reads(run, "data", "dataset")
    reads(run, "mixed", "student", "teacher")
    assert [generated_tokens(model(run, name)) for name in ("off", "data", "mixed")] == [300, 0, 370]
    assert generated_tokens(model(run, "ptq")) is None


def test_a_replay_costs_what_the_recording_cost(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"live": {"lmbda": 1.0}, "again": {"lmbda": 1.0, "replay": "live"}})
    counted(run.variant("live").rollouts, 70)
    reads(run, "live", "student")
    assert [generated_tokens(model(run, name)) for name in ("live", "again")] == [70, 70]


def test_tokens_of_a_store_that_is_gone_are_unknown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"off": {}})
    reads(run, "off", "teacher")
    assert generated_tokens(model(run, "off")) is None
    assert costs(Results(read_study([run]), Contrasts(0.005))) is None


def test_a_study_without_training_has_no_curves(bare: Results) -> None:
    assert training(bare) is costs(bare) is minutes(bare) is None
