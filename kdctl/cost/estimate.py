"""Sizes of everything that one run makes: memory by phase, disk and tokens.

Sizes are those of the tensors that the code makes; sequences are taken to be as long as the preset allows.
"""

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

from kdctl.config.preset import Preset
from kdctl.cost.network import Activations, Network
from kdctl.cost.records import Part, Phase
from kdctl.distill.optimizer import TOGETHER
from kdctl.eval.distribution import BATCH
from kdctl.model.load import torch_dtype
from kdctl.quant.calibrate import by_decoder_layer
from kdctl.quant.fisher import SEQUENCES
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.quantizer import Statistic
from kdctl.rollout.sampler import PROMPT_TOKENS
from kdctl.rollout.teacher_states import group_size
from kdctl.system.cpu_products import packed_bytes

PROCESS_BYTES = 2**29
"""Python with torch, transformers and the rest, measured on a CPU; a CUDA context is taken to be as large."""
FLOAT32 = 4
ROUNDING = 6
"""Float32 copies of a layer while it is rounded: weight, targets, what was compensated, and how it is ordered."""


class Cost:
    """What one run takes, in bytes. cpu: memory is RAM, not that of a GPU.

    shards: FSDP2 divides training among so many processes, and this is one of them. copies: so many processes divide
    the rows of a step, each with whole models. memory_bytes: what the GPU has, a share of which logits take.
    """

    def __init__(
        self, preset: Preset, network: Network, cpu: bool, shards: int = 1, copies: int = 1, memory_bytes: int = 0
    ):
        self.preset, self.distill, self.network, self.cpu = preset, preset.distill, network, cpu
        self.logits = network.loss_bytes(None if cpu else memory_bytes)
        self.shards, self.copies, self.processes = shards, copies, shards * copies
        rows = preset.distill.rows_per_step // self.processes
        self.rows_at_once = min(preset.distill.micro_batch_size, rows)
        self.accumulates = rows > preset.distill.micro_batch_size
        self.quantized, self.itemsize = network.quantized_parameters, network.itemsize
        allowed = preset.prompts.max_prompt_tokens + preset.rollout.max_new_tokens
        self.longest = min(preset.distill.max_tokens, allowed)
        self.shapes = list(self._trained_shapes())
        self.trained = sum(map(math.prod, self.shapes))

    @property
    def followed(self) -> int:
        """Weights whose gradients are handed on to what is trained."""
        if self.distill.train != "lora":
            return self.quantized
        named = {name: shape for name, shape in self.network.layers.items() if self._updated(name)}
        return sum(map(math.prod, named.values()))

    def _updated(self, name: str) -> bool:
        """Tell whether a layer gets a low-rank update."""
        return any(fnmatchcase(name, target) for target in self.distill.lora_targets)

    def _trained_shapes(self) -> Iterator[tuple[int, ...]]:
        """Yield the shape of every tensor that the optimizer moves."""
        settings, group_size = self.distill, self.preset.quantize.group_size
        for name, (rows, columns) in self.network.layers.items():
            if settings.train == "weights":
                yield rows, columns
            if settings.train == "scales" or settings.learn_scales:
                yield rows, columns // group_size
            if settings.train == "lora" and self._updated(name):
                yield settings.lora_rank, columns
                yield rows, settings.lora_rank
        if settings.train_norms:
            yield from ((length,) for length in self.network.norms)

    # --- what stays -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> int:
        """A whole model in memory."""
        return (self.quantized + self.network.other_parameters) * self.itemsize

    @property
    def linears(self) -> int:
        """The student's own layers, dequantized."""
        return self.quantized * self.itemsize

    @property
    def grid(self) -> int:
        """Scales and zero points, a byte each."""
        return self.quantized // self.preset.quantize.group_size * (self.itemsize + 1)

    @property
    def moments(self) -> int:
        """The optimizer's state: two moments, or a row and a column of each matrix."""
        if self.distill.optimizer == "adamw":
            return 2 * FLOAT32 * self.trained
        return FLOAT32 * sum(map(sum, self.shapes))

    @property
    def checkpoint(self) -> int:
        """What training copies to RAM to go on while it is written; on a CPU only where that is free."""
        return (FLOAT32 * self.trained + self.moments) // self.shards

    @property
    def base(self) -> int:
        """What training reads and does not move: codes, or a base of low-rank updates that is not the teacher's own."""
        if self.distill.train == "scales":
            return self.quantized
        moved = self.distill.train == "lora" and self.preset.quantize.calibrated
        return self.linears if moved else 0

    @property
    def gradients(self) -> int:
        """Gradients of a step, float32; weights' take their weights' place where there is one micro-batch."""
        if self.distill.train != "weights" or self.accumulates:
            return FLOAT32 * self.trained
        return FLOAT32 * (self.trained - self.quantized)

    # --- phases -----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """Return what is in memory in each stretch of a run."""
        always = {"process": PROCESS_BYTES, "teacher": self.model}
        writer = {
            "process": PROCESS_BYTES,
            "model that writes": self.model,
            "weights ready for products": self._packed(),
        }
        training = {
            "process": PROCESS_BYTES,
            "teacher": self.model - self.linears + self.linears // self.shards,
            "student": self.linears // self.shards,
            "grid": self.grid // self.shards,
            "layers gathered": self._gathered(),
            "trained in float32": FLOAT32 * self.trained // self.shards,
            "optimizer state": self.moments // self.shards,
            "base or codes of what is trained": self.base // self.shards,
            "held-out states": self._heldout_states(),
        }
        return (
            _phase("generating", writer, {"keys, values and prompts": self._generating()}),
            self._quantizing(always | {"codes": self.quantized, "grid": self.grid}),
            _phase("training", training, self._training_moments()),
            _phase("writing a student", always, self._writing()) if self.shards == 1 else self._writing_divided(),
        )

    def _quantizing(self, parts: dict[str, int]) -> Phase:
        """Return the phase of making the PTQ student, which takes the teacher's place before it is measured."""
        settings, method = self.preset.quantize, QUANTIZERS[self.preset.quantize.method]
        rounding = FLOAT32 * ROUNDING * self.network.largest_layer
        backward = 0
        if Statistic.INPUT_HESSIAN in method.needs:
            layers = by_decoder_layer(list(self.network.layers)).values()
            inputs = max(sum(self.network.layers[name][1] ** 2 for name in names) for names in layers)
            states = 2 * settings.calibration_sequences * self.longest * self.network.hidden * self.itemsize
            rounding += self._layer() * self.itemsize + states + FLOAT32 * inputs
        if Statistic.OUTPUT_FISHER in method.needs:
            passing = SEQUENCES * self.longest * self.network.activations["none"].peak
            backward = int(passing) + self.logits
        worth = {"what outputs are worth": method.held(settings, self.network.layers)}
        measured = {"where weights were": self.offsets, "held-out states": self._heldout_states()}
        moments = {"reading back": backward, "rounding a layer": rounding, "measuring": self._reading() + self.logits}
        return _phase("quantizing", parts | worth | measured, moments | {"saving": self.folder})

    @property
    def offsets(self) -> int:
        """Where weights were in their cells, a byte each, if the method says."""
        return self.quantized if QUANTIZERS[self.preset.quantize.method].leaves_offsets else 0

    def _training_moments(self) -> dict[str, int]:
        tokens, seen = self.rows_at_once * self.longest, self._activations()
        gradients = self.gradients // self.shards
        earlier = gradients if self.accumulates or self.distill.train != "weights" else 0
        loss = self.logits
        largest = max(map(math.prod, self.shapes)) // self.shards
        return {
            "generating": self._writing_live() if self.distill.live else 0,
            "forward and backward": int(tokens * seen.peak) + loss + earlier,
            "end of backward": gradients + int(tokens * (seen.peak - seen.kept)) + self._receiving(),
            "update": gradients + TOGETHER * FLOAT32 * largest,
            "measuring": self._reading() + loss,
        }

    def _activations(self) -> Activations:
        return self.network.activations[self.preset.runtime.activation_checkpointing]

    def _receiving(self) -> int:
        """Float32 copies of one layer while its gradient is handed on: weight, position and gradient."""
        return 3 * FLOAT32 * self.network.largest_layer // self.shards

    def _gathered(self) -> int:
        """Two decoder layers of a divided model, whole, and one's gradient before and while it is summed."""
        if self.shards == 1:
            return 0
        return self._layer() * (2 * self.itemsize + self.itemsize + FLOAT32)

    def _layer(self) -> int:
        """Weights of the largest decoder layer."""
        layers = by_decoder_layer(list(self.network.layers)).values()
        return max(sum(math.prod(self.network.layers[name]) for name in names) for names in layers)

    def _live_rows(self) -> int:
        return min(self.preset.rollout.batch_size, self.distill.refresh_every * self.distill.rows_per_step)

    def _writing_live(self) -> int:
        """Keys and values, and the student's layers of other processes while it writes."""
        gathered = self.linears if self.shards > 1 and self.preset.rollout.engine == "transformers" else 0
        return self._cache(self._live_rows()) + self._packed() + gathered

    def _cache(self, rows: int) -> int:
        """Keys and values of rollouts in the making."""
        capacity = self.preset.prompts.max_prompt_tokens + self.preset.rollout.max_new_tokens
        return int(rows * capacity * self.network.cache)

    def _packed(self) -> int:
        """The copies of linear layers and output head that a block of completions is written with."""
        weights = self.quantized + self.network.vocabulary * self.network.hidden
        return packed_bytes(weights, torch_dtype(self.preset.teacher.dtype)) if self.cpu else 0

    def _generating(self) -> int:
        """The largest cache of any store, beside the prompts that are read at once."""
        rollout, heldout, prompt = self.preset.rollout, self.preset.heldout, self.preset.prompts.max_prompt_tokens
        rows = min(heldout.prompts_per_block, heldout.num_prompts)
        cache = int(rows * (prompt + heldout.max_new_tokens) * self.network.cache)
        if set(self.distill.stores) - {"dataset"}:
            block = min(rollout.prompts_per_block, rollout.num_prompts) * rollout.num_generations
            cache = max(cache, self._cache(min(rollout.batch_size, block)))
        return cache + int(min(PROMPT_TOKENS, rows * prompt) * self.network.reading)

    def _reading(self) -> int:
        """A batch of held-out sequences."""
        tokens = self.preset.prompts.max_prompt_tokens + self.preset.heldout.max_new_tokens
        return int(BATCH * tokens * self.network.reading)

    def _heldout_states(self) -> int:
        tokens = self.preset.heldout.num_prompts * self.preset.heldout.max_new_tokens
        return tokens * self.network.hidden * self.itemsize

    def _writing(self) -> dict[str, int]:
        """The student while it is measured and saved; what was stored is read back a layer at a time."""
        student = self.grid + self.quantized
        return {"measuring and saving": self.linears + student + self.logits}

    def _writing_divided(self) -> Phase:
        """The same in the main one of several processes: models are divided when measured, and gone when it is saved.

        Rows of codes are put together, packed and saved in RAM; libraries copy packed ones once.
        """
        rows = (2 * self.linears + self.grid + self.quantized) // self.shards + self._heldout_states()
        passing = 2 * self.itemsize * self._layer() + self._reading() + self.network.loss_bytes(self.cpu)
        saving = self.quantized + self.grid + 2 * self.folder if self.cpu else 0
        whole = {"process": PROCESS_BYTES, "what is not quantized": self.network.other_parameters * self.itemsize}
        return _phase("writing a student", whole, {"measuring": rows + passing, "saving": saving})

    # --- disk and tokens --------------------------------------------------------------------------------------------

    @property
    def folder(self) -> int:
        """Safetensors of a student folder."""
        settings = self.preset.quantize
        total = self.network.other_parameters * self.itemsize
        for rows, columns in self.network.layers.values():
            groups = columns // settings.group_size
            total += FLOAT32 * rows * _words(columns, settings.bits) + rows * groups * self.itemsize + 16
            total += 0 if settings.symmetric else FLOAT32 * _words(rows, settings.bits) * groups
        return total

    def disk(self) -> dict[str, int]:
        """Return what the run folder holds at most, while a checkpoint and a student are being written."""
        kept = self.distill.keep_last + self.distill.stop_early + 1
        found = {
            "rollouts": self.stored(),
            "teacher states": self.states(),
            f"{kept} checkpoints": kept * 3 * FLOAT32 * self.trained,
            "PTQ and trained student, one more while it is checked": 3 * self.folder,
            "where weights were": self.offsets,
        }
        return {name: size for name, size in found.items() if size}

    def stored(self) -> int:
        """Return the bytes of all stores at most: a token, and one's log-probability, in 32 bits each."""
        prompt = self.preset.prompts.max_prompt_tokens
        return 2 * FLOAT32 * sum(tokens + count * prompt for count, tokens in self.completions().values())

    def states(self) -> int:
        """Return the bytes of teacher states of what is trained on, as int8 with scales of two bytes."""
        kept, hidden = self.preset.rollout.keep_states, self.network.hidden
        a_token = {"no": 0, "exact": hidden * self.itemsize, "int8": hidden + 2 * (hidden // group_size(hidden))}[kept]
        return a_token * sum(tokens for name, (_, tokens) in self.completions().items() if "held-out" not in name)

    def completions(self) -> dict[str, tuple[int, int]]:
        """Return completions and their tokens, at most, by who writes them."""
        rollout, heldout, settings = self.preset.rollout, self.preset.heldout, self.distill
        found = {"teacher, held-out": (heldout.num_prompts, heldout.max_new_tokens)}
        count = rollout.num_prompts * rollout.num_generations
        sources = set(settings.stores)
        if self.preset.quantize.calibrated:
            sources.add(self.preset.quantize.calibration_source)
        found |= dict.fromkeys(sorted(sources), (count, rollout.max_new_tokens))
        if settings.live:
            rows = math.ceil(settings.lmbda * settings.steps * settings.rows_per_step)
            found["student, live"] = (rows, rollout.max_new_tokens)
        if self.preset.eval.student_written:
            found["students, held-out"] = (2 * heldout.num_prompts, heldout.max_new_tokens)
        return {name: (rows, rows * longest) for name, (rows, longest) in found.items()}

    def generated(self) -> dict[str, int]:
        """Return how many tokens are generated at most, by who writes them."""
        return {name: tokens for name, (_, tokens) in self.completions().items() if name != "dataset"}


def _phase(name: str, parts: dict[str, int], moments: dict[str, int]) -> Phase:
    return Phase(
        name=name,
        parts=as_parts(parts),
        moments=as_parts(moments),
        peak_bytes=sum(parts.values()) + max(moments.values()),
    )


def as_parts(sizes: dict[str, int]) -> tuple[Part, ...]:
    """Name sizes, leaving out what takes nothing."""
    return tuple(Part(name=name, size_bytes=size) for name, size in sizes.items() if size)


def _words(numbers: int, bits: int) -> int:
    """Return the int32 words of a packed row."""
    return -(-numbers * bits // 32)
