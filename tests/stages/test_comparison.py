"""Models of any origin beside the first: no preset, no student, and the same figures as a row of ``kdctl eval``."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from kdctl.base.errors import ModelError, PresetError
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.curves import layers
from kdctl.report.study_reader import read_study
from kdctl.run.record_files import read_record
from kdctl.run.records import EvalResult
from kdctl.stages.comparison import compare_models, names_of

SMALL = {
    "heldout.num_prompts": 4,
    "heldout.min_completion_tokens": 1,
    "heldout.max_new_tokens": 8,
    "heldout.text_tokens": 256,
}


def test_models_are_measured_against_the_first_and_nothing_is_quantized(tiny_dir: Path, tmp_path: Path) -> None:
    other, same = tiny.build(tmp_path / "other", seed=3), tiny_dir
    run, found = compare_models([str(tiny_dir), str(other), str(same)], SMALL, tmp_path / "run")
    assert list(found) == ["teacher", "other", tiny_dir.name]
    assert found["other"].distribution.forward_kl.value > 0.01
    assert found[tiny_dir.name].distribution.forward_kl.value == pytest.approx(0, abs=1e-6)
    assert not run.context.paths.student.exists()
    _, again = compare_models([str(tiny_dir), str(other), str(same)], SMALL, tmp_path / "run")
    assert again == found


def test_what_a_layer_costs_alone_is_that_of_the_network_with_it(tiny_dir: Path, tmp_path: Path) -> None:
    """Only the last layer is another one: the others cost nothing, and that one all that the model costs."""
    other = tmp_path / "other"
    shutil.copytree(tiny_dir, other)
    tensors = load_file(other / "model.safetensors")
    last = max(name.split(".")[2] for name in tensors if name.startswith("model.layers."))
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{last}.") and tensor.dim() == 2:
            tensors[name] = tensor.flip(0)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    run, found = compare_models([str(tiny_dir), str(other)], SMALL, tmp_path / "run", by_layer=True)
    *before, cost = found["other"].layers
    assert [one.value for one in before] == pytest.approx([0] * int(last), abs=1e-6)
    assert cost.value == pytest.approx(found["other"].distribution.forward_kl.value, rel=1e-5)
    assert cost.value > 0.01
    assert read_record(run.context.paths.eval("other") / "results.json", EvalResult).layers == found["other"].layers
    figure = layers(Results(read_study([run.context.paths]), Contrasts(0.005)))
    assert figure is not None
    assert [point.x for point in figure.rows[0][0].series[0].points] == [*range(int(last) + 1)]


def test_a_model_that_means_other_things_by_a_token_is_refused_before_any_work(tiny_dir: Path, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(ModelError, match=r"other: vocab_size="):
        compare_models([str(tiny_dir), str(other)], SMALL, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_of_another_network_are_refused_before_any_work(tiny_dir: Path, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ModelError, match=r"num_hidden_layers=.*leave --by-layer out"):
        compare_models([str(tiny_dir), str(other)], SMALL, tmp_path / "run", by_layer=True)
    assert not (tmp_path / "run").exists()


def test_rows_have_names_that_tell_models_apart() -> None:
    assert names_of(["org/base", "org/base-int4", "/x/y/model.Q4_0.gguf"]) == ["base", "base-int4", "model.Q4_0.gguf"]
    assert names_of(["a", "runs/one/student", "runs/two/student"])[1:] == ["one-student", "two-student"]
    assert names_of(["a", "one/final-gguf/model.gguf", "model.gguf"])[1:] == ["final-gguf", "model.gguf"]
    with pytest.raises(PresetError, match="two or more"):
        names_of(["a"])
    with pytest.raises(PresetError, match="cannot be told apart"):
        names_of(["a", "b", "b"])
