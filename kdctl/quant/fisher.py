"""How the model's distribution feels a change of its linear layers' outputs: one backward pass over its own text.

To second order, moving a layer's outputs z_t by δ_t moves the distribution by KL = ½·E[(Σ_t g_tᵀ δ_t)²], where g_t is
the gradient at z_t of u·logits and u is drawn with covariance diag(p) − p·pᵀ: the Fisher information of the softmax
(Martens 2020, New insights and perspectives on the natural gradient method, sections 5 and 9). Labels drawn from p give
such u; here u = √p⊙ξ − p·(√p·ξ) with Gaussian ξ, which has the same covariance and no rare, large values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdctl.base.progress import Advance, ignore
from kdctl.base.rng import digest
from kdctl.model.batch import Batch, predicting_hidden
from kdctl.model.head import Head, head_of, rows_at_once
from kdctl.quant.calibrate import gram

SEQUENCES = 8
"""Sequences whose activations are in memory at once."""


@dataclass
class OutputFisher:
    """The Fisher information of one linear layer's outputs, its tokens taken as independent of one another.

    blocks: Σ g·gᵀ of consecutive output features, (size, size) float32 each, the last one may be smaller. tokens: ‖g‖²
    of each token, (N,) float32, of one pass after the other.
    """

    blocks: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, gradient: Tensor, size: int) -> None:
        """Take in a pass's gradients at the outputs, (N, out_features)."""
        self.tokens.append(gradient.float().square().sum(-1))
        # bfloat16 products take a fifth of float32's time, and their rounding is noise far below the damping
        rows = gradient if gradient.dtype == torch.bfloat16 else gradient.float()
        products = [gram(part).float() for part in rows.split(size, -1)]
        if not self.blocks:
            self.blocks = products
        else:
            for total, product in zip(self.blocks, products, strict=True):
                total += product


def output_fisher(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Sequence[Batch],
    size: int,
    seed: int,
    progress: Advance = ignore,
) -> dict[str, OutputFisher]:
    """Measure each layer's outputs on the tokens that predict a completion, in blocks of at most ``size`` features.

    The model stays as it is; its parameters get no gradients.
    """
    found = {name: OutputFisher() for name in names}
    hooks = [model.get_submodule(name).register_forward_hook(_listen(found[name], size)) for name in names]
    hooks.append(model.get_input_embeddings().register_forward_hook(_start_graph))
    head, parts = head_of(model), list(chain.from_iterable(batch.parts(SEQUENCES) for batch in batches))
    try:
        for done, part in enumerate(parts):
            with torch.enable_grad():
                hidden = predicting_hidden(model, part)
            generator = torch.Generator(hidden.device).manual_seed(digest("fisher", seed, done) >> 1)
            hidden.backward(probe(hidden.detach(), head, generator))
            progress(done + 1, len(parts))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _listen(found: OutputFisher, size: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: found.add(gradient.detach().flatten(0, -2), size))

    return hook


def _start_graph(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


@torch.no_grad()
def probe(hidden: Tensor, head: Head, generator: torch.Generator) -> Tensor:
    """Draw u·∂logits/∂hidden for each final hidden state, (N, H), E[u·uᵀ] = diag(p) − p·pᵀ of its distribution."""
    drawn = torch.empty_like(hidden)
    rows = rows_at_once(hidden, head.chunk)
    for start in range(0, len(hidden), head.chunk):
        logits = head(hidden[start : start + head.chunk])
        for few in logits.split(rows):
            few.copy_(_logit_probe(few.float(), generator))
        drawn[start : start + head.chunk] = logits @ head.weight
    return drawn


def _logit_probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw √p⊙ξ − p·(√p·ξ) for each row, ξ standard normal."""
    p = logits.softmax(-1)
    scaled = p.sqrt().mul_(torch.empty_like(p).normal_(generator=generator))
    return scaled.sub_(p.mul_(scaled.sum(-1, keepdim=True)))
