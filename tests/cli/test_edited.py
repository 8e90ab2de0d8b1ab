"""What was edited in a preset.json is named where a record tells."""

import json
from pathlib import Path

import pytest

from kdctl.base.errors import PresetError
from kdctl.base.sums import with_sum
from kdctl.cli.edited import edited_settings
from kdctl.cli.options import resolve_preset
from kdctl.config.resolve import load_preset


def test_the_edited_setting_is_named_with_what_it_was(tmp_path: Path) -> None:
    preset = load_preset("smoke")
    text = with_sum(preset.model_dump_json(indent=2) + "\n")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "quantize.json").write_text(
        json.dumps({"bits": 4, "group_size": preset.quantize.group_size})
    )
    (tmp_path / "preset.json").write_text(text)
    assert edited_settings(tmp_path) == ""
    assert resolve_preset(None, tmp_path, None, {}) == preset
    (tmp_path / "preset.json").write_text(text.replace('"bits": 4', '"bits": 3'))
    with pytest.raises(PresetError, match=r"was edited \(quantize.bits is 3 and was 4\): .* put them back, or keep"):
        resolve_preset(None, tmp_path, None, {})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"quantize": 4}'])
def test_where_nothing_can_be_told_nothing_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "preset.json").write_text(text)
    assert edited_settings(tmp_path) == ""
