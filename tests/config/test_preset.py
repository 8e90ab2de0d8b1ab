"""The schema: closed, frozen, documented, and strict about what does not go together."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from kdctl.base.errors import PresetError
from kdctl.config.preset import DistillSection, Preset, QuantizeSection, RolloutSection, TeacherSection
from kdctl.config.resolve import load_preset, preset_names

PRESETS = sorted((Path(__file__).parents[2] / "presets").glob("*.toml"))
SECTIONS = {
    name: field.annotation
    for name, field in Preset.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
FIELDS = [(name, inner) for name, section in SECTIONS.items() for inner in section.model_fields]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_shipped_preset_loads_by_name_and_by_path(path: Path) -> None:
    assert load_preset(path.stem) == load_preset(str(path))
    assert load_preset(path.stem).description.endswith(".")


def test_the_five_promised_presets_ship() -> None:
    assert {"quickstart", "offpolicy", "mixed", "onpolicy", "smoke"} <= set(preset_names())
    assert [path.stem for path in PRESETS] == preset_names()


def test_every_field_is_described_in_the_schema() -> None:
    definitions = Preset.model_json_schema()["$defs"]
    for section, field in FIELDS:
        definition = definitions[SECTIONS[section].__name__]
        assert definition["description"].strip(), section
        assert len(definition["properties"][field].get("description", "")) > 10, f"{section}.{field}"


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        (
            {"norm_lr_ratio": 5.0},
            "norm_lr_ratio=5 has no effect where weights is all .* set distill.train_norms",
        ),
        (
            {"scale_lr_ratio": 2.0, "train": "lora", "train_norms": True},
            "scale_lr_ratio=2 .* lora, norms is all",
        ),
        ({"scale_lr_ratio": 2.0, "train": "scales"}, ""),
        ({"scale_lr_ratio": 2.0, "learn_scales": True, "norm_lr_ratio": 5.0, "train_norms": True}, ""),
    ],
)
def test_a_rate_of_what_does_not_learn_is_refused(changes: dict[str, Any], unread: str) -> None:
    settings = DistillSection(**changes)
    with pytest.raises(PresetError, match=unread) if unread else nullcontext():
        settings.check_rates()


def test_sections_are_frozen(smoke: Preset) -> None:
    for section, field in FIELDS:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(getattr(smoke, section), field, None)
    with pytest.raises(ValidationError, match="frozen"):
        smoke.description = "other"


def test_sections_are_closed() -> None:
    for name, section in SECTIONS.items():
        required = {"model": "x"} if name == "teacher" else {}
        section.model_validate(required)
        with pytest.raises(ValidationError, match=rf"{section.__name__}\nno_such_field\n *Extra inputs"):
            section.model_validate(required | {"no_such_field": 1})


def test_asymmetric_8_bit_is_refused_and_other_widths_are_not() -> None:
    with pytest.raises(ValidationError, match=r"symmetric=true"):
        QuantizeSection(bits=8, symmetric=False)
    assert QuantizeSection(bits=8, symmetric=True).bits == 8
    for bits in (2, 3, 4):
        assert not QuantizeSection(bits=bits).symmetric


@pytest.mark.parametrize("field", ["lmbda", "beta", "warmup_ratio"])
@pytest.mark.parametrize("value", [-0.001, 1.001, 1.5, float("nan")])
def test_shares_stay_between_zero_and_one(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        DistillSection.model_validate({field: value})


@pytest.mark.parametrize("field", ["lmbda", "beta"])
@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_the_ends_of_a_share_are_allowed(field: str, value: float) -> None:
    assert DistillSection.model_validate({field: value}).model_dump()[field] == value


@pytest.mark.parametrize("field", ["lr", "temperature", "max_grad_norm", "weight_decay"])
def test_infinite_numbers_are_refused(field: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        DistillSection.model_validate({field: float("inf")})


def test_more_required_than_allowed_tokens_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValidationError, match=r"min_new_tokens=9.*max_new_tokens=8"):
        RolloutSection(min_new_tokens=9, max_new_tokens=8)
    assert RolloutSection(min_new_tokens=8, max_new_tokens=8).min_new_tokens == 8


def test_a_sequence_needs_room_for_a_completion() -> None:
    teacher = TeacherSection(model="x")
    tight = {"teacher": teacher, "prompts": {"max_prompt_tokens": 100}}
    with pytest.raises(ValidationError, match=r"distill\.max_tokens=100.*prompts\.max_prompt_tokens=100"):
        Preset.model_validate(tight | {"distill": {"max_tokens": 100}})
    assert Preset.model_validate(tight | {"distill": {"max_tokens": 101}}).distill.max_tokens == 101


def test_rows_per_step_multiplies() -> None:
    assert DistillSection(micro_batch_size=3, gradient_accumulation=5).rows_per_step == 15


def test_the_teacher_is_the_only_required_section() -> None:
    required = [name for name, field in Preset.model_fields.items() if field.is_required()]
    assert required == ["teacher"]


@pytest.mark.parametrize("missing", [{"patience": 0}, {"heldout_every": 0}])
def test_stopping_early_needs_something_to_go_by(missing: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="stop_early goes by held-out KL"):
        DistillSection.model_validate({"stop_early": True, **missing})


BEYOND: list[tuple[str, object]] = [
    ("rollout.seed", 2**63),
    ("rollout.seed", -(2**63) - 1),
    ("heldout.seed", 10**22),
    ("distill.seed", 10**22),
    ("rollout.num_prompts", 10**30),
    ("rollout.max_new_tokens", 10**12),
    ("heldout.max_new_tokens", 10**12),
    ("rollout.batch_size", 0),
    ("rollout.temperature", 1e-300),
    ("rollout.temperature", 5e-324),
    ("rollout.temperature", float("nan")),
    ("distill.temperature", 1e-39),
    ("distill.temperature", 1e300),
    ("distill.lr", 1e308),
    ("distill.lr", float("inf")),
    ("distill.beta", 1e-300),
    ("distill.beta", 1 - 1e-16),
    ("distill.adam_eps", 1e-300),
    ("distill.gradient_accumulation", 10**9),
    ("distill.lora_rank", 10**9),
    ("distill.max_grad_norm", 1e-300),
    ("quantize.group_size", 10**30),
    ("quantize.damping", 1e300),
    ("quantize.autoround_iters", 2**40),
    ("teacher.model", "a\0b"),
    ("teacher.model", "x" * 5000),
    ("teacher.model", "\udcff"),
    ("eval.tasks", ["a\0b"]),
    ("prompts.date", "yesterday"),
]


@pytest.mark.parametrize(("key", "value"), BEYOND)
def test_what_nothing_can_compute_or_keep_is_refused_with_its_field(key: str, value: object) -> None:
    with pytest.raises(PresetError, match=rf"set on top of preset smoke: {key}[.0-9]*="):
        load_preset("smoke", {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.seed", 2**63 - 1),
        ("rollout.seed", -(2**63)),
        ("rollout.temperature", 0),
        ("distill.beta", 1e-6),
        ("distill.beta", 1.0),
        ("distill.max_grad_norm", 0),
        ("prompts.date", "2024-02-29"),
    ],
)
def test_the_ends_of_a_range_are_in_it(key: str, value: object) -> None:
    section, field = key.split(".")
    assert getattr(getattr(load_preset("smoke", {key: value}), section), field) == value


def test_a_step_has_as_many_sequences_as_fit_in_memory() -> None:
    with pytest.raises(PresetError, match="4294967296 sequences in one step"):
        load_preset("smoke", {"distill.micro_batch_size": 2**16, "distill.gradient_accumulation": 2**16})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "server"}, "needs to know where it is: give either url, of a server that runs, or serve"),
        ({"engine": "server", "url": ["http://a:1"], "serve": "vllm"}, "give either url"),
        ({"url": ["http://a:1"]}, "url is for engine='server', and engine is 'transformers'"),
        ({"lag": 1}, "lag is for engine='server'"),
        ({"engine": "server", "url": ["a:1"]}, "is no address of a server; write it like http://127.0.0.1:8000"),
        ({"engine": "server", "url": ["http://a:99999"]}, "is no address of a server"),
        (
            {"engine": "server", "url": ["https://k@a"]},
            "must not hold a secret; give https://a and the key in KDCTL_SER",
        ),
        ({"engine": "server", "serve": "run {port}"}, r"nor a command with \{port\} and \{weights\} in it"),
        ({"engine": "server", "serve": "run {port} {weights} {gpu}"}, r"nothing else in braces"),
        ({"engine": "server", "serve": "run '{port} {weights}"}, "cannot be read as a command: No closing quotation"),
        ({"engine": "server", "url": ["http://a"], "restart": "now"}, r"is no command with \{weights\} in it"),
        ({"engine": "server", "url": ["http://a"], "timeout_s": 0}, "timeout_s"),
    ],
)
def test_what_does_not_say_where_a_server_is_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RolloutSection.model_validate(settings)


def test_an_address_is_kept_without_what_clients_add_to_it() -> None:
    served = RolloutSection.model_validate({"engine": "server", "url": ["http://a:1/v1/", "https://b/proxy/"]})
    assert served.url == ("http://a:1", "https://b/proxy")
