"""Sweep files: wandb's format, fields that exist, and clear words for everything else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdctl.base.errors import PresetError
from kdctl.sweep.space import Choice, Foreign, Interval, field_of, read_sweep, sweep_names

STUDY = {
    "lr_offpolicy": ("offpolicy", "distill.lr", (1e-6, 5e-6, 1e-5, 5e-5, 1e-4)),
    "lr_onpolicy": ("onpolicy", "distill.lr", (1e-6, 5e-6, 1e-5, 5e-5, 1e-4)),
    "lora_rank": ("onpolicy", "distill.lora_rank", (4, 8, 16, 32, 64)),
    "rollout_length": ("onpolicy", "rollout.max_new_tokens", (128, 256, 512)),
    "steps": ("onpolicy", "distill.steps", (1000, 20000)),
}


def written(tmp_path: Path, parameters: dict[str, Any], **more: Any) -> str:
    """Write a sweep file."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, **more}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("more", [{"preset": "smoke"}, {"distill.beta": 1}])
def test_what_trials_are_given_is_sent_under_parameters(tmp_path: Path, more: dict[str, Any]) -> None:
    (key,) = more
    with pytest.raises(PresetError, match=rf"unknown key {key}; .* under parameters, as {key}: {{value: \.\.\.}}"):
        read_sweep(written(tmp_path, {"beta": {"values": [0, 1]}}, **more))


@pytest.mark.parametrize("name", STUDY)
def test_the_shipped_sweeps_are_those_of_the_study(name: str) -> None:
    preset, key, values = STUDY[name]
    sweep = read_sweep(name)
    assert (sweep.preset, sweep.method, sweep.parameters) == (preset, "grid", (Choice(key, values),))


def test_every_shipped_sweep_can_be_read() -> None:
    small = {"quickstart_grid", "study_kl", "study_minmax", "study_mix"}
    assert {*STUDY, *small, "beta_lambda_grid", "batch_size"} == set(sweep_names())
    for name in sweep_names():
        assert read_sweep(name).file.description


def test_one_value_is_a_setting_and_several_are_swept(tmp_path: Path) -> None:
    entries = {"preset": {"value": "smoke"}, "beta": {"values": [0, 1]}, "distill.seed": {"values": [7]}}
    sweep = read_sweep(written(tmp_path, {**entries, "lora_alpha": {"value": None}}))
    assert sweep.parameters == (Choice("distill.beta", (0, 1)),)
    assert (sweep.name, sweep.preset) == ("mine", "smoke")
    assert sweep.settings == {"distill.seed": 7, "distill.lora_alpha": None}


def test_distributions_are_understood_as_wandb_means_them(tmp_path: Path) -> None:
    entries = {
        "beta": {"min": 0.0, "max": 1.0},
        "steps": {"min": 10, "max": 20},
        "distill.lr": {"distribution": "log_uniform_values", "min": "1e-6", "max": 1e-4},
        "distill": {"parameters": {"lmbda": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}}},
        "weight_decay": {"distribution": "normal", "mu": 0.1, "sigma": 0.1},
        "distill.train": {"values": ["lora", "scales"], "probabilities": [0.1, 0.9]},
    }
    found = read_sweep(written(tmp_path, entries, method="random")).parameters
    assert found[:4] == (
        Interval("distill.beta", 0.0, 1.0),
        Interval("distill.steps", 10, 20, 1),
        Interval("distill.lr", 1e-6, 1e-4, None, True),
        Interval("distill.lmbda", 0, 1, 0.25),
    )
    assert [(type(one), one.key) for one in found[4:]] == [
        (Foreign, "distill.weight_decay"),
        (Foreign, "distill.train"),
    ]


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        ({"distill.bta": {"values": [0, 1]}}, ("distill.bta", "did you mean 'distill.beta'?")),
        ({"learning_rate": {"values": [0, 1]}}, ("no preset has a field 'learning_rate'",)),
        ({"seed": {"values": [0, 1]}}, ("rollout.seed or heldout.seed or distill.seed",)),
        ({"beta": {"values": [0, 1]}, "distill.beta": {"value": 0}}, ("distill.beta", "another parameter")),
        ({"beta": {"values": []}}, ("values=[]",)),
        ({"beta": {"values": [1, 1]}}, ("a value twice",)),
        ({"beta": {"min": 1, "max": 0}}, ("min is 1, max is 0",)),
        ({"beta": {}}, ("give value, values, or min",)),
        ({"beta": {"value": 0}}, ("sweeps nothing",)),
        ({"beta": {"valus": [0]}}, ("unknown key parameters.beta.valus",)),
        ({"lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}, ("above 0",)),
        ({"steps": {"distribution": "int_uniform", "min": 0.5, "max": 1}}, ("whole numbers",)),
        ({"preset": {"values": ["smoke", "quickstart"]}, "beta": {"values": [0, 1]}}, ("'preset'", "value: NAME")),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(tmp_path: Path, entries: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(PresetError) as caught:
        read_sweep(written(tmp_path, entries))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("method: [", "not valid YAML"),
        ("- 1", "not a wandb sweep"),
        ("method: best\nparameters: {}", "'grid', 'random' or 'bayes'"),
        ("metod: grid", "did you mean 'method'?"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(PresetError, match=r"bad\.yaml") as caught:
        read_sweep(str(tmp_path / "bad.yaml"))
    assert part in str(caught.value)


def test_an_unknown_sweep_is_refused_with_the_nearest() -> None:
    with pytest.raises(PresetError, match="did you mean 'lr_onpolicy'"):
        read_sweep("lr_on_policy")


def test_short_names_are_fields() -> None:
    assert field_of("refresh_every", "x") == "distill.refresh_every"
    assert field_of("rollout.seed", "x") == "rollout.seed"


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['touch RAN']", "!!python/name:os.system"])
def test_a_sweep_file_is_plain_yaml(tmp_path: Path, value: str) -> None:
    path, ran = tmp_path / "mine.yaml", tmp_path / "ran"
    path.write_text(f"method: grid\nparameters:\n  distill.lr: {value.replace('RAN', str(ran))}\n")
    with pytest.raises(PresetError, match=r"mine\.yaml"):
        read_sweep(str(path))
    assert not ran.exists()


@pytest.mark.parametrize("value", ["2020-13-45", "9" * 5000])
def test_yaml_whose_values_cannot_be_read_is_one_message(tmp_path: Path, value: str) -> None:
    (path := tmp_path / "s.yaml").write_text(f"method: grid\nparameters:\n  distill.seed: {{values: [{value}, 1]}}\n")
    with pytest.raises(PresetError, match="is not valid YAML"):
        read_sweep(str(path))


@pytest.mark.parametrize("q", [0, -1, 2])
def test_a_step_that_does_not_fit_its_range_is_refused(tmp_path: Path, q: float) -> None:
    (path := tmp_path / "s.yaml").write_text(
        f"method: random\nparameters:\n  distill.lr: {{distribution: q_uniform, min: 0.1, max: 0.2, q: {q}}}\n"
    )
    with pytest.raises(PresetError, match="needs q above 0"):
        read_sweep(str(path))
