"""Every causal language model of the installed transformers, shrunk until it is built in a second.

A configuration is shrunk field by field, by rules that go by the field's name; what no rule can know is in ``EXTRA``.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY, LAYERS = 264, 2
RULES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|vocabulary_size|n_vocab|n_tokens", VOCABULARY),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_mtp_.*|max_window_layers", 0),
    (r"num_hash_layers|num_kv_shared_layers|.*_start", 0),
    (r"(num|n)_(hidden_)?layers?|.*_(layers|layer|blocks)|depth", LAYERS),
    (r".*key_value_heads|.*kv_heads|.*n_groups|.*ngroups|kv_n_heads|num_query_groups", 2),
    (r".*_heads?|n_heads?", 4),
    (r"head_dim|.*_head_dim|d_kv|.*_head_size|kv_channels|d_head|dim_head", 16),
    (r"rotary_dim", 8),
    (r".*hidden_size.*|d_model|n_embd|emb_dim|.*embedding_size|embed_dim|word_embed_proj_dim|dim|model_dim", 64),
    (r"lru_width|hidden_dim|d_embed|embedding_dim", 64),
    (r".*intermediate_size|.*ffn_dim|d_ff|ffn_hidden_size|n_inner|d_inner|.*mlp_dim|feed_forward_.*|.*_ffn_size", 128),
    (r"block_ff_dim|dim_ff|dff", 128),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|n_shared_experts|topk_group|n_group|num_shared_experts", 1),
    (r"top_k_experts|experts_per_token", 1),
    (r".*lora_rank|.*_rank|.*_lora", 32),
    (r"sliding_window|.*_window|window_size|.*chunk_size|.*state_size|.*d_state", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|context_length|seq_len(gth)?", 1024),
)
KEPT = re.compile(r".*(_token_id|_dropout|_eps|theta|_range|factor)")
LISTS = re.compile(r"layer|block|mlp_only|pattern|types")
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "blenderbot": {"max_position_embeddings": 1024},
    "falcon_h1": MAMBA,
    "granitemoehybrid": MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 1},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "gemma3n_text": {"intermediate_size": [128, 128], "activation_sparsity_pattern": [0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 64)},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
    "cpmant": {"dim_ff": 128, "position_bias_num_buckets": 32},
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
}


@cache
def kinds() -> list[str]:
    """List the model types that transformers' AutoModelForCausalLM opens, a few of every sort first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    first = ["llama", "diffllama", "mamba", "gemma3_text"]
    return first + [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in first]


def shrunk(kind: Any) -> Any:
    """Return a small configuration of a class."""
    usual = kind()
    values = dict(_fields(kind, usual))
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and LISTS.search(name):
            values[name] = _short(list(value))
    for name in kind.sub_configs:
        part = getattr(usual, name, None)
        if hasattr(part, "to_dict"):
            values[name] = shrunk(type(part)).to_dict()
    own = 256 if isinstance(values.get("bos_token_id"), int) else None
    values |= {"bos_token_id": own, "eos_token_id": 258, "pad_token_id": 258}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = 4  # latent attention gives every head its own key
    return kind(**values | EXTRA.get(kind.model_type, {}))


def _fields(kind: Any, usual: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration that its class takes, shrunk."""
    left_out = {"model_type", "transformers_version", "architectures", "dtype"}
    annotated = {name for one in kind.__mro__[:-1] for name in getattr(one, "__annotations__", {})}
    for name, value in usual.to_dict().items():
        if name in left_out or (isinstance(value, dict) and name in kind.sub_configs):
            continue
        small = _small(name, value)
        if small != value or name in annotated:
            yield name, small


def _small(name: str, value: Any) -> Any:
    if type(value) is not int or value <= 0 or KEPT.fullmatch(name):
        return value
    return next((min(value, limit) for rule, limit in RULES if re.fullmatch(rule, name)), value)


def _short(values: list[Any]) -> list[Any]:
    """Keep two entries of a list of layers, of different kinds where there are such."""
    different = [value for place, value in enumerate(values) if value not in values[:place]]
    return different[:LAYERS] if len(different) > 1 else values[:LAYERS]


def build(name: str, folder: Path) -> str | None:
    """Write a model folder of random float32 weights; return why it cannot be made, None where it is there."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from parts.tiny import byte_tokenizer

    kind = CONFIG_MAPPING[name]
    byte_tokenizer().save_pretrained(folder)
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shrunk(kind), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.15 * noise)
            model(input_ids=torch.arange(20).unsqueeze(0), use_cache=False)
        model.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - whatever a network's code says to sizes that are not its own
        _describe(kind, folder)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def _describe(kind: Any, folder: Path) -> None:
    """Write the configuration of a class as it is by itself, or its name alone where that is not valid."""
    try:
        kind().save_pretrained(folder)
    except Exception:  # noqa: BLE001 - the checks of each class are its own
        (folder / "config.json").write_text(json.dumps({"model_type": kind.model_type}), encoding="utf-8")
