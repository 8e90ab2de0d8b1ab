"""Write a teacher's function with weights on no grid: what benchmarks/quality.py takes as --teacher.

    python benchmarks/folded_teacher.py MODEL OUT [--spread 0.3]

The weights of the norms go into the matrices that read them, and channels between v_proj and o_proj, up_proj and
down_proj get positive factors, log-normal with the given spread, that undo each other. In exact arithmetic the logits
stay as they are; the folder is bfloat16, like every other. For Llama's kind of network.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def fold(model: PreTrainedModel, spread: float) -> None:
    """Move norms and channel factors into the matrices of every decoder layer, in place."""
    drawn = torch.Generator().manual_seed(0)
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _absorb(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _absorb(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        factors = _factors(attention.v_proj.out_features, spread, drawn)
        shared = factors.view(-1, 1, width).expand(-1, heads, width).reshape(-1)
        _balance(attention.v_proj, factors, attention.o_proj, shared)
        factors = _factors(mlp.up_proj.out_features, spread, drawn)
        _balance(mlp.up_proj, factors, mlp.down_proj, factors)


def _absorb(norm: nn.Module, *readers: nn.Linear) -> None:
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def _balance(writer: nn.Linear, factors: Tensor, reader: nn.Linear, shared: Tensor) -> None:
    writer.weight.mul_(factors[:, None])
    reader.weight.div_(shared)


def _factors(count: int, spread: float, drawn: torch.Generator) -> Tensor:
    return (spread * torch.randn(count, generator=drawn)).exp()


@torch.no_grad()
def main() -> None:
    """Fold, prove that the logits stay, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation of the factors' logarithms")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = torch.arange(64)[None] + min(1000, model.config.vocab_size - 64)
    before = model(ids).logits
    fold(model, given.spread)
    moved = (model(ids).logits - before).abs().max() / before.abs().max()
    if not moved <= 1e-4:
        raise SystemExit(f"the logits moved by {moved:.1e} of the largest; folding does not fit this network")
    model.bfloat16().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(f"largest change of a logit: {moved:.1e} of the largest")


if __name__ == "__main__":
    main()
