"""The models that are refused, and those that are loaded."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GraniteConfig

from kdctl.base.errors import ModelError
from kdctl.config.resolve import load_preset
from kdctl.model.configuration import read_config
from kdctl.model.load import from_tensors, linear_shapes, load_model, pick_device, skeleton
from kdctl.model.tokenizer import check_vocabulary, load_tokenizer
from kdctl.stages.context import open_run

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}


# --- models that are refused ------------------------------------------------------------------------------------------


def test_quantized_teacher_is_refused_before_any_weight_is_read(tmp_path):
    teacher = tmp_path / "teacher"
    config = tiny.tiny_config().to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(config))
    preset = load_preset("smoke", {"teacher.model": str(teacher)})
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        open_run(preset, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "extra"), [(Gemma3TextConfig, {"final_logit_softcapping": 5.0}), (GraniteConfig, {"logits_scaling": 8.0})]
)
def test_logits_changed_after_the_head_are_refused(tmp_path, kind, extra):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**SMALL, head_dim=16, **extra)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="after the output head"):
        load_model(tmp_path, torch.float32, CPU)
    neutral = dict.fromkeys(extra, None if kind is Gemma3TextConfig else 1.0)
    config = json.loads((tmp_path / "config.json").read_text()) | neutral
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path, torch.float32, CPU).config.model_type == config["model_type"]


def test_model_with_missing_tensor_is_refused(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(tmp_path, torch.bfloat16, CPU)


def test_damaged_or_foreign_weights_are_refused(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, torch.bfloat16, CPU)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("text", "match"), [("{bad", "configuration cannot be read"), ('{"model_type": "t5"}', "encoder with a decoder")]
)
def test_unusable_configuration_is_refused(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=match):
        skeleton(read_config(tmp_path))


def test_tokenizer_without_chat_template_is_refused(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer of some/base has no chat template"):
        load_tokenizer(tmp_path, "some/base")


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_vocabulary_guard_gives_both_numbers(tokenizer):
    check_vocabulary(tokenizer, tiny.tiny_config(vocab_size=259))
    with pytest.raises(ModelError, match=r"258 is outside the model's vocabulary of 258"):
        check_vocabulary(tokenizer, tiny.tiny_config(vocab_size=258))


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(ModelError, match=r"runtime\.device=cuda"):
        pick_device("cuda")


# --- what is read off a model -----------------------------------------------------------------------------------------


def test_linear_shapes_leave_out_the_head(tiny_dir, teacher):
    shapes = linear_shapes(skeleton(read_config(tiny_dir)))
    kinds = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    expected = {f"model.layers.{i}.{part}.{leaf}" for i in (0, 1) for part, leaves in kinds.items() for leaf in leaves}
    assert shapes.keys() == expected
    for name, shape in shapes.items():
        assert teacher.get_parameter(f"{name}.weight").shape == shape


def test_model_from_its_own_tensors_is_the_same_model(teacher):
    twin = from_tensors(teacher.config, teacher.state_dict(), torch.bfloat16).eval()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_loaded_model_is_frozen_and_in_evaluation_mode(teacher):
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# --- tensors that the network does not use, or that two readers would use differently ---------------------------------


def altered(source, folder, **config: object):
    """Copy a model folder with other values in config.json and return its tensors."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return load_file(folder / "model.safetensors")


def test_tensors_that_the_network_does_not_use_are_refused_unless_it_makes_them_itself(tiny_dir, tmp_path):
    tensors = altered(tiny_dir, tmp_path)
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | harmless, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(tmp_path, torch.bfloat16, CPU)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(tensors | bias, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors of the files have no place .*layers\.0\.self_attn\.q_proj\.bias"):
        load_model(tmp_path, torch.bfloat16, CPU)


def test_weights_that_are_codes_are_refused(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir, tmp_path / "codes")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (100 * tensors[name]).to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is stored as I8"):
        load_model(folder, torch.float32, CPU)


def test_an_adapter_beside_a_model_is_refused(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir, tmp_path / "adapted")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(folder, torch.float32, CPU)


def test_a_head_of_its_own_beside_tied_embeddings_is_refused_unless_they_are_equal(tiny_dir, tmp_path):
    tensors = altered(tiny_dir, tmp_path)
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(tmp_path, torch.bfloat16, CPU)
    save_file(tensors | {"lm_head.weight": embeddings * 2}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="tie_word_embeddings=true, but the files hold an output head of their own"):
        load_model(tmp_path, torch.bfloat16, CPU)
    altered(tmp_path, tmp_path / "mended", tie_word_embeddings=False)
    load_model(tmp_path / "mended", torch.bfloat16, CPU)


def test_embeddings_of_another_size_than_the_configuration_says_are_one_short_message(tiny_dir, tmp_path):
    altered(tiny_dir, tmp_path, vocab_size=259)
    name = r"model\.embed_tokens\.weight is \(264, 64\) in the files and \(259, 64\) by config\.json"
    with pytest.raises(ModelError, match=name):
        load_model(tmp_path, torch.bfloat16, CPU)


@pytest.mark.parametrize("choice", ["eager", "flash_attention_2", "somebody/kernel"])
def test_attention_that_a_file_chooses_is_not_taken(tiny_dir, tmp_path, choice):
    altered(tiny_dir, tmp_path, _attn_implementation=choice, attn_implementation=choice)
    load_model(tmp_path, torch.bfloat16, CPU)
