"""Changes of valid files, drawn from a generator: bytes, JSON trees and GGUF fields."""

import copy
import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

EDGES = (0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 258, 263, 264, 10**4, 2**31, 2**63, 2**64, 10**30, 0.0, -0.5, 1e-300, 1e300, "",
    "0",
    "llama", "x" * 3000, "\x00", "../../x", "{{", [], [0], [258, 999], ["a"], [[]], {}, {"a": 1}, {"rope_type": "yarn"},
)  # fmt: skip
SCALARS = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
LAYOUTS = dict(zip(SCALARS, "BbHhIif?QqD".replace("D", "d"), strict=True))
STRING, ARRAY = 8, 9


def changed_bytes(random: Random, data: bytes, end: int) -> tuple[str, bytes]:
    """Change the first ``end`` bytes of a file in one of seven ways. Returns the way and the file."""
    way = random.choice(("flip", "cut", "splice", "swap", "drop", "insert", "repeat"))
    place, other = sorted((random.randrange(end), random.randrange(end)))
    length = random.randint(1, 64)
    found = bytearray(data)
    if way == "flip":
        for _ in range(random.randint(1, 4)):
            found[random.randrange(end)] ^= 1 << random.randrange(8)
    elif way == "cut":
        del found[random.choice((place, random.randrange(len(data)))) :]
    elif way == "splice":
        width = random.choice((1, 2, 4, 8))
        found[place : place + width] = (random.choice(EDGES) % 2 ** (8 * width)).to_bytes(width, "little")
    elif way == "swap":
        length = min(length, other - place, end - other)
        found[place : place + length], found[other : other + length] = (
            data[other : other + length],
            data[place : place + length],
        )
    elif way == "drop":
        del found[place : place + length]
    else:
        found[place:place] = random.randbytes(length) if way == "insert" else data[place : place + length]
    return way, bytes(found)


def changed_tree(random: Random, tree: Any) -> tuple[str, Any]:
    """Change one place of a JSON tree. Returns the way and the tree."""
    tree = copy.deepcopy(tree)
    holders = list(_holders(tree))
    way = random.choice(("value", "delete", "move", "nest", "another key"))
    holder, key = random.choice(holders)
    if way == "value":
        holder[key] = random.choice(ODD)
    elif way == "delete":
        del holder[key]
    elif way == "nest":
        holder[key] = [holder[key]] if random.random() < 0.5 else {"x": holder[key]}
    elif way == "move":
        other, there = random.choice(holders)
        holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
    else:
        random.choice([tree] if isinstance(tree, dict) else [{}])[random.choice(KEYS)] = random.choice(ODD)
    return way, tree


KEYS = (
    "auto_map", "quantization_config", "text_config", "rope_scaling", "rope_parameters", "sliding_window",
    "layer_types", "head_dim", "tie_word_embeddings", "eos_token_id", "transformers_weights", "architectures", "dtype",
    "torch_dtype", "hidden_act", "chat_template", "tokenizer_class", "added_tokens_decoder", "model_max_length",
    "normalizer",
    "weight_map", "metadata", "use_cache", "attn_implementation", "is_encoder_decoder", "num_local_experts",
    "max_length",
)  # fmt: skip


def _holders(tree: Any) -> Any:
    """Yield every place of a tree, few of a long list."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items if len(items) < 60 else items[:3] + items[-3:]:
        yield tree, key
        yield from _holders(value)


def changed_fields(random: Random, fields: Sequence[list[Any]]) -> tuple[str, list[list[Any]]]:
    """Change one of the fields (key, kind, value) of a GGUF file."""
    found = [list(field) for field in fields]
    way = random.choice(("value", "kind", "delete", "twice", "rename", "array", "add"))
    place = random.randrange(len(found))
    key, kind, _ = found[place]
    if way == "value" and kind in SCALARS:
        found[place][2] = random.choice((*EDGES, -1, 0.0, 1e30, float("nan"), float("inf")))
    elif way == "value":
        found[place][2] = random.choice(("", "llama", "qwen2", "gemma2", "x" * 2000, "\x00", "../x"))
        found[place][1] = "str"
    elif way == "kind":
        found[place] = [key, random.choice([*SCALARS]), random.choice(EDGES)]
    elif way == "delete":
        del found[place]
    elif way == "twice":
        found.append([key, random.choice([*SCALARS]), 1])
    elif way == "rename":
        found[place][0] = random.choice((key[:-1], key.upper(), key + ".x", "llama.logit_scale", "", "llama."))
    elif way == "array":
        found[place] = [key, "array", [random.choice(EDGES) % 2**31 for _ in range(random.randint(0, 3))]]
    else:
        found.append(random.choice(ADDED))
    return way, found


ADDED = [
    ["llama.rope.scaling.type", "str", "yarn"], ["llama.rope.scaling.type", "str", "longrope"],
    ["llama.rope.scaling.factor", "f32", 4.0], ["llama.expert_count", "u32", 8], ["general.type", "str", "adapter"],
    ["split.count", "u16", 2], ["llama.attention.sliding_window", "u32", 8], ["general.alignment", "u32", 0],
    ["general.alignment", "u32", 7], ["tokenizer.huggingface.json", "str", "{}"], ["kdctl.config", "str", "{}"],
    ["kdctl.config", "str", '{"model_type":"llama","num_hidden_layers":99999999}'], ["kdctl.stop_ids", "array", [-1]],
    ["tokenizer.chat_template.x", "u8", 1], ["tokenizer.ggml.eot_token_id", "str", "a"],
    ["llama.rope.dimension_count", "u32", 2**32 - 1],
]  # fmt: skip


def gguf_bytes(fields: Sequence[Sequence[Any]], tensors: Sequence[Sequence[Any]], data: bytes) -> bytes:
    """Encode a GGUF file. tensors: name, dimensions, kind, offset."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, kind, value in fields:
        parts += [_text(key), _value(kind, value)]
    for name, dimensions, kind, offset in tensors:
        parts += [_text(name), struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)]
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % 32) + data


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(kind: str, value: Any) -> bytes:
    if kind in SCALARS:
        return struct.pack("<I", SCALARS[kind]) + _scalar(kind, value)
    if kind == "str":
        return struct.pack("<I", STRING) + _text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack("<IIQ", ARRAY, SCALARS["i32"], len(value)) + b"".join(_scalar("i32", item) for item in value)


def _scalar(kind: str, value: Any) -> bytes:
    if kind in ("f32", "f64"):
        return struct.pack(f"<{LAYOUTS[kind]}", float(value))
    if kind == "bool":
        return bytes([int(bool(value))])
    bits = 8 * struct.calcsize(f"<{LAYOUTS[kind]}")
    number = int(value) if value == value and abs(value) < 2**70 else 0
    return (number % 2**bits).to_bytes(bits // 8, "little")


def as_json(tree: Any) -> bytes:
    """Encode a tree."""
    return json.dumps(tree).encode()
