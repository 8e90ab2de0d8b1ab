"""Families of models, built tiny from their configurations, through quantize, one training step, save and verify."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.formats.student import load_student
from kdctl.formats.verify import find_teacher, verify
from kdctl.model.load import linear_shapes
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Prompt
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

CPU = torch.device("cpu")
WINDOW = 16
SMALL = tiny.SIZES
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma3_text": (
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": (Phi3Config, {}),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2}),
}
SHORT = {
    "quantize.group_size": 16,
    "quantize.method": "minmax",
    "rollout.num_prompts": 4,
    "rollout.prompts_per_block": 4,
    "rollout.max_new_tokens": 24,
    "heldout.num_prompts": 4,
    "heldout.max_new_tokens": 24,
    "heldout.min_completion_tokens": 8,
    "heldout.text_tokens": 64,
    "distill.lmbda": 1.0,
    "distill.lr": 0.02,
    "distill.steps": 1,
    "distill.refresh_every": 1,
    "distill.gradient_accumulation": 1,
    "distill.heldout_documents": 2,
    "eval.tasks": [],
}


def build(family: str, tied: bool) -> PreTrainedModel:
    """Make a random model of a family; its biases and norms are not the zeros and ones that they start as."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind.from_dict(SMALL | extra | {"tie_word_embeddings": tied}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def preset_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Preset:
    """Write a model folder in bf16 and return a short preset on it."""
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(folder)
    return load_preset("smoke", {"teacher.model": str(folder), **SHORT})


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_stage_to_the_bit(
    family: str, tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    preset = preset_for(build(family, tied), tokenizer, tmp_path / "teacher")
    job = open_run(preset, tmp_path / "run")
    pipeline.quantize(*job)
    final = job.context.paths.variant(pipeline.distill(*job).variant).final
    for folder in (job.context.paths.student, final):
        report = verify(folder, find_teacher(folder), CPU)
        assert {check.status for check in report.checks} == {"passed"}, report.checks
    start, trained = load_student(job.context.paths.student, CPU), load_student(final, CPU)
    assert start.weights.keys() == linear_shapes(job.teacher.load()).keys() == trained.weights.keys()
    assert any(not torch.equal(weight.codes, trained.weights[name].codes) for name, weight in start.weights.items())
    for name, parameter in job.teacher.load().named_parameters():
        if name.removesuffix(".weight") not in trained.weights:
            assert torch.equal(parameter, trained.model.get_parameter(name)), name
    head, embedding = trained.model.get_output_embeddings(), trained.model.get_input_embeddings()
    assert head is not None
    assert (head.weight is embedding.weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_the_plain_forward_pass(family: str) -> None:
    model = build(family, tied=True)
    numbers = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(str(index), index, torch.randint(0, 256, (length,), generator=numbers).tolist())
        for index, length in enumerate((3, WINDOW + 9, WINDOW))
    ]
    sampling = Sampling(1.0, 1.0, 0, 2 * WINDOW, 0, 0)
    for rollout in InProcess(model, [258], "teacher").complete([(prompt, 0) for prompt in prompts], sampling):
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
        start = len(rollout.prompt_ids) - 1
        logprobs = logits[start:-1].float().log_softmax(-1)
        found = logprobs[torch.arange(len(rollout.completion_ids)), rollout.completion_ids]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), found, atol=2e-4, rtol=0)


# --- refused ----------------------------------------------------------------------------------------------------------

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "gpt2": (GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=264), r"'gpt2' keeps .* Conv1D .*c_attn"),
    "mixtral": (MixtralConfig(**SMALL, num_local_experts=4), r"'mixtral' is a mixture of experts .*experts"),
    "qwen3_moe": (
        Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4),
        r"'qwen3_moe' is a mixture of experts .*experts",
    ),
}


def write_config(folder: Path, config: PretrainedConfig, **extra: object) -> Path:
    """Write a model folder without weights, so that what needs them would fail in another way."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict() | extra))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_by_name_before_any_weight_is_read(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    folder = write_config(tmp_path / "teacher", config)
    with pytest.raises(ModelError, match=reason):
        open_run(load_preset("smoke", {"teacher.model": str(folder)}), tmp_path / "run")


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_quantized_teachers_are_refused_by_method_before_any_weight_is_read(method: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "teacher", LlamaConfig(**SMALL), quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=rf"already quantized \({method}\)"):
        open_run(load_preset("smoke", {"teacher.model": str(folder)}), tmp_path / "run")
