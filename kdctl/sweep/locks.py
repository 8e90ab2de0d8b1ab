"""One sweep in a run folder at a time, and one process a shard of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdctl.base.errors import StoreError
from kdctl.run.locks import Busy, Say, holding

MOMENT_S = 1.0  # another shard that starts at the same time holds a lock for a moment, to see that it is free


@contextmanager
def only_sweep(folder: Path, name: str, shard: str = "", say: Say = lambda _: None) -> Iterator[None]:
    """Hold a run folder for a sweep, or a shard of it; shards of one sweep share the folder.

    folder: where the locks are. Raises StoreError, naming the holder, if the shard or another sweep runs there.
    """
    own = folder / (f"{name}@{shard}.lock" if shard else f"{name}.lock")
    with _taken(own, f"{'shard ' + shard + ' of ' if shard else ''}sweep {name}", say):
        for other in sorted(folder.glob("*.lock")):
            sweep = other.stem.partition("@")[0]
            if sweep != name:
                with _taken(other, f"sweep {sweep}", say):
                    pass
        yield


@contextmanager
def _taken(path: Path, what: str, say: Say) -> Iterator[None]:
    """Hold a lock that must be free."""
    try:
        with holding(path, what, say, MOMENT_S):
            yield
    except Busy as busy:
        raise StoreError(
            f"{what} runs in {path.parent.parent.parent} already: {busy}; two at once would do the same work twice. "
            "Wait for it, stop it, or choose another folder with --run"
        ) from None
