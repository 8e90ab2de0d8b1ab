"""One run folder, one preset, and what several stages need of them, loaded once and only when asked for.

The yardstick (held-out prompts and the teacher's completions of them) lives here because every stage measures on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import DataError, StoreError
from kdctl.base.progress import Reporter, Silent
from kdctl.base.version import __version__
from kdctl.config.preset import Preset
from kdctl.config.resolve import identity
from kdctl.data.prompts import PromptReader, PromptSet, messages_of, read_rows
from kdctl.eval import distribution
from kdctl.eval.distribution import PerDocument, Yardstick
from kdctl.formats.student import HELDOUT
from kdctl.model.folder import fingerprint, stop_ids
from kdctl.model.load import load_model, pick_device, skeleton, torch_dtype
from kdctl.model.reference import find_config, gguf_cache, locate, model_folder
from kdctl.model.tokenizer import check_vocabulary, load_tokenizer
from kdctl.quant.apply import select_layers
from kdctl.quant.autoround import check_installed as check_autoround
from kdctl.quant.autoround import installed as autoround_installed
from kdctl.rollout.fill import Plan, fill, usable
from kdctl.rollout.sampler import Generator, Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.run.paths import RunDir, read_record, write_record
from kdctl.run.records import QuantizeReport, Rollout, TextMetrics, Versions
from kdctl.system.distributed import ALONE, Processes
from kdctl.system.memory import give_back

T = TypeVar("T")


def versions() -> Versions:
    """Collect the versions that decide the numbers."""
    return Versions(
        kdctl=__version__,
        torch=version("torch"),
        transformers=version("transformers"),
        compressed_tensors=version("compressed-tensors"),
        hqq=version("hqq"),
        auto_round=version("auto-round") if autoround_installed() else None,
    )


@dataclass
class Job:
    """One run folder, one preset, and what several stages need of them, loaded once and only when asked for."""

    preset: Preset
    run: RunDir
    reporter: Reporter = field(default_factory=Silent)
    processes: Processes = ALONE

    @contextmanager
    def alone(self) -> Iterator[Processes]:
        """Work without the others, whom this gives; read what is divided and then stays (the yardstick) before."""
        everyone, self.processes = self.processes, ALONE
        try:
            yield everyone
        finally:
            self.processes = everyone

    def on_main(self, work: Callable[[], T]) -> T:
        """Do in the main process what is not divided, the others waiting for it; return its result in all."""
        with self.alone() as everyone:
            return everyone.on_main(work)

    @property
    def offline(self) -> bool:
        """Tell whether the Hub may be asked."""
        return self.preset.runtime.offline

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of teacher and student."""
        return torch_dtype(self.preset.teacher.dtype)

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return pick_device(self.preset.runtime.device)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The teacher's configuration, read without its weights."""
        teacher = self.preset.teacher
        return find_config(teacher.model, self.dtype, teacher.revision, self.offline)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers to quantize, checked against the settings without loading weights."""
        return select_layers(skeleton(self.config), self.preset.quantize)

    @cached_property
    def folder(self) -> Path:
        """The teacher's folder of safetensors."""
        teacher = self.preset.teacher
        path = locate(teacher.model, teacher.revision, self.offline)
        if path.is_file() and not gguf_cache(path, self.dtype).is_dir():
            self.reporter.note(f"converting {path.name} to safetensors, once")
        return model_folder(teacher.model, self.dtype, teacher.revision, self.offline)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the teacher's weights."""
        return fingerprint(self.folder)

    @property
    def student_fingerprint(self) -> str:
        """Fingerprint of the PTQ student's folder."""
        return fingerprint(self.run.student)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, which is the student's too."""
        tokenizer = load_tokenizer(self.folder, self.preset.teacher.model)
        check_vocabulary(tokenizer, self.config)
        return tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return stop_ids(self.folder, self.tokenizer)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher in memory."""
        return load_model(self.folder, self.dtype, self.device)

    def forget_teacher(self) -> None:
        """Let go of the teacher; it is loaded again when it is asked for."""
        self.__dict__.pop("teacher", None)
        give_back()

    @cached_property
    def prompts(self) -> PromptReader:
        """Reads prompts with the teacher's tokenizer."""
        return PromptReader(self.tokenizer, self.preset.prompts, self.offline)

    @cached_property
    def heldout_prompts(self) -> PromptSet:
        """The held-out prompts."""
        heldout = self.preset.heldout
        return self.prompts.heldout(heldout.num_prompts, heldout.seed)

    def train_prompts(self, answers: bool = False) -> PromptSet:
        """Read the training prompts; none of them is a held-out one."""
        rollout = self.preset.rollout
        excluded = frozenset(prompt.id for prompt in self.heldout_prompts.prompts)
        found = self.prompts.train(rollout.num_prompts, rollout.seed, answers, excluded)
        if found.skipped:
            self.reporter.note(
                f"{found.skipped} prompts longer than {self.preset.prompts.max_prompt_tokens} tokens left out"
            )
        if len(found.prompts) < rollout.num_prompts:
            self.reporter.note(f"only {len(found.prompts)} prompts for rollout.num_prompts={rollout.num_prompts}")
        return found

    def generator(self, model: PreTrainedModel, source: str) -> Generator:
        """Make a sampler of completions from a model, with the preset's settings."""
        settings = self.preset.rollout
        return self._generator(model, Sampling.of(settings), source, settings.batch_size)

    def _generator(self, model: PreTrainedModel, sampling: Sampling, source: str, batch_size: int) -> Generator:
        return Generator(model, self.stop_ids, sampling, source, batch_size)

    @cached_property
    def heldout_store(self) -> RolloutStore:
        """The yardstick's store, written first where it is missing."""
        store, plan = RolloutStore(self.run.heldout), self._heldout_plan("teacher", self.fingerprint)
        if not self.processes.on_main(lambda: usable(store, plan.identity)):
            self._write_heldout(store, plan, self.teacher)
        settings = self.preset.heldout
        tokens = store.manifest().completion_tokens
        if tokens < settings.min_completion_tokens:
            raise DataError(
                f"the yardstick has {tokens} completion tokens and heldout.min_completion_tokens is "
                f"{settings.min_completion_tokens}; with fewer every interval is too wide. Raise heldout.num_prompts "
                f"(now {settings.num_prompts}) and use another --run"
            )
        return store

    def student_written(self, model: PreTrainedModel, fingerprint: str, folder: Path) -> RolloutStore:
        """Return held-out completions by a model itself, sampled like the yardstick with the same random numbers.

        They are written where ``folder`` does not hold this model's.
        """
        store, plan = RolloutStore(folder), self._heldout_plan("student", fingerprint)
        if not store.complete(plan.identity):
            self._write_heldout(store, plan, model)
        return store

    def _heldout_plan(self, role: str, writer: str) -> Plan:
        settings, prompts = self.preset.heldout, self.heldout_prompts
        sections = {"heldout": settings.model_dump(exclude={"text_tokens", "min_completion_tokens"})}
        name = identity("heldout", sections, {role: writer, "prompts": prompts.fingerprint()})
        source = "heldout" if role == "teacher" else role
        return Plan(source, name, writer, prompts, settings.prompts_per_block)

    def _write_heldout(self, store: RolloutStore, plan: Plan, model: PreTrainedModel) -> None:
        settings = self.preset.heldout
        sampling = Sampling(1.0, 1.0, 0, settings.max_new_tokens, 0, settings.seed)
        source = "teacher" if plan.source == "heldout" else plan.source
        generator = self._generator(model, sampling, source, settings.prompts_per_block)
        fill(store, plan, generator, self.reporter, self.processes)

    @cached_property
    def yardstick(self) -> Yardstick:
        """All held-out rollouts with the teacher's states."""
        return self.yardstick_of(self.heldout_store.read())

    def small_yardstick(self, documents: int) -> Yardstick:
        """Return the first documents of the yardstick, for measuring during training."""
        return self.yardstick_of(self.heldout_store.read()[:documents])

    def yardstick_of(self, rollouts: Sequence[Rollout]) -> Yardstick:
        """Have the teacher read completions of held-out prompts."""
        with self.reporter.task("teacher reads held-out completions", "batches") as advance:
            return distribution.make_yardstick(self.teacher, rollouts, advance)

    @cached_property
    def text(self) -> list[list[int]]:
        """Plain text for perplexity."""
        return distribution.text_documents(self.tokenizer, self.preset.heldout.text_tokens)

    @cached_property
    def text_yardstick(self) -> Yardstick:
        """The plain text with the teacher's states."""
        return distribution.text_yardstick(self.teacher, self.text)

    @cached_property
    def yardstick_identity(self) -> str:
        """Hash of everything that students are measured on."""
        text_tokens = self.preset.heldout.text_tokens
        return distribution.yardstick_identity(text_tokens, self.heldout_store.fingerprint(), self.fingerprint)

    @cached_property
    def teacher_text(self) -> TextMetrics:
        """The teacher's perplexity on plain text."""
        return distribution.text_perplexity(self.teacher, self.text)

    def measured(self, folder: Path) -> PerDocument | None:
        """Read what a student folder says of itself, if it was measured on this job's yardstick."""
        if read_record(folder / "quantize.json", QuantizeReport).yardstick != self.yardstick_identity:
            return None
        return distribution.from_table(pq.read_table(folder / HELDOUT))

    def measure(self, model: PreTrainedModel, label: str, yardstick: Yardstick | None = None) -> PerDocument:
        """Compare a model with the teacher on the yardstick, or on other completions that the teacher has read."""
        yardstick = yardstick or self.yardstick
        with self.reporter.task(f"{label} reads held-out completions", "batches") as advance:
            return distribution.compare(model, yardstick, advance)


