"""Networks that kdctl does not handle are refused for what they are, before any weight is read."""

from typing import Any

import pytest
import tiny
from transformers import (
    Gemma2Config,
    Gemma4TextConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    XLNetConfig,
)

from kdctl.base.errors import ModelError
from kdctl.model.load import skeleton

SIZES: Any = {name: value for name, value in tiny.SIZES.items() if name != "bos_token_id"}
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "state space": (MambaConfig(vocab_size=264, hidden_size=64, num_hidden_layers=1), "'mamba' is a recurrent network"),
    "rwkv": (RwkvConfig(vocab_size=264, hidden_size=64, num_hidden_layers=1), "'rwkv' is a recurrent network"),
    "linear recurrence": (
        RecurrentGemmaConfig(vocab_size=264, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, lru_width=64),
        "'recurrent_gemma' is a recurrent network",
    ),
    "short convolutions": (
        Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
        "'lfm2' is a recurrent network",
    ),
    "linear attention": (
        Qwen3_5TextConfig(**SIZES, layer_types=["linear_attention", "full_attention"]),
        "'qwen3_5_text' is a recurrent network",
    ),
    "both": (JambaConfig(**SIZES), "'jamba' is a (mixture of experts|recurrent network)"),
    "weights of three dimensions": (
        XLNetConfig(vocab_size=264, d_model=64, n_layer=1, n_head=4, d_inner=128),
        "'xlnet' has weights of more than two dimensions",
    ),
    "capped attention": (Gemma2Config(**SIZES, head_dim=16), "'gemma2' computes attention as 'eager'"),
    "shared caches": (
        Gemma4TextConfig(**SIZES, layer_types=["full_attention"] * 2, num_kv_shared_layers=1),
        r"'gemma4_text': its layers share caches \(model\.layers\.1\.self_attn ",
    ),
    "encoder and decoder": (T5Config(), "'t5': transformers opens no causal language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_are_refused_for_what_they_are(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason) as caught:
        skeleton(config)
    assert "Config" not in str(caught.value)
