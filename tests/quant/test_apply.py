"""Which layers become a student, and that everything else stays the teacher's."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError, PresetError
from kdctl.base.progress import Advance, Silent
from kdctl.config.preset import QuantizeSection
from kdctl.formats.student import Student
from kdctl.model.load import skeleton
from kdctl.quant.apply import dense, layer_errors, select_layers, sqnr
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.quantizer import QuantizeContext

Quantized = Callable[[PreTrainedModel, QuantizeSection], Student]
SETTINGS = QuantizeSection(group_size=16, method="minmax")
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEAR = {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in PARTS}


def test_all_linear_layers_but_the_output_head_are_quantized(teacher: PreTrainedModel, untied: PreTrainedModel):
    assert set(select_layers(teacher, SETTINGS)) == LINEAR
    assert set(select_layers(untied, SETTINGS.model_copy(update={"group_size": 8}))) == LINEAR


def test_layers_are_selected_without_weights(teacher: PreTrainedModel):
    assert select_layers(skeleton(teacher.config), SETTINGS) == select_layers(teacher, SETTINGS)


def test_skipped_layers_keep_the_teachers_weight(teacher: PreTrainedModel, quantized: Quantized):
    settings = SETTINGS.model_copy(update={"skip": ("*.mlp.down_proj", "model.layers.0.self_attn.*")})
    student = quantized(teacher, settings)
    skipped = {name for name in LINEAR if name.endswith("down_proj") or "layers.0.self_attn" in name}
    assert len(skipped) == 6
    assert student.weights.keys() == LINEAR - skipped
    for name in LINEAR:
        same = torch.equal(student.model.get_parameter(f"{name}.weight"), teacher.get_parameter(f"{name}.weight"))
        assert same == (name in skipped), name


@pytest.mark.parametrize("fixture", ["teacher", "untied"])
def test_student_shares_every_frozen_parameter_with_the_teacher(
    request: pytest.FixtureRequest, quantized: Quantized, fixture: str
):
    original: PreTrainedModel = request.getfixturevalue(fixture)
    student = quantized(original, SETTINGS.model_copy(update={"group_size": 8})).model
    mine = dict(student.named_parameters(remove_duplicate=False))
    theirs = dict(original.named_parameters(remove_duplicate=False))
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert (mine[name] is parameter) == (name.removesuffix(".weight") not in LINEAR), name
    assert not any(parameter.requires_grad for parameter in student.parameters())
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    assert head is not None
    assert (head.weight is embedding.weight) == (fixture == "teacher")


def test_building_a_student_leaves_the_teacher_alone(teacher: PreTrainedModel, quantized: Quantized):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    quantized(teacher, SETTINGS)
    assert teacher.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("fixture", ["teacher", "teacher_fp32"])
def test_student_holds_the_dequantized_codes_in_the_teachers_dtype(
    request: pytest.FixtureRequest, quantized: Quantized, fixture: str
):
    original: PreTrainedModel = request.getfixturevalue(fixture)
    student = quantized(original, SETTINGS)
    for name, weight in student.weights.items():
        parameter = student.model.get_parameter(f"{name}.weight")
        assert parameter.dtype == weight.qparams.scale.dtype == original.dtype
        assert torch.equal(parameter, dense(weight))


def test_group_size_that_does_not_divide_is_refused_with_both_numbers_and_the_layer(teacher: PreTrainedModel):
    settings = SETTINGS.model_copy(update={"group_size": 24})
    with pytest.raises(PresetError, match=r"group_size=24 .*in_features=64 of model\.layers\.0\.self_attn\.q_proj"):
        select_layers(teacher, settings)


def test_sizes_that_the_group_size_error_offers_do_divide(untied: PreTrainedModel):
    with pytest.raises(PresetError, match="use 16, 8, or"):
        select_layers(untied, SETTINGS.model_copy(update={"group_size": 64}))
    only = tuple(f"*.{part}" for part in PARTS if part != "mlp.down_proj")
    with pytest.raises(PresetError, match=r"in_features=88 of model\.layers\.0\.mlp\.down_proj.*use 8, or"):
        select_layers(untied, SETTINGS.model_copy(update={"skip": only}))


def test_group_size_is_not_asked_of_skipped_layers(untied: PreTrainedModel):
    settings = SETTINGS.model_copy(update={"skip": ("*.mlp.down_proj",)})
    assert len(select_layers(untied, settings)) == 12


def test_skip_pattern_that_matches_nothing_is_refused_by_name(teacher: PreTrainedModel):
    settings = SETTINGS.model_copy(update={"skip": ("*.mlp.down_proj", "*.mlp.dwon_proj")})
    with pytest.raises(PresetError, match=r"'\*\.mlp\.dwon_proj' matches no linear layer"):
        select_layers(teacher, settings)


def test_output_head_may_be_named_in_skip(teacher: PreTrainedModel):
    assert set(select_layers(teacher, SETTINGS.model_copy(update={"skip": ("lm_head",)}))) == LINEAR


def test_skipping_every_layer_is_refused(teacher: PreTrainedModel):
    with pytest.raises(ModelError, match="no linear layer is left"):
        select_layers(teacher, SETTINGS.model_copy(update={"skip": ("*",)}))


def test_layer_errors_are_relative_frobenius_norms_worst_first(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    errors = layer_errors(teacher.get_parameter, student.weights)
    assert {error.name for error in errors} == LINEAR
    relative = [error.relative_error or 0.0 for error in errors]
    assert relative == sorted(relative, reverse=True)
    for error in errors:
        weight = teacher.get_parameter(f"{error.name}.weight").double()
        noise = weight - student.model.get_parameter(f"{error.name}.weight").double()
        signal = weight.square().sum() / noise.square().sum()
        assert error.relative_error == pytest.approx(float(signal.rsqrt()), rel=1e-9)
        assert error.sqnr_db == pytest.approx(10 * float(signal.log10()), rel=1e-9)


@torch.no_grad()
def test_a_layer_of_zeros_has_no_relative_error_and_does_not_hide_the_others(
    teacher: PreTrainedModel, quantized: Quantized
):
    name = "model.layers.0.mlp.up_proj"
    teacher.get_parameter(f"{name}.weight").zero_()
    weights = quantized(teacher, SETTINGS).weights
    *others, last = layer_errors(teacher.get_parameter, weights)
    assert (last.name, last.relative_error, last.sqnr_db) == (name, None, None)
    assert all(0 < (error.relative_error or 0) < 1 for error in others)
    assert sqnr(teacher.get_parameter, {name: weights[name]}) == math.inf


def test_progress_counts_every_layer(teacher: PreTrainedModel):
    seen: list[tuple[int, int]] = []

    class Listening(Silent):
        @contextmanager
        def task(self, label: str, unit: str = "") -> Iterator[Advance]:
            assert (label, unit) == ("quantizing 14 layers with minmax", "layers")
            yield lambda done, total: seen.append((done, total))

    names = select_layers(teacher, SETTINGS)
    context = QuantizeContext(teacher, names, SETTINGS, reporter=Listening())
    QUANTIZERS[SETTINGS.method].quantize(context)
    assert seen == [(done, 14) for done in range(1, 15)]
