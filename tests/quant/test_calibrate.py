"""Layer-by-layer calibration."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.model.batch import collate
from kdctl.quant.affine import Grid, dequantize
from kdctl.quant.calibrate import by_decoder_layer, gram, quantize_in_order
from kdctl.quant.scales import minmax, quantize_weight
from kdctl.run.records import Rollout

ROWS = [Rollout("", i, 0, [65 + i] * (3 + i), [70] * 5, None, "length", 0, 0, "teacher") for i in range(4)]

FAMILIES = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
"""Linear layers that share an input."""


def test_hessians_are_those_of_the_model_quantized_so_far(teacher_fp32: PreTrainedModel) -> None:
    names = [n for n, m in teacher_fp32.named_modules() if n.endswith("_proj")]
    batches = [collate(ROWS[:2], 64), collate(ROWS[2:], 64)]
    seen: dict[str, Tensor] = {}

    def quantizer(sharing: tuple[str, ...], weight: Tensor, hessian: Tensor):
        seen.update(dict.fromkeys(sharing, hessian))
        return quantize_weight(weight, minmax, Grid(4, 32, False), torch.float32)

    own = {name: parameter.data_ptr() for name, parameter in teacher_fp32.named_parameters()}
    before = copy.deepcopy(teacher_fp32.state_dict())
    weights = quantize_in_order(teacher_fp32, names, batches, quantizer)
    assert list(weights) == names
    # the model ends with the very weights that it began with
    assert {name: parameter.data_ptr() for name, parameter in teacher_fp32.named_parameters()} == own
    assert all(torch.equal(one, before[name]) for name, one in teacher_fp32.state_dict().items())
    for name, weight in weights.items():
        alone = quantize_weight(
            teacher_fp32.get_parameter(f"{name}.weight").detach(), minmax, weight.grid, torch.float32
        )
        assert torch.equal(weight.codes, alone.codes)  # its own rows of what was rounded as one
    # The second layer's inputs, taken from an independent full forward of the model with only the first one quantized.
    reference = copy.deepcopy(teacher_fp32)
    for name in names:
        if ".layers.0." in name:
            one = weights[name]
            reference.get_parameter(f"{name}.weight").data.copy_(dequantize(one.codes, one.qparams, one.grid))
    inputs: list[Tensor] = []
    target = next(name for name in names if ".layers.1." in name and name.endswith("q_proj"))
    hook = reference.get_submodule(target).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        for row in ROWS:
            reference(input_ids=torch.tensor([row.prompt_ids + row.completion_ids]))
    hook.remove()
    tokens = torch.cat([given.flatten(0, 1) for given in inputs])
    torch.testing.assert_close(seen[target], tokens.T @ tokens, rtol=1e-4, atol=1e-4)
    owners = {name.rpartition(".")[2]: id(hessian) for name, hessian in seen.items() if ".layers.0." in name}
    assert [len({owners[name] for name in members}) for members in FAMILIES] == [1, 1, 1, 1]
    assert len(set(owners.values())) == len(FAMILIES)


def test_a_model_has_its_weights_back_where_quantizing_fails(teacher_fp32: PreTrainedModel) -> None:
    names = [n for n, m in teacher_fp32.named_modules() if n.endswith("_proj")]
    before, done = copy.deepcopy(teacher_fp32.state_dict()), []

    def quantizer(sharing: tuple[str, ...], weight: Tensor, hessian: Tensor):
        done.append(sharing)
        if len(done) == 6:
            raise KeyboardInterrupt
        return quantize_weight(weight, minmax, Grid(4, 32, False), torch.float32)

    with pytest.raises(KeyboardInterrupt):
        quantize_in_order(teacher_fp32, names, [collate(ROWS, 64)], quantizer)
    assert all(torch.equal(one, before[name]) for name, one in teacher_fp32.state_dict().items())


@pytest.mark.parametrize("size", [3, 64, 101])
def test_a_gram_matrix_is_symmetric_and_that_of_float64(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tokens, weights = torch.randn(50, size, generator=generator), torch.rand(50, generator=generator)
    found = gram(tokens, weights)
    exact = tokens.double().T @ (tokens.double() * weights.double().unsqueeze(-1))
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, found.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram(tokens).double(), tokens.double().T @ tokens.double(), rtol=1e-4, atol=1e-4)


def test_a_token_counts_in_a_layer_as_much_as_its_weights_where_its_input_goes(teacher_fp32: PreTrainedModel) -> None:
    names = [n for n, m in teacher_fp32.named_modules() if n.endswith("_proj") and ".layers.0." in n]
    batches, generator = [collate(ROWS[:3], 64), collate(ROWS[3:], 64)], torch.Generator().manual_seed(0)
    weights = {n: [torch.rand(len(b.input_ids), generator=generator) for b in batches] for n in names}
    seen: dict[str, Tensor] = {}

    def quantizer(sharing: tuple[str, ...], weight: Tensor, hessian: Tensor):
        seen.update(dict.fromkeys(sharing, hessian))
        return quantize_weight(weight, minmax, Grid(4, 32, False), torch.float32)

    quantize_in_order(teacher_fp32, names, batches, quantizer, token_weights=weights)
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(kept: list[Tensor]) -> Callable[..., None]:
        return lambda _, given: kept.append(given[0][0])

    for name in names:
        teacher_fp32.get_submodule(name).register_forward_pre_hook(keep(inputs[name]))
    with torch.no_grad():
        for row in ROWS:
            teacher_fp32(input_ids=torch.tensor([row.prompt_ids + row.completion_ids]))
    for name in names:
        together = next(family for family in FAMILIES if name.rpartition(".")[2] in family)
        sharing = [other for other in names if other.rpartition(".")[2] in together]
        tokens, counted = torch.cat(inputs[name]), torch.stack([torch.cat(weights[other]) for other in sharing]).sum(0)
        expected = tokens.T @ torch.diag(counted) @ tokens
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-4)


def test_a_layer_outside_all_decoder_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="projector"):
        by_decoder_layer(["model.layers.0.mlp.up_proj", "projector"])
