"""A student in other formats: what is read back is the student, and what a format cannot hold is refused beforehand."""

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import gguf_files
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as cores
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig
from typer.testing import CliRunner

from kdctl.base.errors import ModelError, StoreError
from kdctl.cli import app as cli
from kdctl.config.preset import QuantizeSection
from kdctl.formats import export
from kdctl.formats import gguf as gguf_layout
from kdctl.formats.export import hqq_state
from kdctl.formats.gguf import check_layout, pre_tokenizer_name, tokenizer_fields
from kdctl.formats.gguf_blocks import block_kind, to_blocks
from kdctl.formats.records import ExportReport
from kdctl.formats.student import Student, load_student, save_student
from kdctl.model.configuration import read_config
from kdctl.model.folder import fingerprint
from kdctl.model.gguf_file import open_gguf as open_gguf_file
from kdctl.model.gguf_names import rope_factors, row_order
from kdctl.model.gguf_tokenizer import gguf_tokenizer
from kdctl.model.load import load_model
from kdctl.model.reference import convert_gguf
from kdctl.model.stops import stop_ids
from kdctl.model.tokenizer import differences, load_tokenizer
from kdctl.quant.affine import Grid, QParams, QuantizedWeight, dequantize
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.run.hashes import is_whole
from kdctl.run.locks import holding, lock_of
from kdctl.run.records import QuantizeReport

CPU = torch.device("cpu")
SIZES: dict[str, Any] = tiny.SIZES | {"max_position_embeddings": 512, "eos_token_id": 260, "pad_token_id": 260}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_untied": lambda: LlamaConfig(**SIZES, attention_bias=True, rope_parameters=rope(100000.0)),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=rope(1000000.0)),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True),
}
GRIDS = [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, True)]
EACH_ONCE = list(zip(["llama_untied", *FAMILIES], [grid for grid in GRIDS if grid != (4, False)], strict=True))
"""Every family and every grid that GGUF's default blocks hold exactly."""
TEXTS = ["the hen\n  then 12345", "<|im_start|>user\nhe said<|im_end|>\n", "Ünïcode ☃ the"]


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*letters, "he", "Ġt"])}
    core = Tokenizer(cores.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "t")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(tiny.SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=tiny.TEMPLATE
    )


def build(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Make a random model; biases and norms too, which start at constants."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_(0, 0.2)
    return model.to(dtype).eval().requires_grad_(False)


def write_student(folder: Path, model: PreTrainedModel, settings: QuantizeSection) -> Student:
    """Quantize a model and write the student's folder."""
    weights = quantize_layers(model, select_layers(model, settings), settings)
    student = Student(build_student(model, weights), weights)
    report = QuantizeReport.model_construct(student_bytes=0, **settings.model_dump())
    save_student(folder, student, bpe_tokenizer(), report, pa.table({"tokens": [1.0]}), lambda _: "")
    return student


def settings_of(bits: int = 4, symmetric: bool = False, group_size: int = 64, **more: Any) -> QuantizeSection:
    values = {"bits": bits, "symmetric": symmetric, "group_size": group_size, "method": "minmax"}
    return QuantizeSection.model_validate(values | more)


@pytest.fixture(scope="module")
def student_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a student's folder, each once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(family: str = "llama", bits: int = 4, symmetric: bool = False, group_size: int = 64) -> Path:
        key = (family, bits, symmetric, group_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / "student"
            write_student(made[key], build(FAMILIES[family]()), settings_of(bits, symmetric, group_size))
        return made[key]

    return make


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))).logits


def open_gguf(folder: Path, student: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Open a GGUF file with transformers, dequantized; it must be told of a Llama's biases."""
    config = GgufConfig(gguf_file=export.GGUF_FILE, dequantize=True)
    place: dict[str, Any] = {"gguf_file": export.GGUF_FILE, "dtype": dtype}
    if student.config.to_dict().get("attention_bias") and student.config.model_type == "llama":
        place["config"] = student.config
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **place).requires_grad_(False)


def nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)


