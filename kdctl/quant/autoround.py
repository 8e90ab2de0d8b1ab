"""AutoRound: rounding and clipping tuned by signed gradients on calibration tokens, with Intel's auto-round.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs". The package is
optional. It patches transformers and logging on import and seeds the process, so it runs in a process of its own
(``python -m kdctl.quant.autoround FOLDER``), which reads the teacher from disk and gets everything else in files.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdctl.base.errors import ModelError
from kdctl.base.progress import Advance, ignore
from kdctl.config.preset import QuantizeSection
from kdctl.config.section import Dtype
from kdctl.model.batch import Batch
from kdctl.model.load import linear_shapes, load_model, torch_dtype
from kdctl.model.tokenizer import open_tokenizer
from kdctl.quant.affine import Grid, QParams, QuantizedWeight, Weights, dequantize, grid_of, quantize
from kdctl.quant.calibrate import by_decoder_layer
from kdctl.quant.methods.autoround import INSTALL, AutoroundSettings
from kdctl.quant.quantizer import QuantizeContext
from kdctl.run.files import write_text, writing

TASK, TOKENS, RESULT = "task.json", "tokens.safetensors", "result.safetensors"
BATCH = 8
LAST_LINES = 20
PROGRESS = re.compile(r"^Quantizing .*? (\d+)/(\d+) \[")


class Task(BaseModel):
    """What the process that runs auto-round is told; the calibration tokens come in a file beside it."""

    model_config = ConfigDict(frozen=True)

    teacher: Path
    dtype: Dtype
    device: str
    settings: QuantizeSection
    names: tuple[str, ...]
    seed: int


def task_of(context: QuantizeContext) -> Task:
    """Describe what is to be quantized. Raises ModelError where the teacher has no folder to be read from."""
    if context.folder is None:
        raise ModelError("AutoRound reads the teacher in a process of its own, so it needs the teacher's folder")
    return Task.model_validate(
        {
            "teacher": context.folder,
            "dtype": str(context.dtype).removeprefix("torch."),
            "device": context.teacher.device.type,
            "settings": context.settings,
            "names": tuple(context.layers),
            "seed": context.seed,
        }
    )


def autoround(task: Task, batches: Sequence[Batch], progress: Advance = ignore) -> Weights:
    """Quantize a teacher's layers with AutoRound on calibration batches.

    Raises ModelError if it fails, leaves a layer out, or if a weight that
    it tuned differs in any bit from (q - z) * s.
    """
    by_decoder_layer(task.names)
    with tempfile.TemporaryDirectory(prefix="kdctl-autoround-") as temporary:
        folder = Path(temporary)
        write_text(folder / TASK, task.model_dump_json())
        with writing(folder / TOKENS):
            save_file(rectangle(batches), folder / TOKENS)
        _run(folder, progress)
        tuned = load_file(folder / RESULT, device=task.device)
    if missing := [name for name in task.names if f"{name}.scale" not in tuned]:
        raise ModelError(
            f"auto-round left {len(missing)} layers in full precision ({', '.join(missing[:3])}), because it does not "
            "take layers of this shape; add them to quantize.skip"
        )
    return {name: _layer(name, tuned, grid_of(task.settings)) for name in task.names}


def rectangle(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Stack the sequences of batches into one right-padded pair of tensors, (rows, T) int64, padding all 0."""
    sequences = [row.cpu() for batch in batches for row in batch.input_ids.split(batch.seq_lens)]
    return {
        "input_ids": pad_sequence(sequences, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in sequences], batch_first=True),
    }


def _layer(name: str, tuned: dict[str, Tensor], grid: Grid) -> QuantizedWeight:
    weight, scale, zero = (tuned[f"{name}.{part}"] for part in ("weight", "scale", "zero_point"))
    return on_grid(name, weight, QParams(scale, zero.to(torch.uint8)), grid)


