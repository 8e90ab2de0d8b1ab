"""What a stage is given: one preset, one run folder, someone to tell, and the other processes."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kdctl.base.errors import DataError, StoreError
from kdctl.base.progress import Reporter, Silent
from kdctl.base.version import __version__
from kdctl.config.mixture import MixedSource
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.data.prompts import prompt_row, rows_of
from kdctl.model.load import skeleton
from kdctl.model.teacher import Teacher
from kdctl.quant.apply import select_layers
from kdctl.quant.methods import QUANTIZERS
from kdctl.rollout.engine import engine_named
from kdctl.run.files import remove, remove_empty
from kdctl.run.locks import Use, holding
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import QuantizeReport, Versions
from kdctl.system.distributed import ALONE, Processes

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """One preset in one run folder.

    ranks: the processes that divide the work, ALONE where there is one; use: that the folder is opened.
    """

    preset: Preset
    paths: RunDir
    reporter: Reporter = field(default_factory=Silent)
    ranks: Processes = ALONE
    use: Use | None = None

    def alone(self) -> "Context":
        """Return the same without the other processes, for work that is not divided."""
        return replace(self, ranks=ALONE)

    def on_main(self, work: Callable[["Context"], T]) -> T:
        """Do in the main process what is not divided, the others waiting for it; return its result in all."""
        return self.ranks.on_main(lambda: work(self.alone()))

    @contextmanager
    def claimed(self, result: str) -> Iterator[None]:
        """Hold a result of the run folder while a block makes it, waiting for another process that is at it.

        The main one of several processes that divide the work does so for all. A block may claim what its result is
        made of: variants are made of stores and the student, those of stores, so nobody waits in a circle.
        """
        with ExitStack() as held:
            lock = holding(self.paths.lock(result), f"{result} in {self.paths.path}", self.reporter.note)
            self.ranks.on_main(lambda: held.enter_context(lock))
            yield


class Run(NamedTuple):
    """An open run folder: what every stage takes first, as in ``quantize(*run)``."""

    context: Context
    teacher: Teacher


def open_run(
    preset: Preset | str = "quickstart",
    folder: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    ranks: Processes = ALONE,
) -> Run:
    """Open a run folder for a preset, checking everything that can be checked without weights.

    preset: a preset, its name or its path; overrides: dotted fields on top of a named one; folder: ``runs/<name>``
    without it. Raises KdctlError kinds for an unwritable folder, a folder of another teacher or quantizer, a model that
    cannot be found, a group size that does not divide, a method whose package is not installed, and, for a new folder,
    prompts that are empty or cannot be read.
    """
    if isinstance(preset, str):
        folder = folder or Path("runs") / Path(preset).stem
        preset = load_preset(preset, overrides)
    paths = RunDir(folder or Path("runs") / "quickstart")
    with _no_empty_folder(paths.path):
        paths.prepare()
        base = ranks.on_main(lambda: read_record(paths.preset, Preset) if paths.preset.exists() else None)
        preset = with_date(preset, ranks.on_main(lambda: day_of(paths, base)))
        context = Context(preset, paths, reporter or Silent(), ranks)
        teacher = _checked(context, base)
        if base is None:
            check_prompts(preset)
        context = replace(context, use=Use(paths.lock("open")))
        if not ranks.on_main(paths.preset.exists):
            settle(context)
    if ranks.count > 1:
        ranks.main_first(teacher.folder)  # downloads and converts once
    return Run(context, teacher)


def _checked(context: Context, base: Preset | None) -> Teacher:
    """Check a preset against the run folder, whose own is ``base``, and against the model that it names."""
    preset = context.preset
    if base is not None:
        check_same_model(base, preset, context.paths)
    check_student(context)
    teacher = Teacher(preset.teacher, preset.runtime, context.reporter)
    layers_of(teacher, preset)
    engine_named(preset.rollout.engine)
    if not (context.paths.student / "quantize.json").exists():
        QUANTIZERS[preset.quantize.method].check(preset.quantize)
    return teacher


@contextmanager
def _no_empty_folder(path: Path) -> Iterator[None]:
    """Remove the folders that a block made and left empty because it failed."""
    new = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in new:
                remove_empty(folder)
        raise


def take_back(context: Context) -> None:
    """Remove a run folder that holds nothing but what opening it wrote, unless another process has it open too."""
    paths = context.paths
    with suppress(OSError):
        others = [path for path in paths.path.iterdir() if path not in (paths.preset, paths.locks)]
        if not others and context.use is not None and context.use.sole():
            remove(paths.path)


def day_of(paths: RunDir, base: Preset | None) -> str:
    """Return the day on which a run folder was made, an ISO date; folders of earlier versions do not say it."""
    if base is None:
        return date.today().isoformat()
    return base.prompts.date or date.fromtimestamp(paths.preset.stat().st_mtime).isoformat()


def with_date(preset: Preset, day: str) -> Preset:
    """Give a preset a day for chat templates, unless it has one."""
    if preset.prompts.date is not None:
        return preset
    return preset.model_copy(update={"prompts": preset.prompts.model_copy(update={"date": day})})


def settle(context: Context) -> None:
    """Write the preset into a new run folder, unless another process that began at the same time did."""

    def written() -> None:
        path = context.paths.preset
        if path.exists():
            check_same_model(read_record(path, Preset), context.preset, context.paths)
        else:
            write_record(path, context.preset)

    with context.claimed("preset.json"):
        context.ranks.on_main(written)


def check_student(context: Context) -> None:
    """Raise StoreError, naming the setting, if ``student/`` was made with another one than the preset has."""
    folder, preset = context.paths.student, context.preset
    try:
        made = read_record(folder / "quantize.json", QuantizeReport)
        dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype", preset.teacher.dtype)
    except (OSError, ValueError, StoreError):
        return  # not there yet, or damaged, which the stage says that reads it
    asked = preset.quantize.model_dump(include={"bits", "group_size", "symmetric", "method", "skip"})
    pairs = {f"quantize.{name}": (getattr(made, name), value) for name, value in asked.items()}
    for name, (old, new) in {"teacher.dtype": (dtype, preset.teacher.dtype), **pairs}.items():
        if old != new:
            raise StoreError(
                f"{folder} was made with {name}={old!r}, and the preset has {new!r}: {context.paths.preset.name} was "
                "edited. Everything in the folder depends on it; put it back, or choose another folder with --run"
            )


def layers_of(teacher: Teacher, preset: Preset) -> list[str]:
    """List the layers to quantize, checked against the settings without loading weights."""
    return select_layers(skeleton(teacher.config()), preset.quantize)


def check_prompts(preset: Preset) -> None:
    """Raise DataError if a source of prompts cannot be read, or if its first row is not a prompt."""
    settings, offline = preset.prompts, preset.runtime.offline
    for source in (*settings.sources, MixedSource(source=settings.heldout, split=settings.heldout_split)):
        first = rows_of(source, offline)[0]
        try:
            prompt_row(first, source)
        except DataError as error:
            raise DataError(f"prompts from {source.source!r}, row 1: {error}") from None


def check_same_model(base: Preset, preset: Preset, paths: RunDir) -> None:
    """Raise StoreError if a run folder belongs to another teacher or quantizer."""
    for section in ("teacher", "quantize"):
        old, new = base.model_dump()[section], preset.model_dump()[section]
        for key, value in new.items():
            if old[key] != value:
                raise StoreError(
                    f"{paths.path} was made with {section}.{key}={old[key]!r}, now {value!r} is asked for; everything "
                    "in the folder depends on it, so choose another folder with --run"
                )


def versions() -> Versions:
    """Collect the versions that decide the numbers."""
    return Versions(
        kdctl=__version__,
        torch=version("torch"),
        transformers=version("transformers"),
        compressed_tensors=version("compressed-tensors"),
        quantizers=_quantizer_versions(),
    )


def _quantizer_versions() -> dict[str, str]:
    """Look up the packages of post-training methods that are installed."""
    found = {}
    for package in sorted({package for quantizer in QUANTIZERS.values() for package in quantizer.packages}):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
