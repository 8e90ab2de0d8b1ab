"""Why a path holds no model that kdctl opens, in words, and what to do: adapters, pickled weights, pointers, links."""

from pathlib import Path

from kdctl.base.errors import ModelError

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024
"""Bytes. Git LFS leaves a text of some 130 bytes where a large file is not fetched."""
ADAPTER = "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ELSEWHERE = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".npz": "MLX", ".tflite": "TensorFlow Lite"}


def check_fetched(path: Path) -> None:
    """Raise ModelError for a file, or a file of a folder, that Git LFS has not fetched."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.is_file() and file.stat().st_size <= LARGEST_POINTER:
            with open(file, "rb") as opened:
                found = opened.read(len(POINTER)) == POINTER
            if found:
                raise ModelError(
                    f"{file} is a pointer of Git LFS, not the file itself; run: git lfs pull (in {file.parent}), or "
                    "fetch the model with hf download"
                )


def check_no_adapter(folder: Path) -> None:
    """Raise ModelError for a folder with an adapter, which is a difference to another model."""
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER}), the difference to a base model, not a model; merge it with "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED), save "
            "the tokenizer there too, and name that folder"
        )


def why_no_model(path: Path) -> str:
    """Return why something that is there is no model."""
    if not path.is_dir():
        return f"{path} is neither a .gguf file nor a folder with a config.json"
    if (path / "config.json").is_dir():
        return f"{path}: config.json is a folder, not a file"
    if (path / "config.json").is_symlink():
        return f"{path}: config.json is a link to {(path / 'config.json').readlink()}, where nothing is"
    files = sorted(path.glob("*.gguf"))
    if files:
        return f"{path} is neither a .gguf file nor a folder with a config.json; name the file, such as {files[0]}"
    held = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    return (
        f"{path} is neither a .gguf file nor a folder with a config.json (it holds {held}); a model folder has both "
        "config.json and safetensors"
    )


def why_no_weights(folder: Path) -> str:
    """Return why a folder with a configuration has no weights to open."""
    names = sorted(file.name for file in folder.iterdir())
    stored = [name for name in names if name.endswith(".safetensors")]
    if stored:
        return (
            f"{folder} has neither a model.safetensors nor a model.safetensors.index.json that names its files "
            f"({', '.join(stored[:3])}), so nobody can tell which of them are the model; fetch the index "
            "too, or open the model with transformers and save it again"
        )
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return (
            f"{folder} has no .safetensors file, only {pickled[0]}; kdctl does not open pickled weights, which can run "
            "any code. Where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    for name in names:
        if Path(name).suffix in ELSEWHERE:
            return f"{folder} has no .safetensors file, only weights for {ELSEWHERE[Path(name).suffix]} ({name})"
    return f"{folder} has no .safetensors file; it holds {', '.join(names[:5])}; fetch the weights too"
