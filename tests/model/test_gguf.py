"""GGUF files: every tensor and every key is used, or the file is refused by name and nothing is cached."""

from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import tiny
import torch
from gguf_files import FLOAT32, Change, Type, network, rewritten
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from kdctl.base.errors import ModelError
from kdctl.model.gguf_file import open_gguf
from kdctl.model.gguf_foreign import foreign_config
from kdctl.model.gguf_names import rope_factors
from kdctl.model.gguf_rope import of_factors
from kdctl.model.reference import convert_gguf

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES: dict[str, Any] = tiny.SIZES | {"max_position_embeddings": 512}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own cache of converted models."""
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(place: Path, model: PreTrainedModel, change: Change = lambda *_: None) -> Path:
    """Write a network as llama.cpp's converter does, changed."""
    fields, tensors = gguf_files.described(model)
    fields |= gguf_files.vocabulary(model.config.vocab_size)
    change(fields, tensors)
    return gguf_files.write(place, fields, tensors)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits(model)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits


def put(name: str, value: Any, kind: Type = Type.FLOAT32) -> Change:
    return lambda fields, _: fields.__setitem__(name, (value, kind, None))


def linear(fields: gguf_files.Fields, _: object) -> None:
    fields["llama.rope.scaling.type"] = ("linear", Type.STRING, None)
    fields["llama.rope.scaling.factor"] = (4.0, Type.FLOAT32, None)


def yarn(fields: gguf_files.Fields, _: object) -> None:
    fields["qwen2.rope.scaling.type"] = ("yarn", Type.STRING, None)
    fields["qwen2.rope.scaling.factor"] = (4.0, Type.FLOAT32, None)
    fields["qwen2.rope.scaling.original_context_length"] = (128, Type.UINT32, None)


def rope_freqs(config: LlamaConfig) -> Change:
    factors = rope_factors(config)
    assert factors is not None
    return lambda _, tensors: tensors.__setitem__("rope_freqs.weight", (factors.numpy(), FLOAT32))


def without_output_bias(_: object, tensors: gguf_files.Tensors) -> None:
    for name in [name for name in tensors if name.endswith("attn_output.bias")]:
        del tensors[name]


def of_length(original: int, **more: float) -> LlamaConfig:
    return LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"original_max_position_embeddings": original} | more)


SCALED = {f"llama3 {length}": of_length(length) for length in (64, 96, 256)}


def gemma(fields: gguf_files.Fields, _: object) -> None:
    for name, value in (("final_logit_softcapping", 5.0), ("attn_logit_softcapping", 50.0)):
        fields[f"gemma2.{name}"] = (value, Type.FLOAT32, None)
    fields["gemma2.attention.sliding_window"] = (99, Type.UINT32, None)


NETWORKS: dict[str, tuple[Any, Change]] = {name: (config, rope_freqs(config)) for name, config in SCALED.items()} | {
    "starcoder2": (
        Starcoder2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 99999.0}),
        lambda *_: None,
    ),
    "plain": (LlamaConfig(**SIZES), lambda *_: None),
    "linear": (LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}), linear),
    "biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), lambda *_: None),
    "wide heads": (LlamaConfig(**SIZES, head_dim=32), lambda *_: None),
    "qwen2": (Qwen2Config(**SIZES), lambda *_: None),
    "qwen3": (Qwen3Config(**SIZES, head_dim=32), lambda *_: None),
    "yarn": (
        Qwen2Config(
            **SIZES,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        yarn,
    ),
}


BANDS = [(200, 3.0, 2.0, 5.0), (100, 8.0, 1.0, 1.5), (8192, 8.0, 1.0, 4.0), (16384, 8.0, 1.0, 4.0), (77, 1.5, 1.0, 9.0)]