def read_blocks(tensor: gguf.ReaderTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a quantized tensor by ggml's definition of its blocks: codes, d and m; d·code + m are its values."""
    kind = tensor.tensor_type.name
    block = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}[kind]
    data = np.asarray(tensor.data).reshape(tensor.data.shape[0], -1, block)
    d = data[..., :2].copy().view(np.float16).astype(np.float64)
    if kind == "Q4_0":
        return nibbles(data[..., 2:]) - 8, d, np.zeros_like(d)
    if kind == "Q4_1":
        return nibbles(data[..., 4:]), d, data[..., 2:4].copy().view(np.float16).astype(np.float64)
    if kind == "Q5_0":
        fifth = np.unpackbits(data[..., 2:6], axis=-1, bitorder="little").astype(np.int16)
        return nibbles(data[..., 6:]) + 16 * fifth - 16, d, np.zeros_like(d)
    return data[..., 2:].copy().view(np.int8).astype(np.int16), d, np.zeros_like(d)


def gguf_tensors(folder: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / export.GGUF_FILE).tensors}


def assert_same_weights(found: PreTrainedModel, expected: PreTrainedModel):
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


# --- GGUF: weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "grid"), EACH_ONCE)
def test_transformers_reads_an_exact_gguf_as_the_student_to_the_bit(
    student_of: Callable[..., Path], tmp_path: Path, family: str, grid: tuple[int, bool]
):
    folder = student_of(family, *grid)
    report = export.export(folder, "gguf", tmp_path / "out")
    assert (report.exact_blocks, report.rounded_difference) == (1.0, 0.0)
    student = load_student(folder, CPU).model
    found = open_gguf(tmp_path / "out", student)
    assert_same_weights(found, student)
    assert torch.equal(logits(found), logits(student))


@pytest.mark.parametrize("family", ["llama_untied", "qwen3"])
def test_asymmetric_4_bits_are_exact_when_asked_for(student_of: Callable[..., Path], tmp_path: Path, family: str):
    folder = student_of(family)
    report = export.export(folder, "gguf", tmp_path / "out", exact=True)
    assert (report.block_type, report.exact_blocks, report.rounded_difference) == ("Q5_0", 1.0, 0.0)
    student = load_student(folder, CPU).model
    assert_same_weights(open_gguf(tmp_path / "out", student), student)


@pytest.mark.parametrize("family", ["llama_untied", "qwen3"])
def test_q4_1_keeps_the_codes_and_differs_by_what_is_reported(
    student_of: Callable[..., Path], tmp_path: Path, family: str
):
    folder = student_of(family)
    report = export.export(folder, "gguf", tmp_path / "out")
    assert report.block_type == "Q4_1"
    assert report.exact_blocks is not None
    assert 0.5 < report.exact_blocks < 1
    student = load_student(folder, CPU)
    found = open_gguf(tmp_path / "out", student.model, torch.float32)
    largest, rounded = 0.0, 0.0
    for name in student.weights:
        weight, read = (model.get_parameter(f"{name}.weight") for model in (student.model, found))
        largest = max(largest, float((read - weight.float()).abs().max()))
        rounded = max(rounded, float((read.bfloat16().float() - weight.float()).abs().max()))
    assert (report.largest_difference, report.rounded_difference) == (largest, rounded)
    assert rounded > 0
    step = max(float(weight.qparams.scale.max()) for weight in student.weights.values())
    assert largest < step / 16
    own, theirs = logits(student.model).float().log_softmax(-1), logits(found).log_softmax(-1)
    assert float((own.exp() * (own - theirs)).sum(-1).mean()) < 2e-3


@pytest.mark.parametrize(
    ("bits", "symmetric", "exact", "group_size"),
    [
        *[(*grid, index % 3 == 0, (32, 64)[index % 2]) for index, grid in enumerate(GRIDS)],
        (4, False, True, 64),
    ],
)
def test_every_block_holds_its_codes_and_scale(
    student_of: Callable[..., Path], tmp_path: Path, bits: int, symmetric: bool, exact: bool, group_size: int
):
    folder = student_of("qwen2", bits, symmetric, group_size)  # rows are not reordered in this family
    report = export.export(folder, "gguf", tmp_path / "out", exact)
    tensors, held, blocks = gguf_tensors(tmp_path / "out"), 0, 0
    for name, weight in load_student(folder, CPU).weights.items():
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
        tensor = tensors[f"{table.get_name(name)}.weight"]
        assert tensor.tensor_type == block_kind(weight.grid, exact)
        codes, d, m = read_blocks(tensor)
        repeats = group_size // 32
        scale = np.repeat(weight.qparams.scale.double().numpy(), repeats, axis=-1)[..., None]
        zero = np.repeat(weight.qparams.zero_point.numpy().astype(np.int16), repeats, axis=-1)[..., None]
        q = weight.codes.numpy().reshape(codes.shape).astype(np.int16)
        offset = tensor.tensor_type.name == "Q4_1"
        np.testing.assert_array_equal(codes, q if offset else q - zero)
        np.testing.assert_array_equal(d, scale)
        expected = -zero * scale if offset else np.zeros_like(scale)
        np.testing.assert_allclose(m, expected, rtol=2**-11)
        held += int((m == expected).sum())
        blocks += m.size
    assert report.exact_blocks == held / blocks


