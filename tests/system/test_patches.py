"""Changes inside other libraries do what they say, and end."""

import subprocess
import sys

import datasets.config
import huggingface_hub.constants
import pytest

from kdctl.system.patches import hub_offline


def switches() -> tuple[bool, bool]:
    return datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_hub_is_left_alone_for_the_length_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with hub_offline(True):
        assert switches() == (True, True)
    assert switches() == (False, False)
    with hub_offline(False):
        assert switches() == (False, False)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["kdctl.stages.pipeline", "kdctl.model.load"])
def test_hqq_is_imported_where_it_quantizes_and_nowhere_before(entry: str) -> None:
    code = (
        "import sys\n"
        f"import {entry}\n"
        "print('hqq' in sys.modules)\n"
        "from transformers.quantizers import quantizer_hqq\n"
        "from transformers.utils import quantization_config\n"
        "print(quantizer_hqq.is_hqq_available(), quantization_config.is_hqq_available())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


@pytest.mark.slow
def test_pandas_is_imported_where_it_is_needed_and_nowhere_before() -> None:
    code = (
        "import sys\n"
        "import kdctl.stages.pipeline\n"
        "import pyarrow\n"
        "table = pyarrow.table({'a': [1, 2]})\n"
        "print('pandas' in sys.modules)\n"
        "print(table.to_pandas()['a'].sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3"]
