"""The text part of composite models: its numbers are those of the whole for text, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMultimodalLM,
    AutoTokenizer,
    AyaVisionConfig,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    Phi4MultimodalConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from kdctl.base.errors import ModelError
from kdctl.config.preset import Preset
from kdctl.model.composite import text_config
from kdctl.model.composite_tokenizer import check_kept, text_tokenizer
from kdctl.model.configuration import read_config
from kdctl.model.load import load_model
from kdctl.model.reference import cache_of, find_config, model_folder
from kdctl.model.stops import stop_ids
from kdctl.model.teacher import Teacher
from kdctl.model.tokenizer import load_tokenizer
from tests.model.test_teacher import Notes

CPU = torch.device("cpu")
TEXT: dict[str, Any] = tiny.SIZES | {"head_dim": 16, "bos_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}


def llama(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **TEXT, **changes}


KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT | {"sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=260
    ),
    "llava": lambda: LlavaConfig(text_config=llama(), vision_config=SIGLIP, image_token_index=260),
    "mistral3, tied outside": lambda: Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, "tie_word_embeddings": False},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16},
        image_token_index=260,
        tie_word_embeddings=True,
    ),
    "mistral3, tied inside": lambda: Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, "tie_word_embeddings": True},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16},
        image_token_index=260,
        tie_word_embeddings=False,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN, image_token_id=260, video_token_id=261
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN, image_token_id=260, video_token_id=261
    ),
    "smolvlm": lambda: SmolVLMConfig(text_config=llama(), vision_config=VISION, image_token_id=260),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Save a composite model of random weights with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.15 * noise)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return model


def changed(path: Path, **changes: Any) -> None:
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (tree | changes).items() if value is not ...}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_gives_the_log_probabilities_of_the_whole(kind: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / "model", KINDS[kind]())
    ids = torch.arange(1, 250).unsqueeze(0)
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits
        folder = model_folder(str(tmp_path / "model"), torch.float32)
        model = load_model(folder, torch.float32, CPU)
        assert torch.equal(model(input_ids=ids).logits, wanted)
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight  # pyright: ignore
    assert model.config.tie_word_embeddings is tied
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if "vision" in name or "visual" in name or "projector" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_part_is_described_before_it_is_converted_as_it_is_afterwards(kind: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", KINDS[kind]())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    before = find_config(str(tmp_path / "alone"), torch.bfloat16).to_dict()
    after = read_config(model_folder(str(tmp_path / "model"), torch.bfloat16)).to_dict()
    unlike = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert unlike <= {"_name_or_path", "architectures", "dtype"}
    assert after["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["generation", "outer", "inner", "nowhere"])
def test_completions_end_where_those_of_the_whole_end(case: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    saved(place, KINDS["llava"]())
    if case != "generation":
        (place / "generation_config.json").unlink()
        inner = json.loads((place / "config.json").read_text())["text_config"]
        inner["eos_token_id"] = None if case == "nowhere" else [5, 7]
        changed(place / "config.json", text_config=inner, eos_token_id=[9, 11] if case == "outer" else ...)
    else:
        changed(place / "generation_config.json", eos_token_id=[3, 4])
    folder = model_folder(str(place), torch.float32)
    tokenizer = load_tokenizer(folder)
    found = stop_ids(folder, tokenizer, 264)
    assert found == stop_ids(place, tokenizer, 264)
    assert set(found) == {258} | {"generation": {3, 4}, "outer": {9, 11}, "inner": {5, 7}, "nowhere": set()}[case]
    assert (folder / "generation_config.json").exists() is (case == "generation")


def rename(tensors: dict[str, torch.Tensor], old: str, new: str | None) -> None:
    tensor = tensors.pop(next(name for name in tensors if old in name))
    if new is not None:
        tensors[new] = tensor


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("layers.1.mlp.down_proj", None, "1 tensors are missing .*layers.1.mlp.down_proj"),
        ("lm_head", None, "1 tensors are missing .*lm_head"),
        ("layers.1.mlp.down_proj", "language_model.model.layers.1.mlp.other.weight", "tensors are missing"),
        ("vision_tower", "model.language_model.layers.1.mlp.other.weight", "1 tensors of the files .*mlp.other.weight"),
        ("vision_tower", "stranger.weight", "1 tensors of the files have no place .*stranger.weight"),
    ],
    ids=str,
)
def test_a_tensor_that_is_missing_or_left_over_is_named(tmp_path: Path, old: str, new: str | None, told: str) -> None:
    saved(tmp_path, KINDS["llava"]())
    tensors = load_file(tmp_path / "model.safetensors")
    rename(tensors, old, new)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=told):
        model_folder(str(tmp_path), torch.float32)
    assert not (tmp_path / "cache" / "text").exists()


def test_what_only_the_other_parts_lack_or_have_too_much_is_no_matter(tmp_path: Path) -> None:
    saved(tmp_path, KINDS["llava"]())
    tensors = load_file(tmp_path / "model.safetensors")
    vision = next(name for name in tensors if "vision_tower" in name and name.endswith("bias"))
    tensors[vision.replace("bias", "another")] = tensors.pop(vision)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(model_folder(str(tmp_path), torch.float32), torch.float32, CPU)


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, LlavaConfig(text_config=llama(), vision_config=SIGLIP, tie_word_embeddings=False))
    changed(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="tie_word_embeddings=true, but the files hold an output head of their own"):
        model_folder(str(tmp_path), torch.float32)


def test_a_part_that_the_whole_computes_with_otherwise_is_refused(tmp_path: Path) -> None:
    cohere = {"model_type": "cohere2", **TEXT, "logit_scale": 0.0625}
    saved(tmp_path, AyaVisionConfig(text_config=cohere, vision_config=SIGLIP, image_token_index=260))
    with pytest.raises(ModelError, match=r"'aya_vision' is a composite .* gives other numbers for text"):
        model_folder(str(tmp_path), torch.float32)
    assert not (tmp_path / "cache" / "text").exists()


def test_a_part_that_cannot_be_told_apart_or_is_quantized_is_refused(tmp_path: Path) -> None:
    Phi4MultimodalConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'phi4_multimodal' is a composite model.*it cannot be told apart"):
        text_config(tmp_path)
    saved(tmp_path, KINDS["llava"]())
    changed(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"already quantized \(fp8\)"):
        model_folder(str(tmp_path), torch.float32)


def test_a_conversion_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    place = tmp_path / "model"
    saved(place, KINDS["llava"]())
    first = model_folder(str(place), torch.float32)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert model_folder(str(place), torch.float32) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    (first / "model.safetensors").write_bytes(b"cut")
    load_model(model_folder(str(place), torch.float32), torch.float32, CPU)
    assert cache_of(place, torch.bfloat16) != first
    changed(place / "tokenizer_config.json", eos_token="<|endoftext|>")
    second = model_folder(str(place), torch.float32)
    assert second != first
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "other.jinja").write_text(tiny.TEMPLATE)
    third = model_folder(str(place), torch.float32)
    assert third != second
    assert load_tokenizer(third).chat_template == {"default": tiny.TEMPLATE, "other": tiny.TEMPLATE}


def test_what_is_left_out_is_said(smoke: Preset, tmp_path: Path) -> None:
    place = tmp_path / "model"
    saved(place, KINDS["gemma3"]())
    settings = smoke.teacher.model_copy(update={"model": str(place)})
    for lines in (2, 1):
        teacher = Teacher(settings, smoke.runtime, Notes())
        assert teacher.folder() == cache_of(place, teacher.dtype)
        assert isinstance(teacher.reporter, Notes)
        assert f"using the text part of {place}; the parts for pictures or sound are left out" in teacher.reporter.lines
        assert len(teacher.reporter.lines) == lines


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)


@pytest.mark.parametrize("processor", [False, True])
def test_a_template_of_parts_takes_text(tmp_path: Path, processor: bool) -> None:
    saved(tmp_path, KINDS["smolvlm"]())
    template = "\n" + PARTS
    (tmp_path / "chat_template.jinja").unlink()
    if processor:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    else:
        (tmp_path / "chat_template.jinja").write_text(template)
    said = ("", " a\nb ", "c")
    asked = [{"role": "user", "content": text} for text in said]
    listed = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in said]
    found = load_tokenizer(model_folder(str(tmp_path), torch.float32))
    own = AutoTokenizer.from_pretrained(tmp_path)
    wanted = own.apply_chat_template(listed, chat_template=template, tokenize=False)
    assert found.apply_chat_template(asked, tokenize=False) == wanted
    assert found.apply_chat_template(listed, tokenize=False) == wanted
    assert " a\nb " in str(wanted)


def test_a_template_that_leaves_out_what_is_said_is_refused(tmp_path: Path) -> None:
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    assert text_tokenizer(tmp_path).chat_template == tiny.TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ModelError, match="leaves out the text of messages"):
        text_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('tools') }}")
    assert "raise_exception" in str(text_tokenizer(tmp_path).chat_template)


def test_a_tokenizer_that_would_read_otherwise_beside_the_part_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tokenizer.unk_token = "<|endoftext|>"
    check_kept(tmp_path, tokenizer, tmp_path)
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ModelError, match=r"would read other tokens \(eos_token\)"):
        check_kept(tmp_path, tokenizer, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": [5, "a"]},
        {"text_config": {"model_type": "qwen2_5_vl_text", "bos_token_id": [5]}},
        {"text_config": {"model_type": []}},
        {"vision_config": {"depth": "many"}},
        {"vision_config": []},
    ],
    ids=str,
)
def test_damaged_values_of_any_part_are_one_message(tmp_path: Path, changes: dict[str, Any]) -> None:
    KINDS["qwen2_5_vl"]().save_pretrained(tmp_path)
    changed(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError) as caught:
        find_config(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_are_told_by_their_tensor(tmp_path: Path) -> None:
    saved(tmp_path, KINDS["llava"]())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name and "vision" not in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"hold NaN in .*layers.1.mlp.up_proj"):
        model_folder(str(tmp_path), torch.float32)