def open_job(preset: Preset, folder: Path | str, reporter: Reporter | None = None, processes: Processes = ALONE) -> Job:
    """Open a run folder for a preset, checking everything that can be checked without weights.

    Raises KdctlError kinds for an unwritable folder, a folder of another teacher or quantizer, a model that cannot be
    found, a group size that does not divide, a method whose package is not installed, and, for a new folder, prompts
    that are empty or cannot be read.
    """
    job = Job(preset, RunDir(folder), reporter or Silent(), processes)
    job.run.prepare()
    base = processes.on_main(lambda: read_record(job.run.preset, Preset) if job.run.preset.exists() else None)
    if base is not None:
        check_same_model(base, preset, job.run)
    _ = job.device, job.layers
    if preset.quantize.method == "autoround" and not (job.run.student / "quantize.json").exists():
        check_autoround()
    if base is None:
        check_prompts(preset)
        processes.on_main(lambda: write_record(job.run.preset, preset))
    if processes.count > 1:
        processes.main_first(lambda: job.folder)  # downloads and converts once
    return job


def check_prompts(preset: Preset) -> None:
    """Raise DataError if a source of prompts cannot be read, or if its first row is not a prompt."""
    settings, offline = preset.prompts, preset.runtime.offline
    for source, split in ((settings.train, settings.split), (settings.heldout, settings.heldout_split)):
        messages_of(read_rows(source, split, offline)[0])


def check_same_model(base: Preset, preset: Preset, run: RunDir) -> None:
    """Raise StoreError if a run folder belongs to another teacher or quantizer."""
    for section in ("teacher", "quantize"):
        old, new = base.model_dump()[section], preset.model_dump()[section]
        for key, value in new.items():
            if old[key] != value:
                raise StoreError(
                    f"{run.path} was made with {section}.{key}={old[key]!r}, now {value!r} is asked for; everything in "
                    "the folder depends on it, so choose another folder with --run"
                )
