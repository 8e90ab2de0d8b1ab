"""Which grids and shapes servers have kernels for, as read in their sources; the weights themselves any may hold.

vLLM 0.32: Marlin on NVIDIA GPUs takes 4 bits with or without zero points and 8 without, groups of 32, 64, 128 or a
whole row, and pads what its tiles do not divide; versions before July 2026 did not and needed in_features to be
a multiple of 128 and out_features of 64. On CPUs both must be multiples of 32, and AVX-512 must be there.
"""

from collections.abc import Mapping

from kdctl.quant.affine import Grid

BITS: dict[bool, tuple[int, ...]] = {True: (4, 8), False: (4,)}
"""By whether zero points are fixed."""
GROUPS = (32, 64, 128)
TILE_IN, TILE_OUT = 128, 64
CPU_TILE = 32

Shapes = Mapping[str, tuple[int, int]]
"""Rows and columns of weights, out_features and in_features, by layer."""


def vllm_misfits(grid: Grid, shapes: Shapes) -> list[str]:
    """Say for which vLLM there is no kernel, and what to do; empty where every one has."""
    kind = "symmetric" if grid.symmetric else "asymmetric"
    whole = all(grid.group_size >= columns for _, columns in shapes.values())
    if grid.bits not in BITS[grid.symmetric]:
        return [
            f"vLLM has no kernel for {grid.bits} bits, {kind} (4 bits, or 8 symmetric); serve the student with "
            "rollout.weights='dense', or export it to GGUF"
        ]
    if grid.group_size not in GROUPS and not whole:
        return [
            f"vLLM has no GPU kernel for groups of {grid.group_size} (32, 64, 128 or whole rows); choose another "
            "quantize.group_size, or serve the student with rollout.weights='dense'"
        ]
    found = []
    odd = [name for name, (rows, columns) in shapes.items() if columns % TILE_IN or rows % TILE_OUT]
    if odd:
        found.append(
            f"vLLM before July 2026 has no GPU kernel for {len(odd)} of {len(shapes)} layers, whose in_features are no "
            f"multiple of {TILE_IN} or out_features none of {TILE_OUT}, such as {odd[0]}; use a newer one"
        )
    if any(rows % CPU_TILE or columns % CPU_TILE for rows, columns in shapes.values()):
        found.append(
            f"vLLM on CPUs needs in_features and out_features that are multiples of {CPU_TILE}; serve the student with "
            "rollout.weights='dense' there"
        )
    return found
