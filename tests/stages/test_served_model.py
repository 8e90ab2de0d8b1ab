"""A server's model beside a folder of the same weights: what both can be asked gives the same."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from stub_server import serving
from transformers import PreTrainedModel

from kdctl.base.errors import DataError, PresetError, ServerError
from kdctl.model.load import load_model
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.details import held_out
from kdctl.report.study_reader import read_study
from kdctl.run.records import EvalResult
from kdctl.stages import pipeline
from kdctl.stages.comparison import compare_models
from kdctl.stages.context import Run

SMALL = {
    "heldout.num_prompts": 16,
    "heldout.min_completion_tokens": 1,
    "heldout.max_new_tokens": 12,
    "heldout.text_tokens": 128,
    "teacher.dtype": "float32",
}
TASKS = {"eval.tasks": ["arc_easy_offline", "triviaqa_offline"], "eval.limit": 3}


@pytest.fixture
def other(tiny_dir_fp32: Path, tmp_path: Path) -> Path:
    """Return the folder of a network near the tiny one."""
    folder = shutil.copytree(tiny_dir_fp32, tmp_path / "other")
    drawn = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    moved = {name: one * (1 + 0.1 * torch.randn(one.shape, generator=drawn)) for name, one in tensors.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    return load_model(folder, torch.float32, torch.device("cpu"))


def compared(folder: Path, *references: str | Path, **settings: Any) -> tuple[Run, dict[str, EvalResult]]:
    return compare_models([str(one) for one in references], {**SMALL, **settings}, folder)


@pytest.mark.slow
def test_a_served_model_is_what_its_folder_is(tiny_dir_fp32: Path, other: Path, tmp_path: Path) -> None:
    with serving("vllm", loaded(other)) as stub:
        run, found = compared(tmp_path / "run", tiny_dir_fp32, other, stub.url, **TASKS)
    folder, served = found["other"], found[f"127.0.0.1-{stub.url.rpartition(':')[2]}"]
    assert served.distribution.perplexity.value == pytest.approx(folder.distribution.perplexity.value, rel=1e-4)
    assert served.text.perplexity.value == pytest.approx(folder.text.perplexity.value, rel=1e-4)
    for task in TASKS["eval.tasks"]:
        assert served.tasks[task].value == folder.tasks[task].value
    probability = served.tasks["arc_easy_offline"].metrics["p_right"]
    assert probability == pytest.approx(folder.tasks["arc_easy_offline"].metrics["p_right"], abs=1e-4)
    assert served.distribution.reverse_kl is served.distribution.top1_agreement is served.size_bytes is None
    assert served.reference == stub.url
    assert f"vllm 0.32.0 at {stub.url}" in str(served.served)
    report = pipeline.report(run.context)
    assert report.folder is not None
    assert f"at {stub.url}" in (report.folder / "report.md").read_text()
    assert (
        "estimated by the drawn tokens" in held_out(Results(read_study([run.context.paths]), Contrasts(0.005))).notes[1]
    )


def test_kl_of_drawn_tokens_is_kl_but_for_noise(tiny_dir_fp32: Path, other: Path, tmp_path: Path) -> None:
    many = {"heldout.num_prompts": 200, "heldout.max_new_tokens": 32}
    with serving("sglang", loaded(other)) as stub:
        run, found = compared(tmp_path / "run", tiny_dir_fp32, other, stub.url, **many)
    exact, name = found["other"].distribution.forward_kl, next(key for key in found if key.startswith("127"))
    drawn = found[name].distribution.forward_kl
    assert drawn.low < exact.value < drawn.high
    assert drawn.high - drawn.low > exact.high - exact.low
    columns = pq.read_table(run.context.paths.samples(name, "heldout")).to_pydict()
    difference = np.array(columns["nll"]) - np.array(columns["teacher_nll"])
    np.testing.assert_allclose(columns["forward_kl"], difference, atol=1e-9)


def test_a_server_is_measured_anew_each_time(tiny_dir_fp32: Path, other: Path, tmp_path: Path) -> None:
    with serving("vllm", loaded(tiny_dir_fp32)) as stub:
        _, first = compared(tmp_path / "run", tiny_dir_fp32, stub.url + "/")
        stub.model = loaded(other)
        _, second = compared(tmp_path / "run", tiny_dir_fp32, stub.url + "/")
    name = next(key for key in first if key != "teacher")
    assert first[name].distribution.forward_kl.value == pytest.approx(0, abs=1e-5)
    assert second[name].distribution.forward_kl.value > 0.01


@pytest.mark.parametrize(
    ("changes", "by_layer", "error", "words"),
    [
        ({}, True, PresetError, "has no layers"),
        ({"eval.tasks": ["lambada_offline"], "eval.limit": 2}, False, DataError, "whether greedy decoding"),
    ],
)
def test_what_no_server_says_is_refused_before_any_work(
    tiny_dir_fp32: Path, tmp_path: Path, changes: dict[str, Any], by_layer: bool, error: type[Exception], words: str
) -> None:
    with serving("vllm", loaded(tiny_dir_fp32)) as stub, pytest.raises(error, match=words):
        compare_models([str(tiny_dir_fp32), stub.url], {**SMALL, **changes}, tmp_path / "run", by_layer=by_layer)
    assert not (tmp_path / "run").exists()


def test_a_server_cannot_stand_first(tiny_dir_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="put a folder, Hub id or GGUF file first"):
        compared(tmp_path / "run", "http://127.0.0.1:9", tiny_dir_fp32)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:notaport", "http://127.0.0.1:99999", "http://127.0.0.1:80 80", "http://[::1", "localhost:8000"],
)
def test_what_is_no_address_is_refused_before_any_work(tiny_dir_fp32: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(PresetError, match="is no address of a server; write it like"):
        compared(tmp_path / "run", tiny_dir_fp32, address)
    assert not (tmp_path / "run").exists()


def test_a_secret_in_an_address_is_refused_and_not_repeated(tiny_dir_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="KDCTL_SERVER_KEY") as error:
        compared(tmp_path / "run", tiny_dir_fp32, "http://user:geheim@127.0.0.1:8000")
    assert "geheim" not in str(error.value)


def test_windows_of_a_text_are_what_the_server_takes(tiny_dir_fp32: Path, other: Path, tmp_path: Path) -> None:
    tasks = {"eval.tasks": ["coqa_text_offline"], "eval.limit": 1}
    with serving("sglang", loaded(other)) as stub:
        _, found = compared(tmp_path / "run", tiny_dir_fp32, other, stub.url, **tasks)
        longest = max(len(body["input_ids"]) for body in stub.bodies if "input_ids" in body)
    served = next(one for name, one in found.items() if name.startswith("127"))
    assert longest == 511
    whole = found["other"].tasks["coqa_text_offline"].value
    assert served.tasks["coqa_text_offline"].value == pytest.approx(whole, rel=0.05)  # in shorter windows


def test_rows_of_servers_that_are_not_named_stay_as_long_as_nothing_changes(
    tiny_dir_fp32: Path, other: Path, tmp_path: Path
) -> None:
    with serving("vllm", loaded(other)) as stub:
        compared(tmp_path / "run", tiny_dir_fp32, stub.url)
    _, found = compared(tmp_path / "run", tiny_dir_fp32, other)
    assert list(found) == ["teacher", "other"]
    with pytest.raises(PresetError, match="name it too, or use another --run"):
        compared(tmp_path / "run", tiny_dir_fp32, other, **TASKS)


@pytest.mark.slow  # a server that does not answer is asked several times
def test_a_server_that_is_away_is_refused_before_any_work(tiny_dir_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"no server answers at http://127\.0\.0\.1:9"):
        compared(tmp_path / "run", tiny_dir_fp32, "http://127.0.0.1:9")
    assert not (tmp_path / "run").exists()


def test_a_server_that_means_other_things_by_tokens_or_adds_one_is_refused(
    tiny_dir_fp32: Path, other: Path, tmp_path: Path
) -> None:
    model = loaded(tiny_dir_fp32)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(-5)
    with serving("vllm", model) as stub, pytest.raises(ServerError, match="means other things by them"):
        compared(tmp_path / "run", tiny_dir_fp32, stub.url)
    shutil.rmtree(tmp_path / "run")
    for folder, faults, words in (
        (tiny_dir_fp32, ("double_bos", "silently"), "puts a token before the prompt"),
        (other, ("double_bos", "silently"), "puts a token before the prompt"),
        (other, ("double_bos",), "prompt tokens"),
    ):
        with serving("vllm", loaded(folder), *faults) as stub, pytest.raises(ServerError, match=words):
            compared(tmp_path / "run", tiny_dir_fp32, stub.url)
