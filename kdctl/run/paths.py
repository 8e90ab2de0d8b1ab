"""The run folder: names of every file in it, and the room that there is for them."""

import os
import shutil
from pathlib import Path

from kdctl.base.errors import StoreError
from kdctl.config.mixture import mix_name
from kdctl.run import files
from kdctl.run.names import inside


class RunDir:
    """Names every file of a run; creates nothing by itself."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.preset = self.path / "preset.json"
        self.student = self.path / "student"
        self.offsets = self.path / "offsets"
        self.distill_root = self.path / "distill"
        self.eval_root = self.path / "eval"
        self.report = self.path / "report"
        self.sweeps = self.path / "sweeps"
        self.heldout = self.path / "rollouts" / "heldout"
        self.served = self.path / "served"
        self.locks = self.path / ".locks"

    def rollouts(self, source: str, mix: str | None = None) -> Path:
        """Return the folder of an offline rollout store; of other prompts, where ``prompts.mix`` weighs them anew."""
        return inside(self.path / "rollouts", source if mix is None else f"{source}-{mix_name(mix)}")

    def compared(self, method: str) -> Path:
        """Return the file of what one post-training method reaches."""
        return inside(self.path / "compare", f"{method}.json")

    def variant(self, name: str) -> "VariantDir":
        """Return the folder of one distilled variant."""
        return VariantDir(inside(self.distill_root, name))

    def variants(self) -> list["VariantDir"]:
        """List the finished variants, by name."""
        found = sorted(self.distill_root.glob("*/distill.json"))
        return [VariantDir(path.parent) for path in found]

    def eval(self, model: str) -> Path:
        """Return the folder of one model's evaluation."""
        return inside(self.eval_root, model)

    def results(self, model: str) -> Path:
        """Return the file of what one model's evaluation found."""
        return self.eval(model) / "results.json"

    def evaluated(self) -> list[Path]:
        """List the results of all models, by name."""
        return sorted(self.eval_root.glob("*/results.json"))

    def samples(self, model: str, name: str) -> Path:
        """Return the file of what a model was measured at, one task's items or the yardstick's documents."""
        return inside(self.eval(model) / "samples", f"{name}.parquet")

    def lock(self, result: str) -> Path:
        """Return the file that is locked while a result is made."""
        return self.locks / f"{result.replace('/', '.')}.lock"

    def prepare(self) -> None:
        """Create the run folder and clear away what dead processes left. Raises StoreError if it cannot be written."""
        try:
            files.nameless(self.path).close()
        except OSError as error:
            raise StoreError(
                f"cannot write to the run folder {self.path}: {error.strerror}; choose another with --run"
            ) from None
        for folder in (self.path, cache_dir()):
            files.sweep_up(folder)


class VariantDir:
    """Names every file of a distilled variant."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.served = path / "served"
        self.report = path / "distill.json"


def enclosing_run(folder: Path) -> RunDir | None:
    """Return the run folder that a student folder lies in, ``student/`` or ``distill/<variant>/final/``, if any."""
    for parent in list(folder.resolve().parents)[:3]:
        if (parent / "preset.json").is_file():
            return RunDir(parent)
    return None


def cache_dir() -> Path:
    """Return the folder of what any run can make again: ``$KDCTL_CACHE``, else ``~/.cache/kdctl``."""
    return Path(os.environ.get("KDCTL_CACHE", "~/.cache/kdctl")).expanduser()


def disk_of(folder: Path) -> tuple[Path, int]:
    """Return the nearest folder that exists, and the free bytes of the disk that it lies on."""
    while not folder.exists():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free


def require_free_space(folder: Path, needed_bytes: int, what: str, option: str = "--run") -> None:
    """Raise StoreError, before any work, if ``folder``'s disk has not ``needed_bytes`` left."""
    folder, free = disk_of(folder)
    if free < needed_bytes:
        raise StoreError(
            f"{what} needs {_size(needed_bytes)} and {folder.resolve()} has {_size(free)} free; "
            f"free some space or choose another place with {option}"
        )


def _size(size: int) -> str:
    """Write a number of bytes in GiB, or in KiB where that would be next to nothing."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**10:,.0f} KiB"
