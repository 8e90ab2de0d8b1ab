"""Engines: what writes completions. An entry of ``ENGINES`` is all that one needs to be chosen by a preset."""

from collections.abc import Callable

from kdctl.base.errors import PresetError
from kdctl.config.resolve import suggest
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.work import RolloutEngine, Work


def in_process(work: Work) -> RolloutEngine:
    """Make the engine that samples in this process."""
    return InProcess(work.model, work.stop, work.source, work.settings.batch_size, say=work.reporter.note)


def served(work: Work) -> RolloutEngine:
    """Make the engine that asks servers."""
    from kdctl.rollout.server.engine import Served  # what speaks HTTP takes a while to import

    return Served(work)


Make = Callable[[Work], RolloutEngine]
ENGINES: dict[str, Make] = {"transformers": in_process, "server": served}


def engine_named(name: str) -> Make:
    """Return an entry of ``ENGINES``. Raises PresetError for an unknown name."""
    if name not in ENGINES:
        raise PresetError(f"rollout.engine={name!r}: no such engine{suggest(name, ENGINES)}; use {', '.join(ENGINES)}")
    return ENGINES[name]
