"""From a name and overrides to a preset, and from a preset to an identity."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from kdctl.base.errors import PresetError
from kdctl.config.preset import DistillSection, Preset, QuantizeSection, RolloutSection
from kdctl.config.resolve import (
    build_preset,
    canonical,
    identity,
    known_keys,
    load_preset,
    parse_assignments,
    parse_value,
    preset_names,
    suggest,
    variant_name,
    with_value,
)
from kdctl.config.section import Section

INPUTS = {"teacher": "aaaa", "student": "bbbb"}


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("distill.lambda", "distill.lmbda"),
        ("eval.bach_size", "eval.batch_size"),
        ("quantise.bits", "quantize"),
        ("quantize.bit", "quantize.bits"),
        ("lmbda", "distill.lmbda"),
        ("rollouts.seed", "rollout"),
    ],
)
def test_unknown_keys_are_refused_by_name_with_the_nearest_one(key: str, suggestion: str) -> None:
    with pytest.raises(PresetError, match="unknown key") as caught:
        load_preset("smoke", {key: 1})
    message = str(caught.value)
    assert key.split(".")[0] in message
    assert f"did you mean '{suggestion}'?" in message


def test_every_problem_of_a_preset_is_named_at_once() -> None:
    with pytest.raises(PresetError) as caught:
        load_preset("smoke", {"distill.lmbda": 1.5, "quantize.bits": 5, "rollout.tepmerature": 1})
    message = str(caught.value)
    for part in ("distill.lmbda=1.5", "quantize.bits=5", "rollout.temperature", "smoke"):
        assert part in message


def test_an_unknown_preset_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(PresetError, match=r"did you mean 'quickstart'\?") as caught:
        load_preset("quikstart")
    for name in preset_names():
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.toml", b"a = ", "not valid TOML"),
        ("latin.toml", "description = 'é'".encode("latin-1"), "not valid TOML"),
        ("broken.json", b"{", "not valid JSON"),
        ("list.json", b"[]", "not an object of sections"),
        ("empty.toml", b"", "teacher is missing"),
    ],
)
def test_unreadable_preset_files_are_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PresetError, match=reason) as caught:
        load_preset(str(path), {"distill.lr": 1e-3})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("distill.lr=2e-5", 2e-5),
        ("distill.steps=12", 12),
        ("eval.tasks=['a', \"b\"]", ["a", "b"]),
        ("eval.tasks=[]", []),
        ("quantize.symmetric=true", True),
        ("teacher.model=Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Instruct-2507"),
        ("teacher.model=pkg:a/b.gguf", "pkg:a/b.gguf"),
        ("teacher.revision='123'", "123"),
        ("prompts.train=/data/a=b.jsonl", "/data/a=b.jsonl"),
        (" distill.seed = 3 ", 3),
    ],
)
def test_assignments_hold_toml_values_or_plain_text(text: str, value: object) -> None:
    (parsed,) = parse_assignments([text]).values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["distill.lr", "=5", "  =5", ""])
def test_malformed_assignments_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(PresetError, match=r"section\.field=value.*distill\.lr=1e-4"):
        parse_assignments([text])


def test_the_last_assignment_of_a_key_wins() -> None:
    assert parse_assignments(["distill.seed=1", "distill.seed=2"]) == {"distill.seed": 2}


def test_overrides_win_over_the_file_and_leave_the_rest_alone() -> None:
    base = load_preset("smoke")
    changed = load_preset("smoke", {"distill.lr": 0.5, "eval.tasks": ["x", "y"]})
    assert changed.distill.lr == 0.5 != base.distill.lr
    assert changed.eval.tasks == ("x", "y")
    restored = build_preset(
        changed.model_dump(), {"distill.lr": base.distill.lr, "eval.tasks": base.eval.tasks}, origin="test"
    )
    assert restored == base


def test_a_value_is_not_a_section() -> None:
    with pytest.raises(PresetError, match=r"not a section"):
        load_preset("smoke", {"distill.lr.x": 1})


def test_with_value_does_not_touch_its_input() -> None:
    tree: dict[str, Any] = {"a": {"b": 1, "c": 2}}
    assert with_value(tree, ["a", "b"], 5) == {"a": {"b": 5, "c": 2}}
    assert tree == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("name", preset_names())
def test_a_resolved_preset_reads_back_equal(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    path = tmp_path / "preset.json"
    path.write_text(preset.model_dump_json(indent=2))
    assert load_preset(str(path)) == preset


def test_known_keys_cover_every_field_once() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert keys[:2] == ["description", "teacher.model"]
    assert {f"distill.{name}" for name in DistillSection.model_fields} <= set(keys)


def test_nothing_near_gives_no_suggestion() -> None:
    assert suggest("zzzzzzzz", known_keys()) == ""


def other(field: Any, value: Any) -> Any:
    """Return another value for a field, of the same kind."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return ("x",) if isinstance(value, tuple) else f"{value}x"


def changes(section: Section) -> list[tuple[str, Section]]:
    """List a section's copies with one field changed."""
    fields = type(section).model_fields
    return [
        (name, section.model_copy(update={name: other(field, getattr(section, name))}))
        for name, field in fields.items()
    ]


