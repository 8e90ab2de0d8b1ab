"""Shared fixtures: a tiny random Llama with a byte tokenizer, built once a session; no network, an own cache."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import kdctl.model  # noqa: F401 - before transformers, which else imports hqq: seconds

# isort: split
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from kdctl.cli import app as cli
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.model.load import load_model, quiet
from kdctl.model.tokenizer import load_tokenizer
from kdctl.system.cpu_products import widen_products
from kdctl.system.memory import freeze_imports


def _helper(name: str) -> ModuleType:
    """Load a module of helpers that lies beside the tests, so that all of them can import it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _helper("tiny")
_helper("made_up")
_helper("gguf_files")
_helper("stub_server")
students, budget = _helper("students"), _helper("budget")
pytest_addoption = budget.pytest_addoption
TOGETHER = Path(__file__).parent / "together.py"


def pytest_configure(config: pytest.Config) -> None:
    """Add the helpers that are plugins."""
    budget.pytest_configure(config)
    config.pluginmanager.register(students)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none."""
    absent = [item for item in items if item.get_closest_marker("gpu")] if not torch.cuda.is_available() else []
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_collection_finish() -> None:
    """Keep what the tests import out of every garbage collection."""
    freeze_imports()


@pytest.fixture(scope="session", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the network out, converted models in a temporary cache, torch on one thread and libraries quiet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("KDCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # subprocesses too: tiny tensors are slower on several threads
        torch.set_num_threads(1)
        quiet()
        widen_products(torch.bfloat16)  # as every model that kdctl loads does: what is compared is computed in one way
        yield


@pytest.fixture
def together(tmp_path: Path) -> Callable[..., None]:
    """Run functions of a test file in two gloo processes, or more, with ``tmp_path``; what fails there fails here."""

    def run(file: str, *functions: str, timeout: int = 120, count: int = 2) -> None:
        command = [sys.executable, str(TOGETHER), file, ",".join(functions), str(tmp_path), str(count)]
        running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(count)]
        errors = [process.communicate(timeout=timeout)[1] for process in running]
        assert [process.returncode for process in running] == [0] * count, "\n".join(errors)

    return run


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model folder, bf16."""
    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_dir_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model folder, fp32."""
    return tiny.build(tmp_path_factory.mktemp("tiny32"), torch.float32)


@pytest.fixture
def invoke() -> Iterator[Callable[..., Result]]:
    """Run the command line in this process."""
    before = dict(os.environ)
    yield lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def teacher(tiny_dir: Path) -> PreTrainedModel:
    """Load the tiny teacher, bf16."""
    return load_model(tiny_dir, torch.bfloat16, torch.device("cpu"))


@pytest.fixture
def teacher_fp32(tiny_dir_fp32: Path) -> PreTrainedModel:
    """Load the tiny teacher, fp32."""
    return load_model(tiny_dir_fp32, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def tokenizer(tiny_dir: Path) -> PreTrainedTokenizerBase:
    """Load the byte tokenizer."""
    return load_tokenizer(tiny_dir)


@pytest.fixture
def smoke(tiny_dir: Path) -> Preset:
    """Return the smoke preset on the tiny teacher, without benchmark tasks."""
    return load_preset("smoke", {"teacher.model": str(tiny_dir), "eval.tasks": []})