def test_gguf_package_reads_the_same_values(student_of: Callable[..., Path], tmp_path: Path):
    export.export(student_of("qwen3"), "gguf", tmp_path / "out", exact=True)
    for tensor in gguf_tensors(tmp_path / "out").values():
        if tensor.tensor_type.name.startswith("Q"):
            codes, d, m = read_blocks(tensor)
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(values, (codes * d + m).reshape(values.shape).astype(np.float32))


@pytest.mark.parametrize(
    ("scale", "kind_exact"), [(2.0**-24, True), (2.0**-24 * 1.5, False), (2.0**-26, False), (1.5, True)]
)
def test_scales_that_half_precision_rounds_are_counted(scale: float, kind_exact: bool):
    grid = Grid(4, 32, True)
    qparams = QParams(torch.full((2, 2), scale, dtype=torch.bfloat16), torch.full((2, 2), 8, dtype=torch.uint8))
    codes = torch.randint(0, 16, (2, 64), dtype=torch.uint8)
    weight = QuantizedWeight(codes, qparams, grid)
    found = to_blocks(weight, block_kind(grid, False))
    assert (found.exact, found.blocks) == (4 if kind_exact else 0, 4)
    values = torch.from_numpy(gguf.dequantize(found.data, found.kind))
    assert found.largest_difference == float((values - dequantize(codes, qparams, grid).float()).abs().max())


def test_skipped_layers_and_embeddings_keep_their_format(tmp_path: Path):
    settings = settings_of(skip=("*.k_proj", "*.down_proj"))
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        folder = tmp_path / kind
        student = write_student(folder, build(FAMILIES["llama_untied"](), dtype), settings)
        export.export(folder, "gguf", exact=True)
        tensors = gguf_tensors(tmp_path / f"{kind}-gguf")
        for name in ("token_embd", "output", "blk.0.attn_k", "blk.1.ffn_down"):
            assert tensors[f"{name}.weight"].tensor_type.name == kind
        for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.attn_k.bias"):
            assert tensors[name].tensor_type.name == "F32"
        if dtype != torch.float32:  # GGUF's half-precision scales cannot hold single-precision ones
            assert_same_weights(open_gguf(tmp_path / f"{kind}-gguf", student.model, dtype), student.model)


