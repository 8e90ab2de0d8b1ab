"""A tokenizer that cannot be used, or whose templates name files elsewhere, is refused when it is loaded."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdctl.base.errors import ModelError
from kdctl.model.configuration import read_config
from kdctl.model.tokenizer import check_vocabulary, load_tokenizer


def edited(source: Path, folder: Path, **changes: object) -> Path:
    """Copy a tokenizer with other settings and no template of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/b", "", "a\\b"])
def test_templates_are_files_of_the_folder(tiny_dir: Path, tmp_path: Path, name: str) -> None:
    named = [{"name": "default", "template": "x"}, {"name": name, "template": "y"}]
    with pytest.raises(ModelError, match="would lead elsewhere"):
        load_tokenizer(edited(tiny_dir, tmp_path, chat_template=named))


def test_several_templates_are_kept(tiny_dir: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    found = load_tokenizer(edited(tiny_dir, tmp_path, chat_template=named))
    assert found.chat_template == {"default": "x", "tool_use": "y"}


def test_a_vocabulary_without_its_token_for_the_unknown_is_refused_before_any_text(
    tiny_dir: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_dir, tmp_path, chat_template="x")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"] |= {"unk_token": "<unk>", "vocab": {"a": 0}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"cannot be loaded.*<unk>"):
        load_tokenizer(folder)


def test_no_class_of_the_folder_is_imported(tiny_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_dir, tmp_path, chat_template="x", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_several_tokenizers_in_one_are_refused(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SimpleNamespace(chat_template="x")
    monkeypatch.setattr("kdctl.model.tokenizer.AutoTokenizer.from_pretrained", lambda *_, **__: pair)
    with pytest.raises(ModelError, match="SimpleNamespace is several tokenizers in one"):
        load_tokenizer(tiny_dir)


def test_a_tokenizer_that_is_missing_or_too_large_is_one_message(tiny_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {f"more{index}": 300 + index for index in range(20)}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="largest id 319 is outside the model's vocabulary of 264"):
        check_vocabulary(load_tokenizer(folder), read_config(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"it has no tokenizer\.json"):
        load_tokenizer(folder)
