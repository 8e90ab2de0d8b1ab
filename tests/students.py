"""A plugin with fixtures for students: an untied teacher with awkward sizes, and a writer of student folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.config.preset import QuantizeSection
from kdctl.formats.student import Student, save_student
from kdctl.model.load import load_model
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.run.records import QuantizeReport

SaveStudent = Callable[[PreTrainedModel, QuantizeSection, Path], Student]


@pytest.fixture(scope="session")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with an own output head, biases, and sizes that fill no whole 32-bit words."""
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 88, "num_key_value_heads": 1}
    return tiny.build(
        tmp_path_factory.mktemp("untied"), seed=1, tie_word_embeddings=False, attention_bias=True, **sizes
    )


@pytest.fixture
def untied(untied_dir: Path) -> PreTrainedModel:
    """Load the untied teacher, bf16."""
    return load_model(untied_dir, torch.bfloat16, torch.device("cpu"))


def make_student(teacher: PreTrainedModel, settings: QuantizeSection) -> Student:
    """Quantize a teacher in memory."""
    weights = quantize_layers(teacher, select_layers(teacher, settings), settings)
    return Student(build_student(teacher, weights), weights)


@pytest.fixture
def quantized() -> Callable[[PreTrainedModel, QuantizeSection], Student]:
    """Return a function that quantizes a teacher in memory."""
    return make_student


@pytest.fixture
def save(tokenizer: PreTrainedTokenizerBase) -> SaveStudent:
    """Return a function that quantizes a teacher, writes the student's folder and returns the student in memory."""

    def write(teacher: PreTrainedModel, settings: QuantizeSection, folder: Path) -> Student:
        student = make_student(teacher, settings)
        # what the folder's report and card say is another test's business
        report = QuantizeReport.model_construct(student_bytes=0, **settings.model_dump())
        save_student(folder, student, tokenizer, report, pa.table({"tokens": [1.0]}), lambda _: "a card")
        return student

    return write
