"""The teacher: where its files are, what they say, and its weights when they are asked for."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.progress import Reporter, Silent
from kdctl.config.preset import RuntimeSection, TeacherSection
from kdctl.model.context import Reach, reach_of
from kdctl.model.folder import StoredTensors, fingerprint
from kdctl.model.load import load_model, pick_device, skeleton, torch_dtype
from kdctl.model.reference import cache_of, find_config, locate, model_folder
from kdctl.model.rows import network_tensors
from kdctl.model.stops import described, own_stops, read_from_config, stop_ids, stop_texts
from kdctl.model.tokenizer import check_vocabulary, load_tokenizer
from kdctl.run.locks import holding
from kdctl.system.memory import give_back

T = TypeVar("T")


def _once(method: Callable[[Any], T]) -> Callable[[Any], T]:
    """Remember what a method without arguments returned."""

    @wraps(method)
    def remembered(self: "Teacher") -> T:
        if method.__name__ not in self._found:
            self._found[method.__name__] = method(self)
        return self._found[method.__name__]

    return remembered


class Teacher:
    """One full-precision model. Nothing is fetched, converted or loaded before a method is called; each works once."""

    def __init__(self, settings: TeacherSection, runtime: RuntimeSection, reporter: Reporter | None = None):
        self.settings, self.offline, self.reporter = settings, runtime.offline, reporter or Silent()
        self.dtype = torch_dtype(settings.dtype)
        self.device = pick_device(runtime.device)
        self._found: dict[str, Any] = {}

    @_once
    def config(self) -> PretrainedConfig:
        """Read the configuration, without weights."""
        return find_config(self.settings.model, self.dtype, self.settings.revision, self.offline)

    @_once
    def reach(self) -> Reach:
        """Return how long a sequence may be."""
        return reach_of(self.config())

    @_once
    def folder(self) -> Path:
        """Return the folder of safetensors, which is downloaded or converted first where it has to be."""
        reference, revision = self.settings.model, self.settings.revision
        path = locate(reference, revision, self.offline)
        cached, name = cache_of(path, self.dtype), path.name if path.is_file() else reference
        if cached is None:
            return path
        if path.is_dir():
            self.reporter.note(f"using the text part of {name}; the parts for pictures or sound are left out")
        what = f"the conversion of {name} in {cached.parent}"
        with holding(cached.with_name(f".{cached.name}.lock"), what, self.reporter.note):
            if not cached.is_dir():
                self.reporter.note(f"converting {name} to safetensors, once")
            return model_folder(reference, self.dtype, revision, self.offline)

    @_once
    def fingerprint(self) -> str:
        """Hash the weights."""
        return fingerprint(self.folder())

    @_once
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, which is the student's too. Raises ModelError if its ids do not fit the network."""
        tokenizer = load_tokenizer(self.folder(), self.settings.model)
        check_vocabulary(tokenizer, self.config())
        return tokenizer

    @_once
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a completion."""
        return stop_ids(self.folder(), self.tokenizer(), self.config().get_text_config(decoder=True).vocab_size)

    @_once
    def say_stops(self) -> None:
        """Say once which tokens end a completion."""
        self.reporter.note(described(self.stop_ids(), self.tokenizer()))
        if texts := stop_texts(self.folder()):
            self.reporter.note(texts)

    def new_stops(self) -> dict[str, str]:
        """Return the tokens that completions of earlier versions did not end at, as an input of an identity."""
        known = not read_from_config(self.folder()) or [*self.stop_ids()] == own_stops(self.tokenizer())
        return {} if known else {"stop": " ".join(map(str, self.stop_ids()))}

    @_once
    def load(self) -> PreTrainedModel:
        """Load the weights, if what goes with them is in order; they stay in memory until ``forget``."""
        self.stop_ids()
        return load_model(self.folder(), self.dtype, self.device)

    def hold(self, model: PreTrainedModel) -> None:
        """Take a model that was loaded in another way as what ``load`` returns until ``forget``."""
        self._found["load"] = model

    def weight(self, name: str) -> Tensor:
        """Return one weight: the model's own where it is in memory, else read from the files."""
        if self.loaded:
            return self.load().get_parameter(name).detach()
        return self._stored()[name].to(self.dtype)

    @_once
    def _stored(self) -> StoredTensors:
        return network_tensors(self.folder(), skeleton(self.config()))

    @property
    def loaded(self) -> bool:
        """Tell whether the weights are in memory."""
        return "load" in self._found

    def forget(self) -> None:
        """Let go of the weights; they are loaded again when they are asked for."""
        self._found.pop("load", None)
        give_back()
