"""Each size in a plan against the bytes of the tensors that the code really makes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.cost.estimate import Cost
from kdctl.cost.network import Network, look_at
from kdctl.cost.records import Phase
from kdctl.distill.checkpoint import Checkpoints, checkpoint_bytes
from kdctl.distill.divergence import Objective
from kdctl.distill.optimizer import make_optimizer, update
from kdctl.distill.shadow import Shadow, make_shadow
from kdctl.formats.student import packed_tensors, unquantized_tensors
from kdctl.model.batch import collate, predicting_hidden
from kdctl.model.configuration import read_config
from kdctl.quant.affine import Weights
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.rollout.teacher_states import int8
from kdctl.run.records import CheckpointMeta, Rollout
from kdctl.system.cpu_products import packed

MODES: list[dict[str, Any]] = [
    {"distill.train": "weights"},
    {"distill.train": "weights", "distill.learn_scales": True},
    {"distill.train": "lora", "distill.lora_rank": 4, "distill.lora_targets": ["*.q_proj", "*.down_proj"]},
    {"distill.train": "scales", "distill.train_norms": True},
]
ROLLOUT = Rollout("a", 0, 0, [1, 2, 3], [4, 5, 6, 7], None, "stop", 0, 0, "teacher")


@pytest.fixture(scope="module")
def network(tiny_dir: Path) -> Network:
    """Look at the tiny network."""
    settings = load_preset("smoke").quantize
    return look_at(read_config(tiny_dir), settings, torch.bfloat16, Objective())


def preset_with(settings: dict[str, Any]) -> Preset:
    """Return the smoke preset with other settings."""
    return load_preset("smoke", {"quantize.method": "minmax", **settings})


def made(teacher: PreTrainedModel, preset: Preset) -> tuple[PreTrainedModel, Weights, Shadow]:
    """Build what training builds."""
    weights = quantize_layers(teacher, select_layers(teacher, preset.quantize), preset.quantize)
    student = build_student(teacher, weights)
    return student, weights, make_shadow(preset.distill, student, weights, teacher)


def size(tensors: Iterable[Tensor]) -> int:
    """Add up storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def backward(student: PreTrainedModel) -> None:
    """Run one micro-batch."""
    predicting_hidden(student, collate([ROLLOUT])).float().square().sum().backward()


