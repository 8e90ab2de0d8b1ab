"""The teacher: nothing is fetched, converted or loaded before a method says so, and each method works once."""

import inspect
from pathlib import Path

import pytest
import torch

from kdctl.base.progress import Silent
from kdctl.config.preset import Preset
from kdctl.model import reference, teacher
from kdctl.model.folder import fingerprint
from kdctl.model.teacher import Teacher


class Notes(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def teacher_of(smoke: Preset, **overrides: object) -> Teacher:
    """Describe the tiny teacher."""
    return Teacher(smoke.teacher.model_copy(update=overrides), smoke.runtime, Notes())


def test_reading_attributes_fetches_and_loads_nothing(smoke: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an attribute did work")

    for name in ("load_model", "model_folder", "locate", "find_config", "fingerprint", "load_tokenizer"):
        monkeypatch.setattr(teacher, name, refuse)
    found = teacher_of(smoke)
    read = {name: value for name, value in inspect.getmembers(found) if not callable(value)}
    assert {"device", "dtype", "loaded", "offline", "settings"} <= read.keys()
    assert not found.loaded


def test_each_method_works_once(smoke: Preset, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = teacher_of(smoke)
    first = [found.config(), found.folder(), found.fingerprint(), found.tokenizer(), found.stop_ids(), found.load()]
    assert first[1:3] == [tiny_dir, fingerprint(tiny_dir)]
    assert found.load().dtype == torch.bfloat16
    for name in ("load_model", "model_folder", "find_config", "fingerprint", "load_tokenizer", "stop_ids"):
        monkeypatch.setattr(teacher, name, None)
    again = [found.config(), found.folder(), found.fingerprint(), found.tokenizer(), found.stop_ids(), found.load()]
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_a_forgotten_model_is_loaded_again_with_the_same_weights(smoke: Preset) -> None:
    found = teacher_of(smoke)
    before = found.load()
    found.forget()
    assert not found.loaded
    after = found.load()
    assert after is not before
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_conversion_is_said_once_and_only_where_it_happens(
    smoke: Preset, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cached = tmp_path / "tiny.gguf", tmp_path / "cached"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(teacher, "cache_of", lambda *_: cached)
    monkeypatch.setattr(reference, "convert_gguf", lambda *_: tiny_dir)
    found = teacher_of(smoke, model=str(file))
    assert [found.folder(), found.folder()] == [tiny_dir] * 2
    assert isinstance(found.reporter, Notes)
    assert found.reporter.lines == ["converting tiny.gguf to safetensors, once"]
    cached.mkdir()
    other = teacher_of(smoke, model=str(file))
    assert other.folder() == tiny_dir
    assert isinstance(other.reporter, Notes)
    assert other.reporter.lines == []
