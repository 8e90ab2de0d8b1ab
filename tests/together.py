"""Run functions of a test file as one of several gloo processes: together.py FILE FUNCTION,... FOLDER COUNT RANK.

A function gets its ``Processes`` and the folder, which all processes see.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from kdctl.system.cpu_products import widen_products
from kdctl.system.distributed import Processes


def load(name: str, path: Path) -> ModuleType:
    """Import a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    file, functions, folder, count, rank = sys.argv[1:]
    load("tiny", Path(__file__).parent / "tiny.py")
    torch.set_num_threads(1)
    widen_products(torch.bfloat16)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=int(rank), world_size=int(count))
    module = load("test_file", Path(file))
    for function in functions.split(","):
        vars(module)[function](Processes(int(rank), int(count)), Path(folder))
    dist.destroy_process_group()
