"""Damaged model files end in one message: no traceback, no hang over 10 s, no gigabyte of memory, nothing in the cache.

Each case changes one valid tiny file, GGUF, safetensors, an index, a configuration or a tokenizer, and reads the model
as every stage does before its work.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from parts import mutations, tiny
from parts.base import Broken, draw, expect, shared

SHORT, FULL = 120, 4000
LONGEST_S = 10.0
MOST_KIB = 2**20
TREES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
KINDS = (
    "gguf bytes",
    "gguf bytes",
    "gguf fields",
    "gguf fields",
    "gguf tensors",
    "safetensors",
    "safetensors header",
    "json",
    "json",
    "json",
    "json bytes",
)


def prepare(seed: int, where: Path) -> None:
    """Write the valid files: a folder of one file, one of two, and a GGUF file in parts."""
    from transformers import AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tiny.make_model(where / "one", seed=seed, num_hidden_layers=1, **sizes)
    shutil.copytree(where / "one", where / "two")
    (where / "two" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(where / "one").save_pretrained(where / "two", max_shard_size="8KB")
    fields, tensors, data = _gguf(where / "one")
    (where / "gguf.json").write_text(json.dumps([fields, tensors]), encoding="utf-8")
    (where / "gguf.data").write_bytes(data)


def case(seed: int, index: int, where: Path) -> str:
    """Change a file and read the model."""
    random = draw("headers", seed, index)
    kind = random.choice(KINDS)
    os.environ["KDCTL_CACHE"] = str(where / "cache")
    change = {"gguf": _changed_gguf, "safe": _changed_safetensors, "json": _changed_json}[kind[:4]]
    way, model = change(random, kind, where, shared(where))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    outcome = _read(model)
    seconds = time.perf_counter() - started
    expect(seconds < LONGEST_S, f"{kind}, {way}: {seconds:.0f} s")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    expect(grown < MOST_KIB, f"{kind}, {way}: {grown / 2**20:.1f} GiB of memory")
    if outcome == "refused":
        left = [path for path in where.rglob("cache/gguf/*/*") if path.name == "config.json"]
        expect(not left or model.suffix != ".gguf" or _whole(left), f"{kind}, {way}: left {left}")
    return f"{kind}: {outcome}"


def _whole(left: list[Path]) -> bool:
    """Tell whether what is in the cache is a whole model; its chat template or its ends may be what is refused."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(left[0].parent, trust_remote_code=False) is not None


def _read(model: Path) -> str:
    """Read a model as a stage does before its work."""
    import torch

    from kdctl.cli.explain import explain
    from kdctl.config.preset import RuntimeSection, TeacherSection
    from kdctl.model.teacher import Teacher

    torch.set_num_threads(1)
    teacher = Teacher(TeacherSection(model=str(model), dtype="float32"), RuntimeSection(offline=True, device="cpu"))
    steps: tuple[Callable[[], object], ...] = (teacher.config, teacher.fingerprint, teacher.tokenizer, teacher.load)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            for step in steps:
                step()
    except Exception as error:
        ending = explain(error)
        if ending.code != 2:
            raise Broken(f"{type(error).__name__}: {error}") from error
        expect(bool(ending.message.strip()), "an empty message")
        return "refused"
    return "read"


def _changed_gguf(random: Random, kind: str, where: Path, made: Path) -> tuple[str, Path]:
    (fields, tensors), data = json.loads((made / "gguf.json").read_text()), (made / "gguf.data").read_bytes()
    file = where / "m.gguf"
    if kind == "gguf bytes":
        whole = mutations.gguf_bytes(fields, tensors, data)
        way, found = mutations.changed_bytes(random, whole, len(whole) - len(data))
    elif kind == "gguf fields":
        way, fields = mutations.changed_fields(random, fields)
        found = mutations.gguf_bytes(fields, tensors, data)
    else:
        way, tensors = _changed_tensors(random, tensors)
        found = mutations.gguf_bytes(fields, tensors, data)
    file.write_bytes(found)
    return way, file