def test_rope_scaling_of_llama_3_is_written_as_factors(tmp_path: Path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(**SIZES, rope_parameters=rope(10000.0) | scaling | {"rope_type": "llama3"})
    write_student(tmp_path / "student", build(config), settings_of())
    export.export(tmp_path / "student", "gguf")
    found = np.asarray(gguf_tensors(tmp_path / "student-gguf")["rope_freqs.weight"].data)
    frequency = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    length = 2 * np.pi / frequency
    smooth = (64 / length - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    np.testing.assert_allclose(found, np.where(length < 16, 1, np.where(length > 64, 8, between)), rtol=1e-5)
    assert len({*found.round(3)}) > 2


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
AGAIN: dict[str, Callable[[], PretrainedConfig]] = FAMILIES | {
    "narrow qwen3": lambda: Qwen3Config(**SIZES, head_dim=32, rms_norm_eps=3e-7),
    "window": lambda: MistralConfig(**SIZES, head_dim=32, sliding_window=100, rope_parameters=rope(123456.7)),
    "linear": lambda: LlamaConfig(**SIZES, rope_parameters=rope(1e4, factor=3.0) | {"rope_type": "linear"}),
    "llama3": lambda: LlamaConfig(**SIZES, rope_parameters=rope(1e4) | LLAMA3 | {"rope_type": "llama3"}),
}


def spec_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore


@pytest.mark.parametrize("family", AGAIN)
def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str):
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "student"
    model = build(AGAIN[family]())
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [7, 9, 260, 100]
    student = write_student(folder, model, settings_of())
    export.export(folder, "gguf", tmp_path / "m.gguf", exact=True)
    again = convert_gguf(tmp_path / "m.gguf", torch.bfloat16)
    state, own = load_model(again, torch.bfloat16, CPU).state_dict(), student.model.state_dict()
    assert {name for name, tensor in own.items() if torch.equal(state[name], tensor)} == own.keys() == state.keys()
    theirs, mine = read_config(again).to_dict(), student.model.config.to_dict()
    unsaid = {"quantization_config", "_name_or_path", "dtype", "architectures"}
    assert {key: theirs.get(key) for key in mine if key not in unsaid} == {
        key: value for key, value in mine.items() if key not in unsaid
    }
    tokenizer, original = load_tokenizer(again), load_tokenizer(folder)
    assert differences(tokenizer, original) == []
    assert spec_of(tokenizer) == spec_of(original)
    assert stop_ids(again, tokenizer, 264) == stop_ids(folder, original, 264) == (7, 9, 100, 260)


def test_a_file_that_was_changed_after_it_was_written_is_refused(tmp_path: Path, student_of: Callable[..., Path]):
    export.export(student_of(), "gguf", tmp_path / "m.gguf")

    def unmerged(fields: gguf_files.Fields, _: object) -> None:
        del fields["tokenizer.ggml.merges"]

    changes: dict[str, tuple[gguf_files.Change, str]] = {
        "rope": (
            lambda fields, _: fields.update({"llama.rope.freq_base": (5.0, gguf_files.Type.FLOAT32, None)}),
            "freq_base",
        ),
        "ends": (
            lambda fields, _: fields.update({"tokenizer.ggml.eos_token_id": (999, gguf_files.Type.UINT32, None)}),
            "999",
        ),
        "head": (lambda _, tensors: tensors.update({"output.weight": tensors["token_embd.weight"]}), "holds.*output"),
        "tokens": (lambda fields, _: fields["tokenizer.ggml.tokens"][0].reverse(), "tokenizer cannot be built"),
        "merges": (unmerged, r"no tokenizer\.ggml\.merges, and"),
    }
    for name, (change, message) in changes.items():
        file = gguf_files.rewritten(tmp_path / "m.gguf", tmp_path / f"{name}.gguf", change)
        with pytest.raises(ModelError, match=message):
            convert_gguf(file, torch.float32)


def test_a_tokenizer_without_merges_is_written_and_read(tmp_path: Path, student_of: Callable[..., Path]):
    tokenizer = tiny.byte_tokenizer()
    export.export_gguf(load_student(student_of(), CPU), tokenizer, tmp_path / "m.gguf", False)
    again = load_tokenizer(convert_gguf(tmp_path / "m.gguf", torch.bfloat16))
    assert differences(again, tokenizer) == []
    assert spec_of(again) == spec_of(tokenizer)


def test_several_chat_templates_are_written_and_read(tmp_path: Path, student_of: Callable[..., Path]):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = {"default": tiny.TEMPLATE, "tool_use": "with tools"}  # pyright: ignore
    export.export_gguf(load_student(student_of(), CPU), tokenizer, tmp_path / "m.gguf", False)
    assert gguf_tokenizer(open_gguf_file(tmp_path / "m.gguf")).chat_template == tokenizer.chat_template
    again = convert_gguf(tmp_path / "m.gguf", torch.bfloat16)
    assert load_tokenizer(again).chat_template == tokenizer.chat_template
    assert is_whole(again)
    (again / "additional_chat_templates" / "tool_use.jinja").write_text("others")
    assert not is_whole(again)


def test_rope_without_scaling_writes_no_factors(student_of: Callable[..., Path]):
    assert rope_factors(load_student(student_of(), CPU).model.config) is None


def test_only_llama_reorders_queries_and_keys():
    llama, qwen = FAMILIES["llama"](), FAMILIES["qwen3"]()
    assert row_order("model.layers.0.self_attn.q_proj", qwen) is None
    assert row_order("model.layers.0.self_attn.v_proj", llama) is None
    order = row_order("model.layers.0.self_attn.k_proj", llama)
    assert order is not None
    assert order.tolist()[:4] == [0, 8, 1, 9]
    assert sorted(order.tolist()) == list(range(32))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed; it builds llama.cpp")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "llama3"])
def test_llama_cpp_computes_the_students_distributions(tmp_path: Path, family: str, exact: bool):
    from llama_cpp import Llama

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    scaled = LlamaConfig(**SIZES, rope_parameters=rope(10000.0) | scaling | {"rope_type": "llama3"})
    config = scaled if family == "llama3" else FAMILIES[family]()
    student = write_student(tmp_path / "student", build(config), settings_of()).model
    export.export(tmp_path / "student", "gguf", tmp_path / "model.gguf", exact)
    llama = Llama(str(tmp_path / "model.gguf"), n_ctx=256, logits_all=True, n_threads=1, verbose=False)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == bpe_tokenizer()(text)["input_ids"]
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0))
    llama.eval(ids[0].tolist())
    theirs = torch.from_numpy(np.array(llama.scores[:200], dtype=np.float32)).log_softmax(-1)
    own = student.float()(ids).logits[0].log_softmax(-1)
    assert float((own.exp() * (own - theirs)).sum(-1).mean()) < 0.01  # it rounds activations to 8 bits


