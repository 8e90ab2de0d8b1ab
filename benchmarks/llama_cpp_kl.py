"""Compare llama.cpp's next-token distributions on a GGUF file with those of the model that the file was made from.

    python benchmarks/llama_cpp_kl.py runs/quickstart/student runs/quickstart/student-gguf/model.gguf \\
        --rollouts runs/quickstart/rollouts/heldout --llama-python LLAMA_VENV/bin/python

The other environment: ``pip install llama-cpp-python`` (builds llama.cpp). Both sides read the same token ids: prompts
of a rollout store and their completions. Printed: KL(model‖llama.cpp) per completion token, agreement of the likeliest
token, and whether llama.cpp's own tokenizer reads the same text as the same tokens. llama.cpp rounds activations to 8
bits, so the KL is not 0 even for a file that holds the very weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="student folder, or a folder of plain safetensors")
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("--rollouts", type=Path, help="rollout store whose first documents are read")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--llama-python", type=Path, help="Python of the environment with llama-cpp-python")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(gguf: Path, folder: Path) -> None:
    """Let llama.cpp read every document (in the other environment): logits to .npy files, its own tokens to JSON."""
    from llama_cpp import Llama

    documents = json.loads((folder / "documents.json").read_text())
    longest = max(len(document["ids"]) for document in documents)
    llama = Llama(str(gguf), n_ctx=longest + 8, n_batch=longest, logits_all=True, n_threads=1, verbose=False)
    tokens = []
    for index, document in enumerate(documents):
        llama.reset()
        llama.eval(document["ids"])
        np.save(folder / f"{index}.npy", np.asarray(llama.scores[: len(document["ids"])], dtype=np.float32))
        tokens.append(llama.tokenize(document["text"].encode(), add_bos=False, special=True))
    (folder / "tokens.json").write_text(json.dumps(tokens))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Normalise, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def read_documents(model: Path, rollouts: Path, count: int) -> tuple[list[dict], list[np.ndarray]]:
    """Return documents (ids, length of the prompt, text and its tokens) and the model's logits on each."""
    import torch

    from kdctl.formats.student import load_student
    from kdctl.model.load import load_model
    from kdctl.model.tokenizer import load_tokenizer
    from kdctl.rollout.store import RolloutStore

    cpu = torch.device("cpu")
    quantized = "quantization_config" in json.loads((model / "config.json").read_text())
    network = (load_student(model, cpu).model if quantized else load_model(model, torch.bfloat16, cpu)).float()
    tokenizer = load_tokenizer(model)
    documents, logits = [], []
    for rollout in RolloutStore(rollouts).read()[:count]:
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        text = tokenizer.decode(ids)  # sampled tokens need not be the ones that the tokenizer makes of their text
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        documents.append({"ids": ids, "prompt": len(rollout.prompt_ids), "text": text, "tokens": tokens})
        with torch.no_grad():
            logits.append(network(torch.tensor([ids])).logits[0].numpy())
    return documents, logits


def main() -> None:
    """Run both sides and print what differs."""
    given = arguments()
    if given.worker:
        return worker(given.gguf, given.worker)
    documents, own = read_documents(given.model, given.rollouts, given.documents)
    divergence, agree, same = [], [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "documents.json").write_text(json.dumps(documents))
        python = given.llama_python or sys.executable
        subprocess.run([python, __file__, given.model, given.gguf, "--worker", folder], check=True)
        tokens = json.loads((folder / "tokens.json").read_text())
        for index, (document, logits) in enumerate(zip(documents, own, strict=True)):
            judged = slice(document["prompt"] - 1, -1)  # logits at a position are about the next token
            p, q = log_softmax(logits[judged]), log_softmax(np.load(folder / f"{index}.npy")[judged])
            divergence.append((np.exp(p) * (p - q)).sum(-1))
            agree.append(p.argmax(-1) == q.argmax(-1))
            same += tokens[index] == document["tokens"]
    found, agreed = np.concatenate(divergence), np.concatenate(agree)
    print(f"KL(model‖llama.cpp) per completion token: {found.mean():.5f} (largest {found.max():.4f})")
    print(f"same likeliest token: {100 * agreed.mean():.1f} % of {found.size} tokens of {len(documents)} documents")
    print(f"llama.cpp's tokenizer reads the same tokens: {same} of {len(documents)} documents")


if __name__ == "__main__":
    main()