def _changed_tensors(random: Random, tensors: list[list]) -> tuple[str, list[list]]:
    """Change what is said of one tensor."""
    way = random.choice(("name", "dimensions", "kind", "offset", "delete", "twice", "swap"))
    place, other = random.randrange(len(tensors)), random.randrange(len(tensors))
    if way == "name":
        tensors[place][0] = random.choice(
            ("", "../x", "rope_freqs.weight", "blk.0.attn_q.bias", "output.weight", "x" * 99)
        )
    elif way == "dimensions":
        tensors[place][1] = [random.choice(mutations.EDGES) for _ in range(random.randint(0, 5))]
    elif way == "kind":
        tensors[place][2] = random.randint(0, 45)
    elif way == "offset":
        tensors[place][3] = random.choice((32, 64, *mutations.EDGES))
    elif way == "delete":
        del tensors[place]
    elif way == "twice":
        tensors.append(tensors[place])
    else:
        tensors[place][1:], tensors[other][1:] = tensors[other][1:], tensors[place][1:]
    return way, tensors


def _changed_safetensors(random: Random, kind: str, where: Path, made: Path) -> tuple[str, Path]:
    folder = Path(shutil.copytree(made / random.choice(("one", "two")), where / "model"))
    file = random.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if kind == "safetensors":
        way, found = mutations.changed_bytes(random, data, length + 8)
    else:
        way, tree = mutations.changed_tree(random, json.loads(data[8 : 8 + length]))
        head = mutations.as_json(tree)
        found = len(head).to_bytes(8, "little") + head + data[8 + length :]
    file.write_bytes(found)
    return way, folder


def _changed_json(random: Random, kind: str, where: Path, made: Path) -> tuple[str, Path]:
    name = random.choice(TREES)
    folder = Path(shutil.copytree(made / ("two" if "index" in name else "one"), where / "model"))
    data = (folder / name).read_bytes()
    if kind == "json bytes":
        way, found = mutations.changed_bytes(random, data, len(data))
    else:
        way, tree = mutations.changed_tree(random, json.loads(data))
        found = mutations.as_json(tree)
    (folder / name).write_bytes(found)
    return f"{name}, {way}", folder


def _gguf(folder: Path) -> tuple[list[list], list[list], bytes]:
    """Describe the model of a folder as llama.cpp's converter does."""
    import gguf
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors, data = [], b""
    for own, tensor in model.state_dict().items():
        if own != "lm_head.weight":
            stored = names.get_name(own, try_suffixes=(".weight",))
            tensors.append([stored, list(reversed(tensor.shape)), 0, len(data)])
            raw = tensor.numpy().tobytes()
            data += raw + b"\0" * (-len(raw) % 32)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *tiny.SPECIALS, "he", *(f"<unused{i}>" for i in range(4))]
    fields = [
        ["general.architecture", "str", "llama"],
        ["llama.context_length", "u32", config.max_position_embeddings],
        ["llama.embedding_length", "u32", config.hidden_size],
        ["llama.block_count", "u32", config.num_hidden_layers],
        ["llama.feed_forward_length", "u32", config.intermediate_size],
        ["llama.attention.head_count", "u32", config.num_attention_heads],
        ["llama.attention.head_count_kv", "u32", config.num_key_value_heads],
        ["llama.attention.layer_norm_rms_epsilon", "f32", config.rms_norm_eps],
        ["llama.rope.freq_base", "f32", 10000.0],
        ["llama.rope.dimension_count", "u32", config.head_dim],
        ["llama.vocab_size", "u32", config.vocab_size],
        ["tokenizer.ggml.model", "str", "gpt2"],
        ["tokenizer.ggml.pre", "str", "gpt-2"],
        ["tokenizer.ggml.tokens", "array", tokens],
        ["tokenizer.ggml.token_type", "array", [3 if token in tiny.SPECIALS else 1 for token in tokens]],
        ["tokenizer.ggml.merges", "array", ["h e"]],
        ["tokenizer.ggml.eos_token_id", "u32", 258],
        ["tokenizer.chat_template", "str", tiny.TEMPLATE],
    ]
    return fields, tensors, data