# --- GGUF: description ------------------------------------------------------------------------------------------------


def field(folder: Path, name: str) -> Any:
    return gguf.GGUFReader(folder / export.GGUF_FILE).fields[name].contents()


def test_description_is_the_models(tmp_path: Path):
    config = MistralConfig(**SIZES, head_dim=32, sliding_window=100, rope_parameters=rope(5e5), rms_norm_eps=1e-5)
    write_student(tmp_path / "student", build(config), settings_of())
    export.export(tmp_path / "student", "gguf", tmp_path / "out")
    expected = {
        "general.architecture": "llama",
        "llama.vocab_size": 264,
        "llama.context_length": 100,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 260,
        "tokenizer.ggml.padding_token_id": 260,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["h e", "Ġ t"],
        "tokenizer.chat_template": tiny.TEMPLATE,
    }
    assert {name: field(tmp_path / "out", name) for name in expected} == expected
    assert field(tmp_path / "out", "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    types = field(tmp_path / "out", "tokenizer.ggml.token_type")
    assert types == [1] * 258 + [3] * 3 + [5] * 3
    assert field(tmp_path / "out", "tokenizer.ggml.tokens")[256:] == [
        "he",
        "Ġt",
        *tiny.SPECIALS,
        "[PAD261]",
        "[PAD262]",
        "[PAD263]",
    ]


def test_tokenizer_reads_the_same_tokens(student_of: Callable[..., Path], tmp_path: Path):
    export.export(student_of("qwen2"), "gguf", tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=export.GGUF_FILE)
    own = bpe_tokenizer()
    for text in TEXTS:
        assert found(text)["input_ids"] == own(text)["input_ids"]
    messages = [{"role": "user", "content": "he"}]
    assert found.apply_chat_template(messages, tokenize=False) == own.apply_chat_template(messages, tokenize=False)


def test_beginning_of_sequence_is_added_where_the_tokenizer_adds_it(tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    write_student(tmp_path / "student", build(FAMILIES["llama"]()), settings_of())
    tokenizer = bpe_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 259)]
    )
    found = export.export_gguf(load_student(tmp_path / "student", CPU), tokenizer, tmp_path / "out", False)
    assert found["block_type"] == "Q4_1"
    assert field(tmp_path / "out", "tokenizer.ggml.add_bos_token") is True
    assert field(tmp_path / "out", "tokenizer.ggml.bos_token_id") == 259


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([WORDS], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), WORDS], "smollm"),
        *[([split(pattern), BYTES], name) for pattern, name in gguf_layout.SPLITS.items()],
    ],
)
def test_pre_tokenizer_is_named(steps: list[pre_tokenizers.PreTokenizer], expected: str):
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    assert tokenizer_fields(tokenizer, 264)["pre"] == expected


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [BYTES],
        [pre_tokenizers.Digits(individual_digits=False), WORDS],
        [split(r"\p{L}+"), BYTES],
        [split(next(iter(gguf_layout.SPLITS))), WORDS],
        [pre_tokenizers.Metaspace()],
    ],
)
def test_unknown_pre_tokenizer_is_refused(steps: list[pre_tokenizers.PreTokenizer]):
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    with pytest.raises(ModelError, match=r"no pre-tokenizer of llama\.cpp"):
        tokenizer_fields(tokenizer, 264)


