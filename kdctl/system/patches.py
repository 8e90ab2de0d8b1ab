"""What kdctl changes inside other libraries: each with its reason, and with what would make it unnecessary.

Three more stand where they are used. ``cpu_products`` replaces kernels of torch, until torch has fast ones for half
precision on CPUs without AVX-512 (2.13 has none). ``eval.harness`` hides lm-eval's bars, which take no switch (0.4.13).
``data.templates`` fixes the clock of chat templates, until ``apply_chat_template`` takes one (5.23 does not).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from torch import nn


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Give a module's global another value for the length of a block."""
    namespace = vars(module)
    before = namespace[name]
    namespace[name] = value
    try:
        yield
    finally:
        namespace[name] = before


def import_caches_without_hqq() -> None:
    """Import transformers' caches without the one that HQQ compresses, which has no use here and takes seconds.

    Needed until ``transformers.cache_utils`` imports hqq where it is used (5.23 does so at its top).
    """
    from transformers import utils

    with replaced(utils, "is_hqq_available", lambda *_: False):
        import transformers.cache_utils  # noqa: F401


def convert_without_pandas() -> None:
    """Let pyarrow convert Python's values without importing pandas, which takes a moment of every command.

    pyarrow looks for pandas once, at its first conversion; what needs pandas still finds it. Needed until pyarrow does
    not import it for values that are none of pandas' (26.0 does).
    """
    import pyarrow

    absent = _Absent()
    sys.meta_path.insert(0, absent)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(absent)


class _Absent(MetaPathFinder):
    """Says that pandas is not installed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raise ImportError for pandas."""
        if fullname == "pandas":
            raise ImportError("pandas is imported where it is needed")


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Keep the Hub from being asked for data sets, so that local caches answer at once.

    Needed until ``datasets.load_dataset`` takes such an argument: datasets 5.2 and huggingface_hub 1 read the
    environment once, when they are imported.
    """
    with ExitStack() as stack:
        if offline:
            import datasets.config
            import huggingface_hub.constants

            for module in (datasets.config, huggingface_hub.constants):
                stack.enter_context(replaced(module, "HF_HUB_OFFLINE", True))
        yield


@contextmanager
def archives_packed() -> Iterator[None]:
    """Let datasets unpack single compressed files and no archives, whose members would have names of their own.

    Needed until ``datasets.DownloadConfig`` tells the two apart: 5.2 unpacks everything that looks packed, or nothing.
    """
    from datasets.utils import extract

    every = extract.Extractor.extractors.items()
    single = {name: kind for name, kind in every if name not in ("tar", "zip", "rar", "7z")}
    with replaced(extract, "Extractor", type("SingleFiles", (extract.Extractor,), {"extractors": single})):
        yield


def checkpoint_layers(model: nn.Module, function: Callable[..., Any] | None) -> None:
    """Let decoder layers in training mode run by a function like ``torch.utils.checkpoint.checkpoint``, or plainly.

    Inside the function a layer is in evaluation mode whatever it is outside, each time that it runs: some layers drop
    numbers themselves, by their own mode. The model's own ``gradient_checkpointing_enable`` is deprecated, and its
    successor, which transformers 5.20 lacks, also makes the embeddings require gradients. Needed until one of them
    leaves the embeddings alone.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = function is not None
            run = None if function is None else partial(_evaluated, layer, function)
            layer._gradient_checkpointing_func = run  # pyright: ignore[reportArgumentType]


def _evaluated(layer: nn.Module, function: Callable[..., Any], run: Callable[..., Any], *inputs: Any) -> Any:
    """Call a checkpointing function on a layer that is in evaluation mode while it runs."""

    def evaluated(*values: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return run(*values)
        finally:
            layer.training = before

    return function(evaluated, *inputs)