@pytest.mark.parametrize("theta", [100.0, 1e4, 5e5])
@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("band", BANDS)
def test_any_scaling_of_llama_3_is_found_in_its_factors(
    band: tuple[int, float, float, float], width: int, theta: float
):
    names = ("original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor")
    parameters = LLAMA3 | {"rope_theta": theta} | dict(zip(names, band, strict=True))
    one_head: dict[str, Any] = {"hidden_size": width, "num_attention_heads": 1, "max_position_embeddings": 2**62}
    factors = rope_factors(LlamaConfig(**one_head, rope_parameters=parameters))
    assert factors is not None
    found = of_factors(factors, theta, width, None)
    assert found is not None
    again = rope_factors(LlamaConfig(**one_head, rope_parameters=found))
    torch.testing.assert_close(torch.ones_like(factors) if again is None else again, factors, rtol=4e-6, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_file_computes_what_the_true_network_computes(tmp_path: Path, name: str):
    config, change = NETWORKS[name]
    model = network(config)
    folder = convert_gguf(written(tmp_path / "m.gguf", model, change), torch.float32)
    assert torch.equal(logits_of(folder), logits(model))


def test_what_transformers_does_not_read_of_a_gemma_is_read(tmp_path: Path):
    said: dict[str, Any] = {"query_pre_attn_scalar": 32, "sliding_window": 99, "final_logit_softcapping": 5.0}
    file = written(tmp_path / "m.gguf", network(Gemma2Config(**SIZES, head_dim=32, **said)), gemma)
    config = foreign_config(open_gguf(file)).to_dict()
    assert {name: config[name] for name in said} == said


def test_a_bias_that_llama_cpp_has_and_transformers_has_only_with_another_is_completed_with_zeros(tmp_path: Path):
    model = network(LlamaConfig(**SIZES, attention_bias=True))
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    folder = convert_gguf(written(tmp_path / "m.gguf", model, without_output_bias), torch.float32)
    assert torch.equal(logits_of(folder), logits(model))


def every_tensor() -> list[str]:
    _, tensors = gguf_files.described(network(LlamaConfig(**SIZES)))
    return sorted(name for name in tensors if "blk.0" not in name and name != "output.weight")


@pytest.mark.parametrize("name", every_tensor())
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, cache: Path, name: str):
    model = network(LlamaConfig(**SIZES))
    file = written(tmp_path / "m.gguf", model, lambda _, tensors: tensors.pop(name) and None)
    with pytest.raises(ModelError, match=f"lacks {name}"):
        convert_gguf(file, torch.float32)
    assert not list(cache.rglob("config.json"))


