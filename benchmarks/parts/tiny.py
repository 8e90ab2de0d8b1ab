"""A tiny random network with a byte tokenizer and a chat template, and a preset that runs it in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "eos_token_id": 258,
    "pad_token_id": 258,
    "bos_token_id": None,
}
PRESET: dict[str, Any] = {
    "quantize": {"group_size": 32, "method": "minmax"},
    "prompts": {"max_prompt_tokens": 512},
    "rollout": {"num_prompts": 8, "max_new_tokens": 8, "prompts_per_block": 4},
    "heldout": {"num_prompts": 8, "max_new_tokens": 16, "min_completion_tokens": 20, "text_tokens": 256},
    "distill": {
        "lr": 1e-3, "steps": 4, "micro_batch_size": 2, "max_tokens": 640, "heldout_every": 2, "heldout_documents": 4,
        "checkpoint_every": 2,
    },
    "eval": {"tasks": ["arc_easy_offline"], "limit": 4, "student_written": False},
    "runtime": {"offline": True},
}  # fmt: skip


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Any:
    """Make a tokenizer whose tokens are bytes, with ChatML specials; padding is the end-of-sequence token.

    merges: pairs of letters that are tokens too, before the specials; a GGUF file must have some.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )


def make_model(folder: Path, kind: str = "llama", dtype: str = "bfloat16", seed: int = 0, **sizes: Any) -> Path:
    """Write a tiny model folder. Call it in a case or in ``prepare``, never in the process that is forked."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}), dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def preset(model: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a preset's tree for a model; changes: fields by name with two underscores for the dot."""
    tree = {section: dict(values) for section, values in PRESET.items()} | {"teacher": {"model": str(model)}}
    for name, value in changes.items():
        section, field = name.split("__")
        tree.setdefault(section, {})[field] = value
    return tree


def write_preset(path: Path, model: Path | str, **changes: Any) -> Path:
    """Write a preset file, JSON."""
    import json

    path.write_text(json.dumps(preset(model, **changes), indent=1), encoding="utf-8")
    return path
