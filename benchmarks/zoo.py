"""Take every causal language model of transformers through kdctl and write docs/reference/networks.md.

    python benchmarks/zoo.py [MODEL_TYPE...] [--workers 2]

With model types only those are tried and nothing is written. Ends with exit code 1 where a promise is broken.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parts import warm
from parts.base import Broken

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "networks.md"
LIMIT_S = 7200.0
WORDS = {
    "works": "quantize, two steps of training, eval, verify and export to safetensors end well, and rollouts have the "
    "log-probabilities that transformers gives to each sequence alone",
    "refused": "one message and exit code 2 before any work",
    "not built": "no network of this type could be made so small; the reason is what its configuration alone gets",
}
SHORTER = (
    (r" \(not built at this size: .*", ""),
    (r"the configuration of model type '[^']*'", "its configuration"),
    (r"^model type '[^']*' ", ""),
    (r"^the model's configuration", "its configuration"),
    (r"its text part '[^']*'", "its text part"),
    (r" \([\w.]+\.[\w.]+\)", ""),
    (r"by \S+ nats on average, (\S+) is what rounding explains", r"by more than the \1 nats that rounding explains"),
    (r"(tensor [ab]) \(\d+\)", r"\1"),
    (r"\. .*", ""),
)
"""What differs between the same reasons of two networks, and what is left of it."""


def visited(kind: str, work: Path) -> dict[str, Any]:
    """Try one network in a process of its own."""
    from parts import zoo

    where = work / kind
    where.mkdir()
    try:
        return vars(zoo.visit(kind, where))
    except Broken as error:
        return {"kind": kind, "word": "BROKEN", "reason": str(error), "composite": False}
    finally:
        shutil.rmtree(where, ignore_errors=True)


def page(found: Sequence[dict[str, Any]]) -> str:
    """Describe what became of every network."""
    counts = Counter(one["word"] for one in found)
    meaning = "\n".join(f"- **{counts[word]} {word}**: {text}." for word, text in WORDS.items())
    worked = table(
        ("model type", "GGUF", "largest difference, nats"),
        ((marked(one), one["gguf"], f"{float(one['gap']):.0e}") for one in found if one["word"] == "works"),
    )
    others = table(
        ("types", "reason", "model types"),
        ((str(len(names)), reason, ", ".join(names)) for reason, names in grouped(found).items()),
    )
    return (
        "\n\n".join(
            (
                "<!-- Made by benchmarks/zoo.py: run it again rather than change this. -->",
                "# Networks",
                f"All {len(found)} model types that transformers {version('transformers')} opens as causal language "
                "models. Each was built tiny, with random weights in float32, and taken through every stage:",
                meaning,
                "What is tried is the network's code, not a published model: each model is checked on its own weights "
                "when it is loaded.",
                "## Works",
                'GGUF: "no" means that `kdctl export --to gguf` is not possible. Largest difference: of a rollout\'s '
                "log-probabilities from those of transformers. Text part: the model also has parts for pictures or "
                "sound, which are left out.",
                worked,
                "## Refused",
                others,
            )
        )
        + "\n"
    )


def marked(one: dict[str, Any]) -> str:
    """Name a network, and what was special about it."""
    return f"`{one['kind']}`" + (" (text part)" if one["composite"] else " (not built)" * (one["word"] == "not built"))


def grouped(found: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """List by reason the networks that do not work, the most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for one in found:
        if one["word"] != "works":
            groups.setdefault(shortened(one["reason"]), []).append(marked(one))
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def shortened(reason: str) -> str:
    """Leave out of a reason what belongs to one network alone."""
    for what, left in SHORTER:
        reason = re.sub(what, left, reason)
    return reason


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoo-") as temporary:
        warm.warm_up(Path(temporary))
        from parts.networks import kinds

        names = options.kinds or sorted(kinds())
        parts = [names[place :: options.workers] for place in range(options.workers)]
        found = {one["kind"]: one for part in parallel(parts, Path(temporary)) for one in part}
    results = [found[name] for name in names]
    for one in results:
        if options.kinds or one["word"] == "BROKEN":
            print(one)
    print(dict(Counter(one["word"] for one in results)))
    broken = any(one["word"] == "BROKEN" for one in results)
    if not (options.kinds or broken):
        PAGE.write_text(page(results), encoding="utf-8")
    return int(broken)


def parallel(parts: Sequence[Sequence[str]], work: Path) -> Iterator[list[dict[str, Any]]]:
    """Try lists of networks side by side."""
    running = []
    for place, names in enumerate(parts):
        answer = work / f"{place}.json"

        def told(names: Sequence[str] = names, answer: Path = answer) -> None:
            answer.write_text(json.dumps([visited(name, work) for name in names]), encoding="utf-8")

        running.append((warm.start(told, work), answer))
    for one, answer in running:
        ended = one.wait(LIMIT_S)
        if ended.code:
            raise Broken(ended.err)
        yield json.loads(answer.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