def on_grid(name: str, weight: Tensor, qparams: QParams, grid: Grid) -> QuantizedWeight:
    """Recover the codes of a weight that is on the grid already, in the scale's dtype or rounded to it.

    Raises ModelError unless codes, scales and zero points give back every bit of it.
    """
    found = QuantizedWeight(quantize(weight, qparams, grid), qparams, grid)
    expected, value = weight.to(qparams.scale.dtype), dequantize(found.codes, qparams, grid)
    if not torch.equal(value, expected):
        difference = (value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        raise ModelError(
            f"auto-round's weight of {name} is up to {float(difference):.2e} of its largest value away from (q − z)·s "
            "with its own scales and zero points, so a student folder cannot hold it; this version of auto-round is "
            f"not one that kdctl knows, get that: {INSTALL}"
        )
    return found


def _run(folder: Path, progress: Advance) -> None:
    """Run auto-round on a task folder, reading its progress bar. Raises ModelError with its last words if it fails."""
    # AR_* would change what is computed; without its progress bar there is nothing to read
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE" and key[:3] != "AR_"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "AR_WORK_SPACE": str(folder)}
    command = [sys.executable, "-P", "-m", "kdctl.quant.autoround", str(folder)]
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        for line in child.stdout or ():
            last.append(line)
            if bar := PROGRESS.match(line):
                progress(int(bar[1]), int(bar[2]))
    if child.returncode:
        raise ModelError(f"auto-round ended with exit code {child.returncode}; its last lines:\n{''.join(last)}")


def tune(task: Task, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run auto-round; returns each layer's weight, scale and zero_point as it leaves them. Changes the process."""
    from auto_round import AutoRound, SignRoundConfig

    settings, dtype = task.settings, torch_dtype(task.dtype)
    model = load_model(task.teacher, dtype, torch.device("cpu"))
    tokenizer = open_tokenizer(task.teacher)
    # with a padding token, auto-round leaves that token out of its loss wherever it stands, not only as padding
    tokenizer.pad_token = None
    rows = len(tokens["input_ids"])
    size = min(BATCH, rows)
    # "int" has scales of either sign on symmetric grids; "int_sym_gptq" has the positive ones that are stored here
    kind = "int_sym_gptq" if settings.symmetric else "int"
    config = SignRoundConfig(
        iters=settings.of(AutoroundSettings).autoround_iters,
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.symmetric,
        data_type=kind,
    )
    whole = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
    compressor = AutoRound(
        model,
        tokenizer,
        alg_configs=config,
        scale_dtype=dtype,
        layer_config={name: dict(whole) for name in linear_shapes(model) if name not in task.names},
        dataset=[{key: value[i : i + size] for key, value in tokens.items()} for i in range(0, rows, size)],
        seqlen=tokens["input_ids"].shape[1],
        nsamples=rows,
        batch_size=size,
        device_map=task.device,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        seed=task.seed % 2**32,  # all that numpy, which it seeds, takes
        amp=dtype == torch.bfloat16,  # otherwise a CPU would tune fp16 and fp32 models in bf16
    )
    quantized, _ = compressor.quantize()
    return read_layers(quantized, task.names)


def read_layers(model: torch.nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Collect weight, scale and zero point from the layers that auto-round quantized."""
    found: dict[str, Tensor] = {}
    for name in names:
        left = vars(model.get_submodule(name))
        if "scale" in left:
            parts = {"weight": model.get_parameter(f"{name}.weight"), "scale": left["scale"], "zero_point": left["zp"]}
            found |= {f"{name}.{part}": tensor.detach().cpu().contiguous() for part, tensor in parts.items()}
    return found


def main(folder: Path) -> None:
    """Do the task of a folder and leave the result there."""
    task = Task.model_validate_json((folder / TASK).read_text(encoding="utf-8"))
    tuned = tune(task, load_file(folder / TOKENS))
    with writing(folder / RESULT):
        save_file(tuned, folder / RESULT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