def test_models_and_grid(network: Network, teacher: PreTrainedModel) -> None:
    preset = preset_with({})
    cost, (student, weights, _) = Cost(preset, network, True), made(teacher, preset)
    assert cost.model == size(teacher.parameters())
    assert cost.linears == size([*teacher.parameters(), *student.parameters()]) - cost.model
    assert cost.grid == size(t for w in weights.values() for t in (w.qparams.scale, w.qparams.zero_point))
    assert cost.quantized == size(weight.codes for weight in weights.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_and_its_moments(
    network: Network, teacher: PreTrainedModel, mode: dict[str, Any], optimizer: str
) -> None:
    preset = preset_with(mode | {"distill.optimizer": optimizer})
    cost, (student, _, shadow) = Cost(preset, network, True), made(teacher, preset)
    made_optimizer = make_optimizer(shadow, preset.distill)
    backward(student)
    update(made_optimizer, shadow.parameters(), 1.0)
    state = [value for kept in made_optimizer.state.values() for key, value in kept.items() if key != "step"]
    assert cost.trained == sum(parameter.numel() for parameter in shadow.parameters())
    assert size(parameter.data for parameter in shadow.parameters()) == 4 * cost.trained
    assert size(state) == cost.moments


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(network: Network, teacher: PreTrainedModel, mode: dict[str, Any], micro_batches: int) -> None:
    preset = preset_with(mode | {"distill.gradient_accumulation": micro_batches})
    student, _, shadow = made(teacher, preset)
    shadow.last_pass = micro_batches == 1
    for _ in range(micro_batches):
        backward(student)
    gradients = [parameter.grad for parameter in shadow.parameters()]
    assert None not in gradients
    own = list(student.parameters())
    beside = size([*own, *(gradient for gradient in gradients if gradient is not None)]) - size(own)
    assert Cost(preset, network, True).gradients == beside


def test_weights_ready_for_products(network: Network, teacher: PreTrainedModel) -> None:
    preset = preset_with({"distill.lmbda": 1.0})
    student, weights, _ = made(teacher, preset)
    with packed(student):
        linear = [student.get_submodule(name) for name in weights] + [student.get_output_embeddings()]
        copies = [argument for layer in linear for argument in vars(layer)["forward"].args]
        stored = sum(copy.nbytes for copy in copies if copy is not None)
    (found,) = (
        part for part in Cost(preset, network, True).phases()[0].parts if part.name == "weights ready for products"
    )
    assert found.size_bytes == stored
    assert all("ready" not in part.name for phase in Cost(preset, network, False).phases() for part in phase.parts)


@pytest.mark.parametrize("method", ["minmax", "hqq"])
def test_low_rank_updates_need_no_base_of_their_own(network: Network, teacher: PreTrainedModel, method: str) -> None:
    preset = preset_with({"distill.train": "lora", "quantize.method": method})
    _, _, shadow = made(teacher, preset)
    own = size([*teacher.parameters(), *vars(shadow)["_frozen"].values()]) - size(teacher.parameters())
    assert Cost(preset, network, True).base == own == 0


def test_moved_codes_need_a_base_of_their_own(network: Network, teacher: PreTrainedModel) -> None:
    preset = preset_with({"distill.train": "lora", "quantize.method": "gptq"})
    weights = quantize_layers(teacher, list(network.layers), preset_with({}).quantize)
    for weight in weights.values():
        weight.codes[:, 0] = 15 - weight.codes[:, 0]
    shadow = make_shadow(preset.distill, build_student(teacher, weights), weights, teacher)
    own = size([*teacher.parameters(), *vars(shadow)["_frozen"].values()]) - size(teacher.parameters())
    assert Cost(preset, network, True).base == own


def test_frozen_codes_stay_where_scales_learn(network: Network) -> None:
    assert Cost(preset_with({"distill.train": "scales"}), network, True).base == network.quantized_parameters


@pytest.mark.parametrize("grid", [{"bits": 4}, {"bits": 3, "group_size": 8}, {"bits": 8, "symmetric": True}])
def test_student_folder(network: Network, teacher: PreTrainedModel, grid: dict[str, Any]) -> None:
    preset = preset_with({f"quantize.{key}": value for key, value in grid.items()})
    student, weights, _ = made(teacher, preset)
    tensors = unquantized_tensors(student, weights)
    for name, weight in weights.items():
        tensors |= packed_tensors(name, weight)
    assert Cost(preset, network, True).folder == sum(tensor.nbytes for tensor in tensors.values())


def test_checkpoints_and_states_on_disk(network: Network, teacher: PreTrainedModel) -> None:
    preset = preset_with({"distill.keep_last": 2, "distill.stop_early": True, "rollout.keep_states": "exact"})
    _, _, shadow = made(teacher, preset)
    found = Cost(preset, network, True).disk()
    assert found["4 checkpoints"] == 4 * checkpoint_bytes(shadow)
    tokens, hidden = preset.rollout.num_prompts * preset.rollout.max_new_tokens, network.hidden
    assert found["teacher states"] == tokens * hidden * 2
    coarse = Cost(preset_with({"rollout.keep_states": "int8"}), network, True).disk()
    assert coarse["teacher states"] == tokens * sum(t.nbytes for t in int8(torch.ones(1, hidden)).values())


@pytest.mark.parametrize("settings", [{}, {"distill.optimizer": "adafactor"}, {"distill.train": "scales"}])
def test_a_copy_of_a_checkpoint(
    network: Network, teacher: PreTrainedModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    preset = preset_with(settings)
    _, _, shadow = made(teacher, preset)
    optimizer = make_optimizer(shadow, preset.distill)
    for parameter in shadow.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Checkpoints(tmp_path, shadow, optimizer) as checkpoints:
        checkpoints.save(CheckpointMeta(identity="", step=1), keep_last=1)
    tensors = load_file(tmp_path / "step_000001" / "shard_00001.safetensors").values()
    assert Cost(preset, network, True).checkpoint == sum(tensor.nbytes for tensor in tensors)


def test_tokens_to_generate_follow_lambda_and_sources(network: Network) -> None:
    def generated(**settings: Any) -> dict[str, int]:
        changed = {f"distill.{key}": value for key, value in settings.items()} | {"eval.student_written": False}
        return Cost(preset_with(changed), network, True).generated()

    heldout = {"teacher, held-out": 16 * 32}
    assert generated(lmbda=0.0) == heldout | {"teacher": 16 * 16}
    assert generated(lmbda=0.0, off_policy_source="dataset") == heldout
    assert generated(lmbda=1.0) == heldout | {"student, live": 6 * 4 * 16}
    assert generated(lmbda=0.5) == heldout | {"teacher": 16 * 16, "student, live": 6 * 2 * 16}
    assert generated(lmbda=1.0, refresh_every=0) == heldout | {"student": 16 * 16}


def test_a_phase_peaks_at_all_its_parts_and_one_moment(network: Network) -> None:
    for phase in Cost(preset_with({"distill.lmbda": 1.0}), network, True).phases():
        lasting = sum(part.size_bytes for part in phase.parts)
        assert phase.peak_bytes == lasting + max(moment.size_bytes for moment in phase.moments)


@pytest.mark.parametrize("moment", ["forward and backward", "update"])
def test_accumulated_gradients_are_counted_and_lone_ones_take_their_weights_place(
    network: Network, moment: str
) -> None:
    def needed(micro_batches: int) -> int:
        phase = training(preset_with({"distill.gradient_accumulation": micro_batches}), network, 1)
        return next(each.size_bytes for each in phase.moments if each.name == moment)

    assert needed(2) - needed(1) == 4 * network.quantized_parameters


def test_shards_divide_what_training_keeps_and_gather_two_layers(network: Network) -> None:
    preset = preset_with({"distill.gradient_accumulation": 1})
    one, two = ({part.name: part.size_bytes for part in training(preset, network, count).parts} for count in (1, 2))
    for name in ("student", "grid", "trained in float32", "optimizer state"):
        assert two[name] * 2 == one[name], name
    whole = network.other_parameters * network.itemsize
    assert (two["teacher"] - whole) * 2 == one["teacher"] - whole
    layer = sum(rows * columns for name, (rows, columns) in network.layers.items() if ".layers.0." in name)
    assert two["layers gathered"] == layer * (2 * 2 + 2 + 4)
    assert one["process"] == two["process"]
    assert "layers gathered" not in one


def test_one_model_is_in_memory_before_training_and_live_generation_on_shards_gathers_the_student(
    network: Network,
) -> None:
    preset = preset_with({"distill.lmbda": 1.0})
    one, two = Cost(preset, network, False), Cost(preset, network, False, 2)
    for phase in one.phases()[:2]:
        assert one.model <= sum(part.size_bytes for part in phase.parts) < one.model + one.linears + 2**30
        assert [part.name for part in phase.parts if part.size_bytes == one.model] == [phase.parts[1].name]
    alone, gathering = (
        next(m.size_bytes for m in training(preset, network, count).moments if m.name == "generating")
        for count in (1, 2)
    )
    assert gathering - alone == two.linears


def test_shards_write_a_student_without_a_whole_model(network: Network) -> None:
    def writing(count: int) -> dict[str, int]:
        phase = Cost(preset_with({}), network, True, count).phases()[-1]
        return {part.name: part.size_bytes for part in (*phase.parts, *phase.moments)}

    one, two, four = Cost(preset_with({}), network, True), writing(2), writing(4)
    assert two["what is not quantized"] == one.model - one.linears
    assert two["measuring"] - four["measuring"] == (2 * one.linears + one.grid + one.quantized) // 4
    assert two["saving"] == four["saving"] == one.quantized + one.grid + 2 * one.folder
    on_gpu = Cost(preset_with({}), network, False, 2).phases()[-1]
    assert [moment.name for moment in on_gpu.moments] == ["measuring"], "codes are put together in RAM"


def test_shards_divide_the_rows_of_a_step(network: Network) -> None:
    def peak(shards: int, rows: int, micro_batches: int) -> int:
        settings = {"distill.micro_batch_size": rows, "distill.gradient_accumulation": micro_batches}
        moments = training(preset_with(settings), network, shards).moments
        return next(moment.size_bytes for moment in moments if moment.name == "forward and backward")

    assert peak(2, 4, 1) == peak(1, 2, 1) < peak(1, 4, 1)
    assert peak(2, 2, 2) == peak(1, 2, 1)
    assert peak(2, 2, 4) == peak(1, 2, 1) + 4 * network.quantized_parameters // 2


def training(preset: Preset, network: Network, shards: int) -> Phase:
    """Plan the training of one of so many processes."""
    return next(phase for phase in Cost(preset, network, True, shards).phases() if phase.name == "training")
