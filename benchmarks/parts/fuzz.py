"""Whatever a user writes ends in a result or one message: no traceback, no hang, no file outside run folder and cache.

A case changes one thing that users write: a preset, ``--set`` values, a prompt file, a chat template, a generation or
model configuration, a sweep file. Most only resolve it; those of prompts, templates and configurations sample too.
"""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from parts.base import draw, expect, shared
from parts.mutations import ODD, changed_bytes
from parts.tiny import make_model, write_preset
from parts.warm import run_kdctl

SHORT, FULL = 12, 6000
HANG_S = 60.0
"""A loaded machine runs a command of two seconds in this at the most."""
KINDS = (
    ("preset",) * 4 + ("set",) * 6 + ("prompts",) * 3 + ("template",) * 3 + ("generation", "config", "sweep", "sweep")
)
ROLLOUT = ("rollout", "--preset", "p.json", "--run", "r", "--source", "teacher", "--show", "2")
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    10**12,
    10**30,
    2**31,
    2**63,
    -(2**63),
    0.5,
    1e-300,
    5e-324,
    1e300,
    float("inf"),
    float("nan"),
)
WORDS = (
    *ODD,
    *NUMBERS,
    "a/b",
    "..",
    "\x1b[2J",
    "\u202e",
    "naïve",
    " ",
    "\n",
    "kdctl",
    "smoke",
    "2024-02-30",
    ["a/../b"],
)
EXPRESSIONS = (
    "tools | length", "'a' + 1", "1 / 0", "messages[9].content", "x.y.z", "strftime_now('%d %Q')", "'x' * 10 ** 11",
    "9 ** (9 ** 9)", "range(10 ** 12) | list", "messages | tojson", "messages[0].content[::-1]", "none",
    "raise_exception('no')",
    "messages.pop()", "self", "cycler", "namespace(a=1).a", "dict(a=2)", "messages.__class__", "lipsum(3)", "'\\ud800'",
    "documents[0].text", "'%s' % messages", "messages | map(attribute='content') | join", "'a' | center(10 ** 11)",
)  # fmt: skip
STATEMENTS = (
    "{{% set x = {} %}}", "{{{{ {} }}}}", "{{% if {} %}}a{{% endif %}}", "{{% for a in {} %}}b{{% endfor %}}",
    "{{% macro f() %}}{{{{ f() }}}}{}{{% endmacro %}}{{{{ f() }}}}", "{{% include {} %}}",
    "{{% generation %}}{}", "{{% {} ",
)  # fmt: skip


def prepare(seed: int, where: Path) -> None:
    """Make the model once."""
    make_model(where / "m")


def case(seed: int, index: int, where: Path) -> str:
    """Change one thing and run a command that reads it."""
    random = draw("fuzz", seed, index)
    kind = random.choice(KINDS)
    write_preset(where / "p.json", shared(where) / "m", rollout__num_prompts=2, heldout__num_prompts=2)
    argv = MAKE[kind](random, where)
    before = {path.name for path in where.iterdir()}
    ended = run_kdctl(argv, where, timeout=HANG_S)
    said = f"{argv}: exit code {ended.code}: {ended.err[-1500:]}"
    expect(ended.code in (0, 2), said)
    expect("Traceback" not in ended.err and (ended.code == 0 or bool(ended.err.strip())), said)
    expect("\x1b[2J" not in ended.out + ended.err, f"{argv}: an escape sequence reaches the terminal")
    strange = {path.name for path in where.iterdir()} - before - {"r", "cache", "runs"}
    expect(not strange, f"{argv}: files outside the run folder and the cache: {sorted(strange)}")
    return f"{kind}, exit code {ended.code}"


def _preset(random: Random, where: Path) -> list[str]:
    tree = json.loads((where / "p.json").read_text(encoding="utf-8"))
    for _ in range(random.randint(1, 3)):
        section = random.choice([*tree])
        if isinstance(tree[section], dict) and tree[section] and random.random() < 0.8:
            tree[section][random.choice([*tree[section], "odd"])] = random.choice(WORDS)
        else:
            tree[section] = random.choice(WORDS)
    data = json.dumps(tree).encode()
    if random.random() < 0.2:
        _, data = changed_bytes(random, data, len(data))
    (where / "p.json").write_bytes(data)
    return [random.choice(("quantize", "distill", "eval")), "--preset", "p.json", "--run", "r", "--dry-run"]


