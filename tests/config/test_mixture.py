"""Several sources of prompts: names, weights, and what is refused."""

import pytest

from kdctl.base.errors import PresetError
from kdctl.config.mixture import MixedSource, mix_name, parse_mix
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset, variant_name

SOURCES = [{"source": "kdctl", "weight": 3}, {"source": "owner/web-text", "columns": {"text": "body"}}]


def preset(**prompts: object) -> Preset:
    return load_preset(
        "smoke", {"prompts.train": SOURCES} | {f"prompts.{key}": value for key, value in prompts.items()}
    )


def test_a_mix_replaces_the_weights_and_leaves_out_what_it_does_not_name() -> None:
    weights = {source.label: source.weight for source in preset().prompts.sources}
    assert weights == {"kdctl": 3, "web-text": 1}
    found = preset(mix="web-text:0.5, kdctl:2").prompts
    assert [(source.label, source.weight) for source in found.sources] == [("kdctl", 4), ("web-text", 1)]
    assert found == preset(mix="kdctl:4,web-text:1").prompts  # equal mixes are written in one way
    assert preset().prompts.shares == "kdctl:3,web-text:1"
    assert [source.label for source in preset(mix="web-text:1").prompts.sources] == ["web-text"]


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("kdctl", "kdctl"),
        ("owner/set", "set"),
        ("/data/my rows.v2.jsonl.gz", "my-rows"),
        ("pkg:package/folder/part-0.arrow", "part-0"),
        ("C:\\data\\rows.csv", "rows"),
        ("..", "source"),
    ],
)
def test_a_source_is_called_after_the_last_part_of_it(source: str, label: str) -> None:
    assert MixedSource(source=source).label == label
    assert MixedSource(source=source, name="other").label == "other"


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:x", "a:0", "a:-1", "a:nan", "a:inf", "a:1,a:2", "a:1,,b:1"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no mix; write each source once"):
        parse_mix(text)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"train": "kdctl", "mix": "kdctl:1"}, "weighs several sources, and train is one"),
        ({"mix": "kdctl:1,webtext:2"}, "mix names webtext; the sources of train are kdctl, web-text"),
        ({"train": []}, "train is an empty list"),
        ({"train": [{"source": "a"}, {"source": "b/a"}]}, "two sources of train are called 'a'"),
        (
            {"train": [{"sorce": "a"}]},
            r"unknown key prompts\.train\.0\.sorce \(did you mean 'prompts\.train\.0\.source'",
        ),
        ({"train": [{"source": "a", "weight": 0}]}, r"prompts\.train\.0\.weight=0"),
        ({"train": [{"source": "a", "name": "a:b"}]}, "'a:b' cannot name a source"),
        ({"train": [{"source": "a", "columns": {"query": "q"}}]}, "what a column can be is messages, prompt, answer"),
        (
            {"train": [{"source": "a", "columns": {"text": "t", "prompt": "p"}}]},
            "a row is text, or messages, or a prompt",
        ),
        ({"split": "test"}, "give each source of train its own"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(prompts: dict[str, object], said: str) -> None:
    with pytest.raises(PresetError, match=said):
        preset(**prompts)


def test_a_variant_is_named_after_its_mix_where_that_is_not_the_folders_own() -> None:
    base = preset()
    assert variant_name(preset(mix="web-text:2,kdctl:4"), base).endswith("_mix-kdctl-2_web-text-1")
    assert variant_name(base, preset(mix="kdctl:2")).endswith("_mix-own")
    assert "mix" not in variant_name(base, base)
    assert "mix" not in variant_name(preset(mix="kdctl:2"), preset(mix="kdctl:2"))
    assert len(mix_name(",".join(f"source{i}:1" for i in range(50)))) == 16
