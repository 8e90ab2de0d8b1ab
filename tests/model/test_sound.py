"""A network that gives other numbers packed or from a cache than alone is refused, with what differs."""

import copy
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DiffLlamaConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, repeat_kv

from kdctl.base.errors import ModelError
from kdctl.model.attention import NAME
from kdctl.model.load import load_model
from kdctl.model.sound import LEAST, WINDOW, Probe, check_network, check_weights, largest, narrowed

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES: Any = {name: value for name, value in tiny.SIZES.items() if name != "bos_token_id"}


class WithoutInterface(LlamaAttention):
    """Attention in code of its own, which goes by the mask that it is handed and knows of no layout."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask=None, **_: object
    ) -> tuple[Tensor, None]:
        """Attend causally over all that is in the pass."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (repeat_kv(part, self.num_key_value_groups) for part in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def llama(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.tiny_config(initializer_range=0.15 * scale))
    return model.to(dtype).eval()  # pyright: ignore[reportArgumentType]


def network(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


# --- a sequence read in other ways than alone -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_a_network_that_loses_the_mask_is_refused_and_an_honest_one_is_not(dtype: torch.dtype, scale: float) -> None:
    model = llama(dtype, scale)
    model.config.eos_token_id = [257, 258]
    check_network(copy.deepcopy(model))
    for layer in model.model.layers:
        layer.self_attn.__class__ = WithoutInterface
    with pytest.raises(ModelError, match=r"packed beside another sequence than alone: .* nats"):
        check_network(model)


def test_a_network_that_changes_its_values_after_the_cache_is_refused_for_the_cache() -> None:
    with pytest.raises(ModelError, match="'diffllama' gives other numbers for a sequence read from a cache"):
        check_network(network(DiffLlamaConfig(**SIZES)))


def test_a_network_whose_tokens_see_what_follows_is_refused_for_that() -> None:
    config = BertConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.15,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"'bert' .* it is not causal"):
        check_network(network(config))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            FalconConfig(vocab_size=264, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
            r"'falcon' cannot be read packed beside another sequence: its code ends in RuntimeError",
        ),
        (Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=None), "computes attention as 'eager'"),
    ],
)
def test_a_network_whose_code_fails_is_refused_in_words(config: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        check_network(network(config))


def test_a_network_that_asks_a_cache_for_its_length_is_read_rightly() -> None:
    check_network(
        network(
            OPTConfig(
                vocab_size=264, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, init_std=0.15
            )
        )
    )


def test_rounding_stays_far_below_what_is_allowed_and_a_lost_mask_far_above() -> None:
    for dtype in DTYPES:
        model = llama(dtype)
        check_network(model)
        probe = Probe(model)
        with torch.no_grad():
            assert largest(*probe.packed()) < LEAST[dtype] / 2
            assert largest(probe.joined, probe.alone) > 4 * probe.limit


def test_windows_longer_than_the_probe_are_narrowed_and_put_back() -> None:
    config = Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=100, layer_types=["sliding_attention", "full_attention"]
    )
    model = network(config)
    attention = model.model.layers[0].self_attn
    assert attention.sliding_window == 100
    wide = Probe(model).alone
    with narrowed(model):
        assert attention.sliding_window == model.config.sliding_window == WINDOW
        check_network(model)
        assert largest(Probe(model).alone, wide) > 0.01
    assert attention.sliding_window == model.config.sliding_window == 100
    # a layer that knows nothing of its window sees further than the mask of transformers lets it
    attention.sliding_window = None
    with pytest.raises(ModelError, match="packed"):
        check_network(model)


def test_what_is_loaded_was_checked(tiny_dir) -> None:
    assert load_model(tiny_dir, torch.bfloat16, CPU).config._attn_implementation == NAME


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused_with_their_name(tiny_dir_fp32, tmp_path, value: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tiny_dir_fp32 / "model.safetensors")
    tensors[name][3, 5] = float(value)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_dir_fp32 / "config.json").read_text())
    word = "NaN" if value == "nan" else "Inf"
    with pytest.raises(ModelError, match=rf"{word} in {name}; the weights are damaged"):
        load_model(tmp_path, torch.float32, CPU)


def test_weights_and_activations_too_large_for_float16_are_said_to_be_so() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"Inf in .*too large for float16: use teacher\.dtype=bfloat16"):
        check_weights(model.half())
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e5)
    check_weights(model)
    check_weights(model.half())
    with pytest.raises(ModelError, match=r"not finite numbers in float16.*bfloat16 or float32"):
        check_network(model)