@pytest.mark.parametrize(
    "section", [QuantizeSection(), RolloutSection(), DistillSection()], ids=lambda s: type(s).__name__
)
def test_an_identity_changes_with_every_field_of_a_section(section: Section) -> None:
    copies = changes(section)
    names = {identity("stage", {"section": copy}, INPUTS) for _, copy in copies}
    assert len(names) == len(copies)
    assert identity("stage", {"section": section}, INPUTS) not in names


def test_what_a_store_is_identified_by_says_of_engines_only_another_than_kdctls_own() -> None:
    own = RolloutSection().model_dump(mode="json")
    assert own.pop("engine") == "transformers"
    for name in ("url", "serve", "restart", "weights", "timeout_s", "lag"):  # where, not which; lag 0 was the only one
        del own[name]
    assert RolloutSection().decisive() == own
    assert RolloutSection(engine="mine").decisive() == own | {"engine": "mine"}
    served = RolloutSection(engine="server", url=("http://one:1",), restart="load {weights}", timeout_s=9.0)
    assert served.decisive() == own | {"engine": "server"}
    assert served.model_copy(update={"lag": 1}).decisive() == own | {"engine": "server", "lag": 1}


def test_an_identity_changes_with_stage_inputs_and_their_names() -> None:
    sections = {"distill": DistillSection()}
    names = [
        identity("distill", sections, INPUTS),
        identity("rollout", sections, INPUTS),
        identity("distill", {"other": DistillSection()}, INPUTS),
        identity("distill", sections, INPUTS | {"teacher": "cccc"}),
        identity("distill", sections, INPUTS | {"more": "cccc"}),
        identity("distill", sections, {"teacher": "bbbb", "student": "aaaa"}),
        identity("distill", {}, INPUTS),
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


def test_an_identity_does_not_change_with_order_or_spelling() -> None:
    one = identity("s", {"a": DistillSection(), "b": QuantizeSection()}, INPUTS)
    assert one == identity("s", {"b": QuantizeSection(), "a": DistillSection()}, dict(reversed(INPUTS.items())))
    spelled = DistillSection.model_validate({"lr": "0.0001", "lmbda": 0})
    assert identity("s", {"a": spelled, "b": QuantizeSection()}, INPUTS) == one
    assert identity("s", {"a": DistillSection().model_dump(mode="json"), "b": QuantizeSection()}, INPUTS) == one


def test_an_identity_is_the_same_in_every_process() -> None:
    code = (
        "from kdctl.config.resolve import identity, load_preset\n"
        "preset = load_preset('smoke')\n"
        "print(identity('s', {'a': preset.distill, 'b': preset.eval}, {'x': '1', 'y': '2'}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
    preset = load_preset("smoke")
    assert found == {identity("s", {"a": preset.distill, "b": preset.eval}, {"x": "1", "y": "2"}) + "\n"}


def test_canonical_text_has_one_spelling() -> None:
    assert canonical({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'
    assert json.loads(canonical({"x": 1e-5})) == {"x": 1e-5}


def test_every_section_is_a_model_that_can_be_hashed() -> None:
    for name, field in Preset.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and not field.is_required():
            assert len(identity("s", {name: field.default}, {})) == 16


def test_an_override_is_blamed_and_not_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    path.write_text(load_preset("smoke").model_dump_json())
    with pytest.raises(PresetError, match=r"^set on top of preset .*: distill\.lmbda=2"):
        load_preset(str(path), {"distill.lmbda": 2})
    with pytest.raises(
        PresetError, match=r"^preset .* with distill\.max_tokens set on top of it: distill\.max_tokens=9"
    ):
        load_preset(str(path), {"distill.max_tokens": 9})
    path.write_text('{"teacher": {"model": "m"}, "distill": {"lmbda": 3}}')
    with pytest.raises(PresetError, match=r"^preset .*: distill\.lmbda=3.*; set on top of preset .*: distill\.beta=2"):
        load_preset(str(path), {"distill.beta": 2})


@pytest.mark.parametrize("text", ["1\nx = 2", "[" * 5000, "9" * 5000, "1 # one", "'a'\n[b]"])
def test_what_is_not_one_toml_value_is_text_as_it_stands(text: str) -> None:
    assert parse_value(text) == (1 if "#" in text else text)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff", "line\nline", ""])
def test_a_name_that_no_file_can_have_is_no_preset(name: str) -> None:
    with pytest.raises(PresetError, match="no preset"):
        load_preset(name)


@pytest.mark.parametrize("targets", [("../../x",), tuple(f"*.{i}_proj" for i in range(99))])
def test_a_variant_is_one_folder_whatever_its_settings(targets: tuple[str, ...]) -> None:
    base = load_preset("smoke")

    def named(**changes: object) -> str:
        return variant_name(base.model_copy(update={"distill": base.distill.model_copy(update=changes)}), base)

    name = named(train="lora", lora_targets=targets)
    assert "/" not in name
    assert len(name) < 100
    assert name != named(lora_targets=(*targets, "y/z"))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("eval.tasks", "arc", 'eval.tasks is a list, as in ["a", "b"]'),
        ("quantize", 4, "quantize is a section"),
        ("prompts.train", "", "prompts.train must not be empty"),
        ("distill.weight_decay", 1e9, "lower distill.weight_decay"),
    ],
)
def test_the_way_out_is_said_where_a_value_is_of_another_kind(key: str, value: object, says: str) -> None:
    with pytest.raises(PresetError, match=re.escape(says)):
        load_preset("smoke", {key: value})
