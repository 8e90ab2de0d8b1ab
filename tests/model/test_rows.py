"""A model of which some rows are read is the whole one, in parts, and is refused where the whole one is."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.model.load import linear_shapes, load_model
from kdctl.model.rows import load_rows
from kdctl.system.distributed import Processes

CPU = torch.device("cpu")


def parts_of(folder: Path, model: PreTrainedModel, count: int) -> list[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
    """Load what each of several processes would."""
    names = linear_shapes(model)
    every = [Processes(rank, count, sharded=True) for rank in range(count)]
    return [load_rows(folder, model.dtype, CPU, names, one.span) for one in every]


def check_parts(folder: Path, model: PreTrainedModel, count: int) -> None:
    """Check that rows make up the layers of a whole model, and that all else is whole, in one object where it is so."""
    weights = {f"{name}.weight" for name in linear_shapes(model)}
    parts = parts_of(folder, model, count)
    for name in weights:
        assert torch.equal(torch.cat([rows[name] for _, rows in parts]), model.get_parameter(name))
    for frame, rows in parts:
        assert rows.keys() == weights
        own, expected = frame.state_dict(), model.state_dict()
        assert own.keys() == expected.keys()
        for name, tensor in expected.items():
            assert own[name].is_meta == (name in weights)
            assert name in weights or torch.equal(own[name], tensor)
        buffers = dict(frame.named_buffers())
        assert buffers.keys() == dict(model.named_buffers()).keys()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffers[name], buffer)
            assert buffers[name].dtype == buffer.dtype
        head, embeddings = frame.get_output_embeddings(), frame.get_input_embeddings()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # pyright: ignore
        assert (head.weight is embeddings.weight) == tied  # pyright: ignore
        assert not any(parameter.requires_grad for parameter in frame.parameters())
        assert not frame.training


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_of_all_processes_are_the_model(
    count: int, tiny_dir: Path, untied_dir: Path, teacher: PreTrainedModel, untied: PreTrainedModel
) -> None:
    check_parts(tiny_dir, teacher, count)
    check_parts(untied_dir, untied, count)


def test_rows_of_several_files_in_another_number_format(tmp_path: Path, teacher_fp32: PreTrainedModel) -> None:
    teacher_fp32.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_parts(tmp_path, load_model(tmp_path, torch.bfloat16, CPU), 2)


def test_names_that_transformers_changes_are_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(**tiny.SIZES, use_parallel_residual=False, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    check_parts(tmp_path, load_model(tmp_path, torch.float32, CPU), 2)


def test_more_processes_than_rows(tmp_path: Path) -> None:
    tiny.build(tmp_path, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    model = load_model(tmp_path, torch.bfloat16, CPU)
    last = parts_of(tmp_path, model, 5)[-1][1]
    assert last["model.layers.0.self_attn.k_proj.weight"].shape == (0, 64)


def test_what_whole_loading_refuses_is_refused_in_the_same_words(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    weights, given = tmp_path / "model.safetensors", load_file(tiny_dir / "model.safetensors")
    layer, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    changes = [
        {layer: None},
        {norm: None},
        {"strange": torch.zeros(2)},
        {layer: torch.zeros(3, 64, dtype=torch.bfloat16)},
        {layer: torch.full_like(given[layer], torch.nan)},
        {norm: torch.full_like(given[norm], torch.inf)},
        {layer: given[layer].to(torch.int8)},
        {"lm_head.weight": given["model.embed_tokens.weight"] + 1},
    ]
    names = [name.removesuffix(".weight") for name in given if "proj" in name]
    for change in changes:
        tensors = {name: tensor.clone() for name, tensor in (given | change).items() if tensor is not None}
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(ModelError) as expected:
            load_model(tmp_path, torch.bfloat16, CPU)
        with pytest.raises(ModelError) as found:
            load_rows(tmp_path, torch.bfloat16, CPU, names, Processes().span)
        assert str(found.value) == str(expected.value)


def test_an_equal_head_beside_tied_embeddings_is_one_tensor(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tiny_dir / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_parts(tmp_path, load_model(tmp_path, torch.bfloat16, CPU), 2)


def test_a_network_that_keeps_parts_in_float32_is_refused(
    tiny_dir: Path, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(teacher), "_keep_in_fp32_modules_strict", {"norm"})
    with pytest.raises(ModelError, match=r"keeps norm in float32 .* launch copies with --multi_gpu"):
        load_rows(tiny_dir, torch.bfloat16, CPU, [], Processes().span)
