"""A network's footprint, seen on tensors without numbers, against the real passes."""

from pathlib import Path

import pytest
import torch
from transformers import FalconConfig, PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.config.preset import QuantizeSection
from kdctl.cost import network as footprint
from kdctl.cost.network import Meter, Network, look_at
from kdctl.distill.divergence import Objective, value_and_gradient
from kdctl.model.activation_checkpointing import Checkpointing, recomputed, set_checkpointing
from kdctl.model.attention import Layout, RowCache, forward, use_layouts
from kdctl.model.configuration import read_config
from kdctl.model.load import linear_shapes

GRID = QuantizeSection(group_size=32)
LENGTHS = (512, 512)


@pytest.fixture(scope="module")
def network(tiny_dir: Path) -> Network:
    """Look at the tiny network."""
    return look_at(read_config(tiny_dir), GRID, torch.bfloat16, Objective())


def _forward(model: PreTrainedModel, cache: RowCache | None = None) -> torch.Tensor:
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    if cache is not None:
        cache.point(torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)), places)
    return forward(model, torch.zeros(sum(LENGTHS), dtype=torch.int64), places, Layout(LENGTHS, cache))


def test_parameters_are_those_of_the_model(network: Network, teacher: PreTrainedModel) -> None:
    assert network.quantized_parameters + network.other_parameters == teacher.num_parameters()
    assert network.layers == linear_shapes(teacher)
    assert sum(network.norms) == sum(p.numel() for n, p in teacher.named_parameters() if "norm" in n)


def test_inputs_that_linear_layers_share_count_once(network: Network, teacher: PreTrainedModel) -> None:
    config = teacher.config
    each = (config.hidden_size, config.hidden_size, config.hidden_size, config.intermediate_size)
    assert network.inputs == each * config.num_hidden_layers  # of q, k and v; of o; of gate and up; of down


def test_skipped_layers_count_as_other_parameters(tiny_dir: Path, network: Network) -> None:
    skipping = GRID.model_copy(update={"skip": ("*.down_proj",)})
    found = look_at(read_config(tiny_dir), skipping, torch.bfloat16, Objective())
    assert found.quantized_parameters < network.quantized_parameters
    assert (
        found.quantized_parameters + found.other_parameters == network.quantized_parameters + network.other_parameters
    )


def test_cache_is_what_generation_makes(network: Network, teacher: PreTrainedModel) -> None:
    cache = RowCache(len(LENGTHS), max(LENGTHS))
    use_layouts(teacher)
    with torch.no_grad():
        _forward(teacher, cache)
    layers = [cache.first(layer, len(LENGTHS), max(LENGTHS)) for layer in range(teacher.config.num_hidden_layers)]
    assert network.cache * sum(LENGTHS) == sum(tensor.nbytes for pair in layers for tensor in pair)


def test_without_checkpointing_kept_is_what_autograd_saves(network: Network, teacher: PreTrainedModel) -> None:
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in [*teacher.parameters(), *teacher.buffers()]}
    use_layouts(teacher)
    for name in network.layers:
        teacher.get_parameter(f"{name}.weight").requires_grad_(True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = _forward(teacher)
    assert hidden.requires_grad
    assert network.activations["none"].kept * sum(LENGTHS) == pytest.approx(sum(saved.values()), rel=0.1)


@pytest.mark.parametrize("how", footprint.CHECKPOINTING)
def test_a_real_pass_takes_what_the_one_without_numbers_took(
    network: Network, teacher: PreTrainedModel, how: Checkpointing
) -> None:
    use_layouts(teacher)
    for name in network.layers:
        parameter = teacher.get_parameter(f"{name}.weight").requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    set_checkpointing(teacher, how)
    with Meter(teacher) as meter:
        with recomputed(teacher):
            hidden = _forward(teacher)
        kept = meter.live
        hidden.backward(torch.ones_like(hidden))
    assert network.activations[how].kept * sum(LENGTHS) == pytest.approx(kept, rel=0.02)
    assert network.activations[how].peak * sum(LENGTHS) == pytest.approx(meter.peak, rel=0.05)


def test_the_more_is_computed_again_the_less_is_kept(network: Network) -> None:
    none, selective, full = (network.activations[how].kept for how in footprint.CHECKPOINTING)
    assert none > selective > full > 0
    assert all(one.peak >= one.kept for one in network.activations.values())


def test_loss_counts_float32_logits_and_what_is_made_of_them(network: Network) -> None:
    logits = torch.randn(2, footprint.ROWS_IN_CACHE, network.vocabulary)
    with Meter() as meter:
        student, teacher = logits.clone()
        value_and_gradient(student, teacher, Objective())
    assert network.loss * footprint.ROWS_IN_CACHE == pytest.approx(meter.peak, rel=0.01)
    assert network.loss_bytes(80 * 2**30) > network.loss_bytes(8 * 2**30) >= network.loss_bytes(None)


def test_the_meter_forgets_what_is_freed() -> None:
    with Meter() as meter:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        assert meter.live == 4000
        del first, view
        assert meter.live == 0
        _ = torch.zeros(500)
    assert meter.peak == 4000


def test_a_network_that_cannot_be_read_end_to_end_is_refused_in_words():
    config = FalconConfig(vocab_size=264, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"'falcon' cannot be read packed .*: its code ends in RuntimeError"):
        look_at(config, GRID, torch.float32, Objective())
