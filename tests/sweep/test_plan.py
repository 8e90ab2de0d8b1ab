"""A sweep is checked in full before its first trial."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdctl.base.errors import PresetError
from kdctl.config.resolve import load_preset
from kdctl.sweep.plan import Shard, SweepPlan, base_plan, parse_shard, parse_trial, plan_sweep
from kdctl.sweep.space import Sweep, read_sweep, sweep_names


def sweep_of(tmp_path: Path, parameters: dict[str, Any], **more: Any) -> Sweep:
    """Write and read a sweep file."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, **more}, sort_keys=False))
    return read_sweep(str(path))


def plan_of(sweep: Sweep, *, max_trials: int | None = None, evaluate: bool = True, **overrides: Any) -> SweepPlan:
    """Plan a sweep of the smoke preset."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return plan_sweep(sweep, "smoke", settings, max_trials, evaluate)


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_can_be_planned(name: str) -> None:
    sweep = read_sweep(name)
    plan = plan_sweep(sweep, sweep.preset or "", {}, None, True)
    names = {plan.variant(values, plan.preset) for values in plan.trials}
    grids = {"beta_lambda_grid": 9, "quickstart_grid": 4, "study_kl": 6, "study_minmax": 6, "study_mix": 4}
    assert len(names) == plan.total == grids.get(name, len(plan.trials))


def test_batch_sizes_are_those_of_the_study() -> None:
    plan = plan_sweep(read_sweep("batch_size"), "onpolicy", {}, None, True)
    assert [plan.trial_preset(values).distill.rows_per_step for values in plan.trials] == [8, 16, 32]


def test_the_grid_is_every_combination_once_and_set_wins_over_the_file(tmp_path: Path) -> None:
    entries = {"beta": {"values": [0, 0.5, 1]}, "steps": {"min": 1, "max": 2}, "distill.lr": {"value": 0.5}}
    plan = plan_of(sweep_of(tmp_path, entries), distill__lr=0.25)
    assert [(v["distill.beta"], v["distill.steps"]) for v in plan.trials] == [
        (beta, steps) for beta in (0, 0.5, 1) for steps in (1, 2)
    ]
    assert plan.preset.distill.lr == 0.25
    assert plan_of(sweep_of(tmp_path, entries, run_cap=4)).trials == plan.trials[:4]


def test_random_trials_are_the_same_in_every_process_and_more_of_them_keep_the_first(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"beta": {"min": 0.0, "max": 1.0}, "lmbda": {"values": [0, 1]}}, method="random")
    few, many = plan_of(sweep, max_trials=5), plan_of(sweep, max_trials=20)
    assert many.trials[:5] == few.trials
    assert len({values["distill.beta"] for values in many.trials}) == 20
    assert {values["distill.lmbda"] for values in many.trials} == {0, 1}
    assert few.identity == many.identity


def test_a_variants_name_says_exactly_what_it_was_given(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path, {"lr": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-2}}, method="random"
    )
    plan = plan_of(sweep, max_trials=20)
    for values in plan.trials:
        assert f"_lr{values['distill.lr']:g}_" in plan.variant(values, plan.preset)
        assert float(f"{values['distill.lr']:g}") == values["distill.lr"]


def test_rollout_fields_and_lists_are_part_of_a_variants_name(tmp_path: Path) -> None:
    entries = {"lora_targets": {"values": [["*.q_proj"], ["*.k_proj", "*.v_proj"]]}, "distill.train": {"value": "lora"}}
    plan = plan_of(sweep_of(tmp_path, entries))
    names = [plan.variant(values, plan.preset) for values in plan.trials]
    assert names[0].endswith("_lora_targets-.q_proj-")
    assert not set("*'(), ") & set("".join(names))
    live = sweep_of(tmp_path, {"rollout.max_new_tokens": {"values": [8, 16]}, "lmbda": {"value": 1.0}})
    plan = plan_of(live)
    assert plan.variant(plan.trials[0], load_preset("smoke")).endswith("_max_new_tokens8")


@pytest.mark.parametrize(
    ("entries", "more", "parts"),
    [
        ({"beta": {"values": [0, 1.5]}}, {}, ("beta=1.5", "distill.beta=1.5")),
        ({"beta": {"min": 0.0, "max": 1.5}}, {"method": "bayes"}, ("beta=1.5",)),
        ({"lr": {"values": [1, -1]}}, {"method": "random"}, ("lr=-1",)),
        ({"max_tokens": {"values": [512, 1024]}}, {}, ("max_tokens=512", "max_prompt_tokens=512")),
        ({"beta": {"min": 0.0, "max": 1.0}}, {}, ("distill.beta", "random or bayes")),
        ({"bits": {"values": [2, 4]}}, {}, ("quantize.bits", "another --run")),
        ({"heldout.seed": {"values": [2, 4]}}, {}, ("heldout.seed", "yardstick")),
        ({"rollout.max_new_tokens": {"values": [8, 16]}}, {}, ("max_new_tokens=8", "lmbda=0", "--run")),
        ({"beta": {"values": [1, 1.0]}}, {}, ("both variant lambda0_beta1_",)),
        ({"beta": {"values": [0, 1]}}, {"metric": {"name": "val_loss"}}, ("'val_loss'", "eval/forward_kl")),
        ({"beta": {"values": [0, 1]}}, {"metric": {"name": "eval/mmlu/acc"}}, ("eval/arc_easy_offline/acc",)),
        (
            {"beta": {"values": [0, 1]}},
            {"early_terminate": {"type": "hyperband", "max_iter": 9, "s": 2}},
            ("early_terminate", "max_iter", "--backend wandb"),
        ),
        (
            {"beta": {"values": [0, 1]}, "heldout_every": {"value": 0}},
            {"early_terminate": {"type": "hyperband", "min_iter": 1}},
            ("early_terminate", "distill.heldout_every=0"),
        ),
        ({"beta": {"distribution": "normal", "mu": 0, "sigma": 1}}, {}, ("'normal'", "--backend wandb")),
    ],
)
def test_what_would_fail_a_trial_is_refused_before_the_first(
    tmp_path: Path, entries: Any, more: Any, parts: tuple[str, ...]
) -> None:
    with pytest.raises(PresetError) as caught:
        plan_of(sweep_of(tmp_path, entries, **more))
    for part in parts:
        assert part in str(caught.value)


def test_a_grid_may_have_as_many_trials_as_allowed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"distill.seed": {"values": list(range(65))}})
    with pytest.raises(PresetError, match="has 65 trials and --max-trials is 64"):
        plan_of(sweep)
    assert plan_of(sweep, max_trials=65).total == 65


@pytest.mark.parametrize(
    ("method", "cap", "most"),
    [("random", 2**64, None), ("bayes", 2**64, None), ("random", None, 2**64), ("grid", None, 2**64)],
)
def test_more_trials_than_can_be_laid_out_are_refused_at_once(
    tmp_path: Path, method: str, cap: int | None, most: int | None
) -> None:
    sweep = sweep_of(tmp_path, {"lr": {"values": [1e-5, 1e-4]}}, method=method, run_cap=cap)
    with pytest.raises(PresetError, match=r"18446744073709551616 trials .* at most 10000"):
        plan_of(sweep, max_trials=most)


def test_a_swept_field_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"distill\.beta is swept"):
        plan_of(sweep_of(tmp_path, {"beta": {"values": [0, 1]}}), distill__beta=0.5)


def test_a_task_metric_needs_the_evaluation(tmp_path: Path) -> None:
    metric = {"name": "eval/arc_easy_offline/acc", "goal": "maximize"}
    sweep = sweep_of(tmp_path, {"beta": {"values": [0, 1]}}, metric=metric)
    assert plan_of(sweep).sweep.metric.name == metric["name"]
    with pytest.raises(PresetError, match="no trial will have metric"):
        plan_of(sweep, evaluate=False)


@pytest.mark.parametrize(
    ("name", "goal", "words"),
    [
        ("eval/arc_easy_offline/bits_per_byte", "minimize", "less of it is better; set goal: minimize"),
        ("eval/arc_easy_offline/acc_norm", "maximize", "more of it is better; set goal: maximize"),
        ("eval/forward_kl", "minimize", "less of it is better; set goal: minimize"),
    ],
)
def test_the_worst_trial_cannot_be_the_goal(tmp_path: Path, name: str, goal: str, words: str) -> None:
    other = {"minimize": "maximize", "maximize": "minimize"}[goal]
    good, bad = (
        sweep_of(tmp_path, {"beta": {"values": [0, 1]}}, metric={"name": name, "goal": each}) for each in (goal, other)
    )
    assert plan_of(good).sweep.metric.goal == goal
    with pytest.raises(PresetError, match=words):
        plan_of(bad)


def test_shards_cover_every_slot_once() -> None:
    for count in (1, 3, 4, 20):
        slots = [slot for index in range(count) for slot in Shard(index, count).slots(11)]
        assert sorted(slots) == list(range(11))
    assert parse_shard("2/3") == Shard(2, 3)


@pytest.mark.parametrize("text", ["3/3", "4/3", "0/0", "-1/3", "1", "a/b", "1/3/5"])
def test_a_shard_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(PresetError, match=text):
        parse_shard(text)


def test_a_trial_is_read_as_an_agent_writes_it(tmp_path: Path) -> None:
    entries = {
        "preset": {"value": "smoke"},
        "lora_alpha": {"value": None},
        "distill.beta": {"values": [0, 1e-05, 1]},
        "train_norms": {"values": [True, False]},
        "distill.train": {"values": ["scales"]},
    }
    sweep = sweep_of(tmp_path, entries)
    words = ["preset=smoke", "lora_alpha=None", "distill.beta=1e-05", "train_norms=True", "distill.train=scales"]
    values = parse_trial(sweep, words)
    assert values == {"distill.beta": 1e-05, "distill.train_norms": True}
    assert base_plan(sweep, "smoke", {}, True).trial_preset(values).distill.train_norms is True


@pytest.mark.parametrize("written", ["0.00001", "1e-5", "1e-05"])
def test_a_value_may_be_written_in_any_way(tmp_path: Path, written: str) -> None:
    assert parse_trial(sweep_of(tmp_path, {"lr": {"values": [1e-5, 1e-4]}}), [f"lr={written}"]) == {"distill.lr": 1e-5}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["beta"], "field=value"),
        (["beta=0", "lr=1"], "does not sweep distill.lr, only distill.beta"),
        (["beta=0", "lr=None"], "does not sweep distill.lr, only distill.beta"),
        (["beta=0.5"], "sweeps distill.beta over 0, 1,"),
        (["beta=zero"], "sweeps distill.beta over 0, 1,"),
        (["beta=0", "preset=onpolicy"], "preset"),
        ([], "distill.beta"),
        (["bta=1"], "'bta'"),
    ],
)
def test_a_trial_of_another_sweep_is_refused(tmp_path: Path, words: list[str], part: str) -> None:
    sweep = sweep_of(tmp_path, {"preset": {"value": "smoke"}, "beta": {"values": [0, 1]}})
    with pytest.raises(PresetError, match=part):
        parse_trial(sweep, words)
