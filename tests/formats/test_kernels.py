"""Which grids and shapes vLLM has kernels for."""

import pytest

from kdctl.base.progress import Silent
from kdctl.config.resolve import build_preset
from kdctl.formats.kernels import vllm_misfits
from kdctl.quant.affine import Grid
from kdctl.stages.context import open_run
from kdctl.stages.quantize import say_misfits

EVEN = {"a": (4096, 4096), "b": (1024, 4096)}


@pytest.mark.parametrize("grid", [Grid(4, 128, False), Grid(4, 64, True), Grid(8, 32, True), Grid(4, 4096, False)])
def test_grids_that_every_version_takes(grid):
    assert vllm_misfits(grid, EVEN) == []


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (Grid(3, 64, False), "no kernel for 3 bits, asymmetric"),
        (Grid(8, 64, False), "no kernel for 8 bits, asymmetric"),
        (Grid(4, 16, False), "no GPU kernel for groups of 16"),
    ],
)
def test_a_grid_that_no_version_takes_is_named_with_the_way_out(grid, said):
    (found,) = vllm_misfits(grid, EVEN)
    assert said in found
    assert "rollout.weights='dense'" in found


def test_shapes_that_only_newer_versions_pad_are_counted():
    (found,) = vllm_misfits(Grid(4, 64, False), {**EVEN, "odd": (576, 576)})
    assert "before July 2026 has no GPU kernel for 1 of 3 layers" in found
    assert "such as odd" in found


def test_shapes_that_cpus_do_not_take():
    assert any("on CPUs" in text for text in vllm_misfits(Grid(4, 32, False), {"a": (88, 128)}))


def test_quantize_warns_only_where_vllm_is_to_serve(smoke, tmp_path):
    class Notes(Silent):
        def note(self, text):
            said.append(text)

    said: list[str] = []
    serve = {"rollout.engine": "server", "rollout.serve": "vllm"}
    for changes in ({}, serve):
        said.clear()
        run = open_run(
            build_preset(smoke.model_dump(), changes, "test"), tmp_path / str(len(changes)), reporter=Notes()
        )
        say_misfits(*run)
        assert bool(said) == bool(changes)
    assert "warning: vLLM before July 2026" in said[0]