def test_pre_tokenizers_of_real_families_are_known():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for pattern, name in gguf_layout.SPLITS.items():
        assert GGUF_PRE_TOKENIZER_SPLITS[name] == pattern


def test_absent_pre_tokenizer_is_refused():
    with pytest.raises(ModelError, match="none"):
        pre_tokenizer_name(None)


# --- what a format does not hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (Gemma2Config(), Grid(4, 64, False), "'gemma2' is not written as GGUF"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), Grid(4, 64, False), "hidden_act='gelu'"),
        (LlamaConfig(**SIZES), Grid(4, 48, False), "group_size=48 is not a multiple of 32"),
        (LlamaConfig(**SIZES), Grid(4, 16, False), "group_size=16 is not a multiple of 32"),
        (LlamaConfig(**SIZES), Grid(8, 64, False), "asymmetric 8-bit"),
        (
            Qwen2Config(**SIZES, rope_parameters=rope(1e4, factor=2.0) | {"rope_type": "linear"}),
            Grid(4, 64, False),
            "rope_type='linear' of a qwen2",
        ),
        (
            LlamaConfig(**SIZES, rope_parameters=rope(1e4, factor=2.0) | {"rope_type": "dynamic"}),
            Grid(4, 64, False),
            "rope_type='dynamic' of a llama",
        ),
    ],
)
def test_what_gguf_does_not_hold_is_refused(config: PretrainedConfig, grid: Grid, message: str):
    with pytest.raises(ModelError, match=message):
        check_layout(config, grid)


def test_refusal_comes_before_any_work(
    student_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "load_student", lambda *_: pytest.fail("weights were loaded"))
    folder = student_of("llama", 4, False, 16)
    with pytest.raises(ModelError, match="multiple of 32"):
        export.export(folder, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sentencepiece_tokenizer_is_refused():
    tokenizer = bpe_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ModelError, match="not byte-level BPE"):
        tokenizer_fields(tokenizer, 264)


def test_scale_beyond_half_precision_is_refused(student_of: Callable[..., Path]):
    student = load_student(student_of(), CPU)
    name, weight = next(iter(student.weights.items()))
    weight.qparams.scale[0, 0] = 1e6
    with pytest.raises(ModelError, match=f"{name}: a scale of .* beyond half precision"):
        gguf_layout.quantized_blocks(student, True)


def test_folder_that_is_no_student_is_refused(tiny_dir: Path, tmp_path: Path):
    with pytest.raises(StoreError, match="there is no such folder; kdctl quantize makes"):
        export.export(tmp_path / "nothing", "dense")
    with pytest.raises(StoreError, match=r"no config\.json; kdctl quantize makes"):
        export.export(tmp_path, "dense")
    with pytest.raises(StoreError, match=r"not a pack-quantized student folder: .* not quantized; kdctl quantize"):
        export.export(tiny_dir, "dense", tmp_path / "out")


