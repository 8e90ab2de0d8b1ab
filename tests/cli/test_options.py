"""What commands have in common: heavy libraries come late, and only those that are used."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_hqq_is_imported_where_it_quantizes_and_nowhere_before() -> None:
    code = (
        "import sys\n"
        "from kdctl.cli.options import prepare_libraries\n"
        "prepare_libraries(True, False)\n"
        "import kdctl.stages.pipeline\n"
        "print('hqq' in sys.modules)\n"
        "from transformers.quantizers import quantizer_hqq\n"
        "from transformers.utils import quantization_config\n"
        "print(quantizer_hqq.is_hqq_available(), quantization_config.is_hqq_available())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
