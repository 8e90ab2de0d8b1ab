"""What a model folder holds: weights, stop tokens, and the fingerprint of both."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdctl.base.errors import ModelError
from kdctl.model.folder import StoredTensors, fingerprint, read_tensors, weight_files, weights_bytes
from kdctl.model.load import load_model
from kdctl.model.tokenizer import load_tokenizer


@pytest.fixture
def shards(tiny_dir, tmp_path):
    """Return a folder with two shards and their index."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def changed_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_only_files_that_the_index_names_count(shards):
    size, before, names = weights_bytes(shards), fingerprint(shards), set(StoredTensors(shards))
    shutil.copy(shards / "model-00001-of-00003.safetensors", shards / "consolidated.safetensors")
    assert (weights_bytes(shards), fingerprint(shards), set(StoredTensors(shards))) == (size, before, names)
    assert weight_files(shards) == sorted(shards.glob("model-*.safetensors"))


@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32])
def test_the_size_does_not_depend_on_how_weights_are_cut(shards, tiny_dir, tmp_path, norms):
    for path in shards.glob("model-*.safetensors"):
        tensors = {name: tensor.to(norms) if tensor.ndim == 1 else tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    save_file(dict(read_tensors(shards)), tmp_path / "one.safetensors", {"format": "pt"})
    assert weights_bytes(shards) == (tmp_path / "one.safetensors").stat().st_size
    assert weights_bytes(tiny_dir) == (tiny_dir / "model.safetensors").stat().st_size


def test_one_file_counts_before_an_index_as_for_transformers(shards, tiny_dir):
    shutil.copy(tiny_dir / "model.safetensors", shards / "model.safetensors")
    assert weight_files(shards) == [shards / "model.safetensors"]
    assert fingerprint(shards) == fingerprint(tiny_dir)
    loaded = AutoModelForCausalLM.from_pretrained(shards, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in read_tensors(shards))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", ".."])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(shards, file):
    changed_index(shards, lambda found: found.update({"model.norm.weight": file}))
    with pytest.raises(ModelError, match=r"names .* which is no \.safetensors file of its folder"):
        weight_files(shards)


def test_an_index_that_disagrees_with_its_files_is_refused(shards):
    files = sorted(path.name for path in shards.glob("model-*.safetensors"))
    original = (shards / "model.safetensors.index.json").read_bytes()
    changes = [
        (lambda found: found.update({"model.norm.weight": "model-9.safetensors"}), "is not there"),
        (lambda found: found.update({"model.norm.weight": files[0]}), r"model\.norm\.weight is not in"),
        (lambda found: found.update({"another": files[0]}), "another is not in"),
        (lambda found: found.clear(), "no list of tensors and files"),
        (lambda found: found.update({"model.norm.weight": 3}), "no list of tensors and files"),
    ]
    for change, message in changes:
        (shards / "model.safetensors.index.json").write_bytes(original)
        changed_index(shards, change)
        with pytest.raises(ModelError, match=message):
            weight_files(shards)
    for text in ("", "[]", "{}", '{"weight_map": {"a": "b"}}', "\x00", "[" * 100_000):
        (shards / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be read as an index"):
            weight_files(shards)


def test_a_tensor_in_two_files_is_refused(shards):
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    with pytest.raises(ModelError, match="and in another file of the index"):
        weight_files(shards)


def header(text):
    return len(text).to_bytes(8, "little") + text + b"x"


HEADERS = {
    "huge length": b"\xff" * 8,
    "short": b"\x08\x00",
    "empty": b"",
    "no JSON": header(b"abcd"),
    "unknown type": header(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}'),
    "outside": header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_one_message(tiny_dir, tmp_path, name):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        fingerprint(tmp_path)


def test_a_pointer_of_git_lfs_is_named(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"
    )
    with pytest.raises(ModelError, match="git lfs pull"):
        fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.safetensors", "b.safetensors"], "neither a model.safetensors nor"),
        (["tf_model.h5"], "only weights for TensorFlow"),
        (["flax_model.msgpack"], "only weights for Flax"),
        ([], "it holds config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path, files, message):
    for name in ["config.json", *files]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=message):
        weight_files(tmp_path)


def test_pickled_weights_are_refused(tiny_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not open pickled weights"):
        fingerprint(tmp_path)


def test_pickles_beside_weights_are_left_alone(tiny_dir, tmp_path, monkeypatch):
    shutil.copytree(tiny_dir, tmp_path / "model")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "vocab.pkl"):
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load unpickles"))
    load_model(tmp_path / "model", torch.bfloat16, torch.device("cpu"))
    load_tokenizer(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


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