def extra(name: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.__setitem__(name, (np.ones(shape, np.float32), FLOAT32))


def templates(name: str) -> Change:
    def change(fields: gguf_files.Fields, _: object) -> None:
        for key in ("", f".{name}"):
            fields[f"tokenizer.chat_template{key}"] = ("x", Type.STRING, None)

    return change


def longrope(fields: gguf_files.Fields, _: object) -> None:
    fields["llama.rope.scaling.type"] = ("longrope", Type.STRING, None)


def cut_rows(_: object, tensors: gguf_files.Tensors) -> None:
    data, kind = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = (np.ascontiguousarray(data[1:]), kind)


def without(*names: str) -> Change:
    def change(fields: gguf_files.Fields, _: object) -> None:
        for name in names:
            del fields[name]

    return change


FOREIGN: dict[str, tuple[Change, str]] = {
    "no context": (without("starcoder2.context_length"), "does not say starcoder2.context_length"),
    "no epsilon": (without("starcoder2.attention.layer_norm_epsilon"), "does not say starcoder2.attention.layer_norm"),
    "as many heads of keys": (without("starcoder2.attention.head_count_kv"), "head_count_kv=4"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_foreign_file_leaves_out_is_what_llama_cpp_takes_or_refused(tmp_path: Path, cache: Path, name: str):
    change, message = FOREIGN[name]
    config, _ = NETWORKS["starcoder2"]
    file = written(tmp_path / "m.gguf", network(config), change)
    with pytest.raises(ModelError, match=message):
        convert_gguf(file, torch.float32)
    assert not list(cache.rglob("config.json"))


def test_a_part_that_turns_by_transformers_default_only_is_refused(tmp_path: Path):
    named: dict[str, Any] = SIZES | {"norm_epsilon": 1e-5}
    model = network(StableLmConfig(**named))
    with pytest.raises(ModelError, match=r"stablelm\.rope\.dimension_count=16"):
        foreign_config(open_gguf(written(tmp_path / "m.gguf", model)))
    told = put("stablelm.rope.dimension_count", 4, Type.UINT32)
    assert foreign_config(open_gguf(written(tmp_path / "told.gguf", model, told))).rope_parameters


BAD: dict[str, tuple[Change, str]] = {
    "normalised queries": (extra("blk.0.attn_q_norm.weight", 16), "holds.*attn_q_norm"),
    "sinks": (extra("blk.1.attn_sinks.weight", 4), "holds.*attn_sinks"),
    "a bias of one layer": (extra("blk.1.attn_q.bias", 64), "lacks blk.0.attn_q.bias"),
    "a name with slashes": (extra("../../etc/x", 4), "holds.*etc"),
    "long factors": (extra("rope_factors_long.weight", 8), "holds.*rope_factors_long"),
    "factors of no scaling": (
        lambda _, tensors: tensors.update({"rope_freqs.weight": (np.array([1, 2] * 4, np.float32), FLOAT32)}),
        "neither one number nor",
    ),
    "factors of another width": (extra("rope_freqs.weight", 4), "shape"),
    "longrope": (longrope, "rope.scaling.type='longrope'"),
    "other heads": (put("llama.attention.head_count_kv", 4, Type.UINT32), "another shape.*attn_k"),
    "no heads": (without("llama.attention.head_count"), "does not say llama.attention.head_count"),
    "zero heads": (put("llama.attention.head_count", 0, Type.UINT32), "head_count=0 is not a count"),
    "heads as text": (put("llama.attention.head_count", "4", Type.STRING), "head_count='4' is not a count"),
    "a rotary part": (put("llama.rope.dimension_count", 8, Type.UINT32), "rope.dimension_count=8"),
    "other values": (put("llama.attention.value_length", 8, Type.UINT32), "value_length=8"),
    "no number": (put("llama.attention.layer_norm_rms_epsilon", float("nan")), "epsilon=nan"),
    "a scale of logits": (put("llama.logit_scale", 0.5), "llama.logit_scale=0.5"),
    "a sliding window": (put("llama.attention.sliding_window", 64, Type.UINT32), "sliding_window=64"),
    "experts": (put("llama.expert_count", 4, Type.UINT32), "expert_count=4"),
    "not causal": (put("llama.attention.causal", False, Type.BOOL), "attention.causal=False"),
    "too many layers": (put("llama.block_count", 2**31, Type.UINT32), "block_count"),
    "one layer too few": (put("llama.block_count", 1, Type.UINT32), "holds.*blk.1"),
    "rows": (cut_rows, "another shape.*ffn_up"),
    "an adapter": (put("general.type", "adapter", Type.STRING), "general.type='adapter'"),
    "a part": (put("split.count", 3, Type.UINT16), "one of 3 parts"),
    "no tokens": (without("tokenizer.ggml.tokens"), "does not say llama.vocab_size"),
    "an end as text": (put("tokenizer.ggml.eot_token_id", "7", Type.STRING), "eot_token_id='7'"),
    "an end of a message outside": (put("tokenizer.ggml.eom_token_id", 264, Type.UINT32), r"\[263, 264\]"),
    "a split as number": (put("tokenizer.ggml.pre", 1, Type.UINT8), "pre=1"),
    "tokens as text": (put("tokenizer.ggml.tokens", "abc", Type.STRING), "tokens='abc'"),
    "a template that leads elsewhere": (templates("../../x"), "would lead elsewhere"),
    "a name as number": (put("general.name", 1, Type.UINT8), "general.name=1"),
    "no types": (without("tokenizer.ggml.token_type"), "has no tokenizer.ggml.token_type"),
    "no merges": (without("tokenizer.ggml.merges"), "has no tokenizer.ggml.merges"),
    "an unknown split": (put("tokenizer.ggml.pre", "tomorrow", Type.STRING), "pre='tomorrow'"),
    "an end outside": (put("tokenizer.ggml.eos_token_id", 264, Type.UINT32), "eos_token_id=264"),
    "an unknown tokenizer": (put("tokenizer.ggml.model", "rwkv", Type.STRING), "tokenizer cannot be built"),
    "an unknown network": (put("general.architecture", "wonder", Type.STRING), "cannot be read as a GGUF model"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_be_lost_is_refused_and_nothing_is_cached(tmp_path: Path, cache: Path, name: str):
    change, message = BAD[name]
    file = written(tmp_path / "m.gguf", network(LlamaConfig(**SIZES)), change)
    with pytest.raises(ModelError, match=message):
        convert_gguf(file, torch.float32)
    assert not list(cache.rglob("config.json"))


def test_all_ends_of_llama_cpp_end_a_completion(tmp_path: Path):
    file = written(
        tmp_path / "m.gguf", network(LlamaConfig(**SIZES)), put("tokenizer.ggml.eot_token_id", 7, Type.UINT32)
    )
    folder = convert_gguf(file, torch.float32)
    assert AutoConfig.from_pretrained(folder).eos_token_id == 263
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [7, 263]


def test_files_beside_a_gguf_file_are_not_read_in_its_place(tmp_path: Path, tiny_dir: Path):
    model = network(LlamaConfig(**SIZES))
    alone = convert_gguf(written(tmp_path / "m.gguf", model), torch.float32)
    (tmp_path / "beside").mkdir()
    for path in tiny_dir.iterdir():
        (tmp_path / "beside" / path.name).write_bytes(path.read_bytes())
    beside = convert_gguf(written(tmp_path / "beside" / "n.gguf", model), torch.float32)
    assert {path.name: path.read_bytes() for path in alone.iterdir()} == {
        path.name: path.read_bytes() for path in beside.iterdir()
    }


# --- the header -------------------------------------------------------------------------------------------------------


def test_every_type_is_read_as_the_formats_own_package_reads_it(tmp_path: Path):
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    kinds = [kind for kind in gguf.GGMLQuantizationType if kind.name in {"F32", "F16", "BF16", "Q8_0", "Q4_1", "Q6_K"}]
    for kind in kinds:
        data = gguf.quantize(rng.normal(size=(3, 256)).astype(np.float32), kind) if kind.name != "Q6_K" else None
        data = rng.integers(0, 255, (3, 210), np.uint8) if data is None else data
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, theirs = open_gguf(tmp_path / "t.gguf"), gguf.GGUFReader(tmp_path / "t.gguf")
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(file.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


def test_fields_are_read_as_the_formats_own_package_reads_them(tmp_path: Path):
    file = written(tmp_path / "m.gguf", network(LlamaConfig(**SIZES)), put("a.float64", 0.1, Type.FLOAT64))
    theirs = {field.name: field.contents() for field in gguf.GGUFReader(file).fields.values()}
    assert open_gguf(file).fields == {name: value for name, value in theirs.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize(
    ("place", "bytes_", "message"),
    [
        (8, b"\xff" * 8, "items are announced"),  # tensors
        (16, b"\xff" * 7 + b"\x00", "items are announced"),  # fields
        (24, b"\xff" * 8, "items are announced"),  # the length of the first key
        (4, b"\x09", "version 9"),
        (4, b"\x00\x00\x00\x03", "version"),
    ],
)
def test_counts_that_the_file_cannot_hold_are_refused(tmp_path: Path, place: int, bytes_: bytes, message: str):
    file = written(tmp_path / "m.gguf", network(LlamaConfig(**SIZES)))
    data = bytearray(file.read_bytes())
    data[place : place + len(bytes_)] = bytes_
    file.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        open_gguf(file)


def test_tensors_that_lie_on_one_another_are_refused(tmp_path: Path):
    file = written(tmp_path / "m.gguf", network(LlamaConfig(**SIZES)))
    data, name = file.read_bytes(), b"blk.1.ffn_norm.weight"
    start = data.index(name) + len(name) + 4 + 8 + 4  # dimensions, their number, the kind
    for offset, message in ((0, "lies on another"), (2**40, "inside the file"), (3, "inside the file")):
        file.write_bytes(data[:start] + offset.to_bytes(8, "little") + data[start + 8 :])
        with pytest.raises(ModelError, match=message):
            open_gguf(file)


def test_a_rewritten_file_is_the_same_file(tmp_path: Path):
    file = written(tmp_path / "m.gguf", network(LlamaConfig(**SIZES)))
    assert rewritten(file, tmp_path / "n.gguf", lambda *_: None).read_bytes() == file.read_bytes()