def test_place_that_is_taken_is_left_alone(student_of: Callable[..., Path], tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("five years")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", student_of()):
        with pytest.raises(StoreError, match="not overwritten"):
            export.export(student_of(), "dense", place)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "five years"


@pytest.mark.parametrize(("to", "name"), [("gguf", "out"), ("gguf", "out.gguf"), ("dense", "out"), ("hqq", "out")])
def test_failure_half_way_leaves_nothing(
    student_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, name: str
):
    from hqq.models.hf.base import AutoHQQHFModel

    def fail(*_: object, **__: object):
        raise OSError("disk full")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    monkeypatch.setattr(AutoHQQHFModel, "save_weights", fail)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export.export(student_of(), to, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# --- dense and hqq ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_dense_is_the_student_without_quantization_code(student_of: Callable[..., Path], tmp_path: Path, family: str):
    folder = student_of(family)
    export.export(folder, "dense", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    student, found = load_student(folder, CPU).model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(found, student)
    assert torch.equal(logits(found), logits(student))
    assert load_tokenizer(tmp_path / "out").chat_template == tiny.TEMPLATE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits", "symmetric"),
    [*[("llama", *grid) for grid in GRIDS], ("llama_untied", 3, False), ("qwen3", 4, False)],
)
def test_hqq_opens_the_student_to_the_bit(
    student_of: Callable[..., Path], tmp_path: Path, family: str, bits: int, symmetric: bool
):
    from hqq.models.hf.base import AutoHQQHFModel

    folder = student_of(family, bits, symmetric, 16)
    export.export(folder, "hqq", tmp_path / "out")
    found = AutoHQQHFModel.from_quantized(str(tmp_path / "out"), compute_dtype=torch.bfloat16, device="cpu")
    student = load_student(folder, CPU)
    for name in student.weights:
        assert torch.equal(found.get_submodule(name).dequantize(), student.model.get_parameter(f"{name}.weight"))
    # hqq multiplies by the transposed weight, which rounds otherwise in bf16
    torch.testing.assert_close(logits(found), logits(student.model), atol=0.1, rtol=0.05)
    assert load_tokenizer(tmp_path / "out").chat_template == tiny.TEMPLATE


def test_groups_that_hqq_cannot_pack_are_refused():
    grid = Grid(4, 32, False)
    qparams = QParams(torch.ones(3, 1, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.uint8))
    weight = QuantizedWeight(torch.zeros(3, 32, dtype=torch.uint8), qparams, grid)
    with pytest.raises(ModelError, match="x: hqq packs 4-bit codes of 2 groups into a byte, and 3 groups"):
        hqq_state("x", weight, None)


def test_a_second_export_to_a_place_waits_and_finds_it_made(student_of: Callable[..., Path], tmp_path: Path):
    place, said, found = tmp_path / "out.gguf", [], []

    def work() -> None:
        found.append(export.export(student_of(), "gguf", place, say=said.append))

    student_of()
    with holding(lock_of(place), "it", print):
        others = [Thread(target=work) for _ in range(2)]
        for other in others:
            other.start()
        while len(said) < 2:
            time.sleep(0.01)
        assert list(tmp_path.iterdir()) == []
    for other in others:
        other.join()
    assert found[0] == found[1]
    waited, told = said[:2], said[2:]
    assert all(f"at work on the export {place}" in text for text in waited)
    assert told == [f"{place} is this export already"], "to the one that came second"
    assert list(tmp_path.iterdir()) == [place]


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_writes_beside_the_student_and_reports(student_of: Callable[..., Path], tmp_path: Path):
    folder = tmp_path / "student"
    folder.symlink_to(student_of(), target_is_directory=True)
    done = CliRunner().invoke(cli.app, ["export", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    report = ExportReport.model_validate_json(done.stdout)
    assert (report.path, report.block_type) == (str(tmp_path / "student-gguf"), "Q4_1")
    assert report.size_bytes == (tmp_path / "student-gguf" / "model.gguf").stat().st_size
    assert report.weights == fingerprint(folder)
    done = CliRunner().invoke(cli.app, ["export", str(folder), "--exact", "--out", str(tmp_path / "a" / "b.gguf")])
    assert done.exit_code == 0, done.output
    assert "Q5_0" in done.stdout
    assert "100.00 %" in done.stdout
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.gguf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "there is no such folder"),
        (["no-such-folder", "--to", "hqq", "--exact"], "leave it out"),
        (["no-such-folder", "--to", "onnx"], "onnx"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(arguments: list[str], message: str):
    done = CliRunner().invoke(cli.app, ["export", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("to", "name"), [("gguf", "out"), ("gguf", "out.gguf"), ("dense", "out"), ("hqq", "out")])
def test_the_same_export_again_is_reported_and_another_is_refused(
    student_of: Callable[..., Path], tmp_path: Path, to: Any, name: str
):
    first = export.export(student_of(), to, tmp_path / name)
    assert export.export(student_of(), to, tmp_path / name) == first
    file = max(export._files(tmp_path / name), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError, match="not overwritten"):
        export.export(student_of(), to, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
