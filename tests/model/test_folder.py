"""What a model folder holds: weights, stop tokens, and the fingerprint of both."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdctl.base.errors import ModelError
from kdctl.model.folder import fingerprint


def test_pickled_weights_are_refused(tiny_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not open pickled weights"):
        fingerprint(tmp_path)


def test_other_stop_tokens_are_another_fingerprint(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    assert fingerprint(tmp_path) == fingerprint(tiny_dir)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    assert fingerprint(tmp_path) != fingerprint(tiny_dir)


def test_fingerprint_follows_weights_and_configuration_not_place(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "copy")
    folder = tmp_path / "copy"
    before = fingerprint(tiny_dir)
    assert fingerprint(folder) == before
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    same = fingerprint(folder)
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed = fingerprint(folder)
    assert changed != same
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert fingerprint(folder) == same
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) not in {same, changed}
