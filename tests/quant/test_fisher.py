"""The Fisher information of a model's linear layers' outputs."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.config.preset import QuantizeSection
from kdctl.model.batch import collate
from kdctl.model.head import Head
from kdctl.model.load import linear_shapes
from kdctl.quant import fisher
from kdctl.quant.fisher import output_fisher, probe
from kdctl.quant.methods.kl import Kl
from kdctl.run.records import Rollout

ROWS = [Rollout("", i, 0, [65 + i] * (3 + i), [70, 75 + i, 80] * 3, None, "length", 0, 0, "teacher") for i in range(4)]


def test_probes_have_the_covariance_of_the_softmax() -> None:
    logits, count = torch.tensor([2.0, 0.5, -1.0, 0.0, 3.0]), 40_000
    drawn = probe(logits.expand(count, -1), Head(torch.eye(5)), torch.Generator().manual_seed(0)).double()
    p = logits.double().softmax(-1)
    expected = torch.diag(p) - torch.outer(p, p)
    products = drawn.unsqueeze(-1) * drawn.unsqueeze(-2)
    error = products.std(0) / count**0.5
    assert bool(((products.mean(0) - expected).abs() < 5 * error).all())
    assert bool((drawn.mean(0).abs() < 5 * drawn.std(0) / count**0.5).all())


def gradients_alone(model: PreTrainedModel, names: list[str], row: Rollout, wanted: Tensor) -> dict[str, Tensor]:
    """Return the gradients of Σ wanted·hidden at the layers' outputs in transformers' own pass over one sequence."""
    other, outputs = copy.deepcopy(model).requires_grad_(True), dict[str, Tensor]()
    for name in names:
        other.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out}))
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    hidden = other.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    total = (hidden[len(row.prompt_ids) - 1 : -1] * wanted).sum()
    found = torch.autograd.grad(total, [outputs[name] for name in names])
    return {name: gradient[0] for name, gradient in zip(names, found, strict=True)}


def test_it_is_that_of_each_sequence_alone(teacher_fp32: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd on transformers' own pass over one sequence at a time, with the same probes."""
    generator, given = torch.Generator().manual_seed(0), []

    def recorded(hidden: Tensor, _head: Head, _generator: torch.Generator) -> Tensor:
        given.append(torch.randn(hidden.shape, generator=generator))
        return given[-1]

    monkeypatch.setattr(fisher, "probe", recorded)
    names = [n for n, m in teacher_fp32.named_modules() if n.endswith("_proj")]
    batches = [collate(ROWS[:3]), collate(ROWS[3:])]
    found = output_fisher(teacher_fp32, names, batches, size=40, seed=0)
    assert all(p.grad is None for p in teacher_fp32.parameters())
    reference: dict[str, list[Tensor]] = {name: [] for name in names}
    probes = [part for one, batch in zip(given, batches, strict=True) for part in one.split(batch.counts)]
    for row, wanted in zip(ROWS, probes, strict=True):
        for name, gradient in gradients_alone(teacher_fp32, names, row, wanted).items():
            reference[name].append(gradient)
    for name in names:
        gradients = torch.cat(reference[name])
        scale = float(gradients.square().sum())
        torch.testing.assert_close(
            torch.cat(found[name].tokens), gradients.square().sum(-1), rtol=1e-3, atol=1e-6 * scale
        )
        for start, block in zip(range(0, gradients.shape[-1], 40), found[name].blocks, strict=True):
            part = gradients[:, start : start + 40]
            torch.testing.assert_close(block, part.T @ part, rtol=1e-3, atol=1e-6 * scale)


def test_it_depends_on_the_seed_alone(teacher: PreTrainedModel) -> None:
    def measured(seed: int) -> Tensor:
        return output_fisher(teacher, ["model.layers.0.mlp.up_proj"], [collate(ROWS)], 64, seed)[
            "model.layers.0.mlp.up_proj"
        ].blocks[0]

    torch.manual_seed(3)
    first = measured(1)
    torch.manual_seed(4)
    assert torch.equal(first, measured(1))
    assert not torch.equal(first, measured(2))


def test_as_much_is_held_as_is_planned(teacher: PreTrainedModel) -> None:
    names = [n for n, m in teacher.named_modules() if n.endswith("_proj")]
    found = output_fisher(teacher, names, [collate(ROWS)], size=96, seed=0)
    section = QuantizeSection.model_validate({"method": "kl", "output_block": 96})
    assert Kl().held(section, linear_shapes(teacher)) == sum(
        block.nbytes for one in found.values() for block in one.blocks
    )