def _set(random: Random, where: Path) -> list[str]:
    from kdctl.config.resolve import known_keys

    argv = [random.choice(("quantize", "rollout", "distill", "eval")), "--preset", "p.json", "--run", "r", "--dry-run"]
    for _ in range(random.randint(1, 2)):
        value = random.choice(WORDS)
        text = json.dumps(value) if random.random() < 0.7 else str(value)
        argv += ["--set", f"{random.choice(known_keys())}={text}".replace("\0", "")]
    return argv


def _prompts(random: Random, where: Path) -> list[str]:
    rows: list[Any] = [{"prompt": f"question {number}"} for number in range(8)]
    for _ in range(random.randint(0, 3)):
        odd = random.choice(WORDS)
        rows[random.randrange(8)] = random.choice(
            (odd, {"prompt": odd}, {"messages": odd}, {"messages": [{"role": "user", "content": odd}]}, {"other": odd})
        )
    data = "\n".join(map(json.dumps, rows)).encode(random.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig")))
    if random.random() < 0.5:
        _, data = changed_bytes(random, data, len(data))
    name = "q" + random.choice((".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".txt", ".JSONL", ".jsonl.gz", ".tsv"))
    (where / name).write_bytes(data)
    return [*ROLLOUT, "--set", f"prompts.train={name}"]


def _template(random: Random, where: Path) -> list[str]:
    model = shutil.copytree(shared(where) / "m", where / "m")
    parts = [random.choice(STATEMENTS).format(random.choice(EXPRESSIONS)) for _ in range(random.randint(1, 2))]
    own = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text("".join(random.sample([*parts, own], len(parts) + 1)), encoding="utf-8")
    write_preset(where / "p.json", "m", rollout__num_prompts=2, heldout__num_prompts=2)
    return [*ROLLOUT]


def _configuration(name: str) -> Any:
    def make(random: Random, where: Path) -> list[str]:
        model = shutil.copytree(shared(where) / "m", where / "m")
        tree = json.loads((model / name).read_text(encoding="utf-8"))
        for _ in range(random.randint(1, 2)):
            key = random.choice([*tree, "eos_token_id", "text_config", "max_position_embeddings"])
            tree[key] = random.choice((*ODD, [258, 10], [258, [1]], -1, "258", 264))
        data = json.dumps(tree).encode()
        if random.random() < 0.2:
            _, data = changed_bytes(random, data, len(data))
        (model / name).write_bytes(data)
        write_preset(where / "p.json", "m", rollout__num_prompts=2, heldout__num_prompts=2)
        return [*ROLLOUT]

    return make


def _sweep(random: Random, where: Path) -> list[str]:
    tree: dict[str, Any] = {
        "method": "random", "run_cap": 2, "metric": {"name": "eval/forward_kl", "goal": "minimize"},
        "parameters": {"distill.lr": {"values": [1e-4, 1e-3]}, "distill.beta": {"min": 0.0, "max": 1.0}},
    }  # fmt: skip
    place: dict[str, Any] = (
        tree if random.random() < 0.4 else random.choice([tree["metric"], *tree["parameters"].values()])
    )
    place[random.choice([*place, "odd", "distribution", "q"])] = random.choice(WORDS)
    data = json.dumps(tree).encode()
    if random.random() < 0.3:
        _, data = changed_bytes(random, data, len(data))
    (where / "s.yaml").write_bytes(data)
    return ["sweep", "s.yaml", "--preset", "p.json", "--run", "r", "--dry-run"]


MAKE: dict[str, Any] = {
    "preset": _preset,
    "set": _set,
    "prompts": _prompts,
    "template": _template,
    "generation": _configuration("generation_config.json"),
    "config": _configuration("config.json"),
    "sweep": _sweep,
}
