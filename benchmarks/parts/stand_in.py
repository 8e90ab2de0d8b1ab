"""A network of random weights in the shape of a model that is too large to carry, or the quickstart's teacher."""

import argparse

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from kdctl.config.resolve import load_preset
from kdctl.model.load import load_model
from kdctl.model.reference import model_folder


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a random network; without ``--hidden`` there is none."""
    parser.add_argument("--hidden", type=int, default=0, help="build a random Qwen3 of this width; 2560 for the 4B's")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--intermediate", type=int, default=9728)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=151_936)


def teacher_of(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """Load the quickstart's teacher, or build a random network of the shape that was asked for, in bf16."""
    if not args.hidden:
        folder = model_folder(load_preset("quickstart").teacher.model, torch.bfloat16)
        return load_model(folder, torch.bfloat16, device)
    config = Qwen3Config(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 4,
        head_dim=128,
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
