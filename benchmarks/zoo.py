"""Take every causal language model of transformers through kdctl and write docs/reference/networks.md.

    python benchmarks/zoo.py [MODEL_TYPE...] [--workers 2]

With model types only those are tried and nothing is written. Ends with exit code 1 where a promise is broken.
"""

import argparse
import json
import os
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
    "works": "quantize, two steps of training, eval, verify and export; its rollouts' log-probabilities are "
    "transformers' own for each sequence alone",
    "refused": "one message and exit code 2 before any work, with the reason below",
    "not built": "the reason is that of its configuration alone: the network cannot be made so small",
}


def visited(kind: str, work: Path) -> dict[str, Any]:
    """Try one network in a process of its own."""
    from parts import zoo

    where = work / kind
    where.mkdir()
    try:
        return vars(zoo.visit(kind, where))
    except Broken as error:
        return {"kind": kind, "word": "BROKEN", "reason": str(error)}
    finally:
        shutil.rmtree(where, ignore_errors=True)


def page(found: Sequence[dict[str, Any]]) -> str:
    """Describe what became of every network."""
    counts = Counter(one["word"] for one in found)
    meaning = "\n".join(f"- **{counts[word]} {word}**: {text}." for word, text in WORDS.items())
    worked = table(
        ("model type", "GGUF", "largest difference, nats"),
        ((f"`{one['kind']}`", one["gguf"], f"{float(one['gap']):.0e}") for one in found if one["word"] == "works"),
    )
    others = table(
        ("model type", "", "reason"),
        ((f"`{one['kind']}`", one["word"], one["reason"]) for one in found if one["word"] != "works"),
    )
    return (
        "\n\n".join(
            (
                "<!-- Made by benchmarks/zoo.py: run it again rather than change this. -->",
                "# Networks",
                f"All {len(found)} model types that transformers {version('transformers')} opens as causal language "
                "models, each built tiny with random weights in float32 and taken through every stage:",
                meaning,
                "Of a composite model, with parts for pictures or sound, the text part is tried.",
                "What is checked is the network's code, not a published model. Every network is checked again on its "
                "own weights when it is loaded: two short sequences, packed and continued from a cache, have to give "
                "the log-probabilities of each alone.",
                "## Works",
                worked,
                "## Refused",
                others,
            )
        )
        + "\n"
    )


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
