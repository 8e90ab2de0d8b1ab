"""A tiny random Llama with a byte tokenizer and a chat template, built on the spot."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are bytes, with ChatML specials; padding is the end-of-sequence token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )


SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "eos_token_id": 258,
    "pad_token_id": 258,
    "bos_token_id": None,
}
"""A network of any family that is small enough to be built in every test."""


def tiny_config(**overrides) -> LlamaConfig:
    """Describe the tiny Llama; wide initial weights make its distributions far from uniform."""
    values: dict[str, Any] = SIZES | {"tie_word_embeddings": True} | overrides
    return LlamaConfig(**values)


def build(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides) -> Path:
    """Write a tiny model folder."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**overrides))
    model.to(dtype)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent / "kdctl" / "data" / "tiny")
