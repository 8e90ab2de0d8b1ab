"""No file that kdctl reads makes it unpickle, run code, leave a folder, unpack an archive or tell a secret.

Each rule builds hostile input around a tiny model or a run folder and runs kdctl on it under an audit hook. A payload
that runs leaves a mark; what must not be read or written lies in a folder beside.
"""

import json
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from parts import tiny
from parts.base import draw, expect, once, shared
from parts.warm import Ended, run_kdctl

SHORT, FULL = 8, 240
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
SECRET = "5ecre7" * 7
MARK, OUTSIDE, AUDIT = "ran", "outside", "audit"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {
    "os.rename": 2,
    "os.remove": 1,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.link": 2,
    "os.symlink": 2,
}


def watch(where: Path) -> Callable[[], None]:
    """Return a hook that notes what a run may not do: unpickle, compile a file of the input, change files elsewhere."""
    allowed = tuple(os.path.realpath(place) + "/" for place in (where, os.environ["HF_HOME"]))
    forbidden = str(where / OUTSIDE)

    def hook() -> None:
        note = os.open(where / AUDIT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def tell(*words: Any) -> None:
            os.write(note, (" ".join(map(str, words)) + "\n").encode())

        def changed(event: str, path: Any) -> None:
            if isinstance(path, str | bytes) and not os.path.abspath(os.fsdecode(path)).startswith((*allowed, "/dev/")):
                tell(event, os.fsdecode(path))

        def audit(event: str, args: tuple[Any, ...]) -> None:
            if event == "pickle.find_class":
                tell(event, *args)
            elif event == "compile" and str(args[1]).startswith(str(where)):
                tell(event, args[1])
            elif event == "open":
                if isinstance(args[0], str) and os.path.abspath(args[0]).startswith(forbidden):
                    tell("read", args[0])
                if (isinstance(args[1], str) and set(args[1]) & set("wax+")) or (args[2] or 0) & WRITES:
                    changed(event, args[0])
            elif event in CHANGES:
                for path in args[: CHANGES[event]]:
                    changed(event, path)

        import torch

        vars(torch)["load"] = lambda *args, **options: tell("torch.load", args)
        tempfile.tempdir = str(where)
        sys.addaudithook(audit)

    return hook


def run(where: Path, words: Sequence[str], codes: Sequence[int] = (0, 2), **env: str | None) -> Ended:
    """Run kdctl on hostile input: it ends with one of these codes, without a traceback and without what is noted."""
    ended = run_kdctl(words, where, env={"TMPDIR": str(where), **env}, hook=watch(where))
    told = f"kdctl {' '.join(words)}: exit code {ended.code}: {ended.err[-2000:]}"
    expect(ended.code in codes and "Traceback" not in ended.err, told)
    noted = (where / AUDIT).read_text(encoding="utf-8", errors="replace") if (where / AUDIT).exists() else ""
    expect(not noted, f"{told}\nnoted: {noted[:1500]}")
    expect(not (where / MARK).exists(), f"{told}\na payload ran")
    expect(not secret_in(where, ended), f"{told}\nthe secret is in {', '.join(secret_in(where, ended))}")
    return ended


def secret_in(where: Path, ended: Ended) -> list[str]:
    """List where the secret stands."""
    found = [path for path in where.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    printed = {"stdout": ended.out, "stderr": ended.err}
    return [str(path) for path in found] + [name for name, text in printed.items() if SECRET in text]


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, where: Path):
        self.where = where

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.where / MARK}",)


def pickled(where: Path) -> bytes:
    """Return a payload."""
    return pickle.dumps(Payload(where))


def code(where: Path) -> str:
    """Return Python that leaves a mark and defines whatever is imported from it."""
    return f"open({str(where / MARK)!r}, 'w')\ndef __getattr__(name):\n    return object\ndef generate(*a, **k): ...\n"


def model(where: Path) -> Path:
    """Copy the tiny model."""
    made = once(shared(where) / "model", tiny.make_model)
    return Path(shutil.copytree(made, where / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file, whose hash of itself is left out, as by older versions."""
    tree = json.loads(path.read_text(encoding="utf-8")) | changes
    tree.pop("sum", None)
    path.write_text(json.dumps(tree), encoding="utf-8")


def quantize(where: Path, codes: Sequence[int] = (0, 2), **changes: Any) -> Ended:
    """Quantize the model in ``where``."""
    tiny.write_preset(where / "preset.json", "model", **changes)
    return run(where, ["quantize", "--preset", "preset.json", "--run", "run"], codes)


def made_run(where: Path) -> Path:
    """Copy a finished run folder, with its model and preset."""

    def make(folder: Path) -> None:
        tiny.make_model(folder / "model")
        tiny.write_preset(folder / "preset.json", "model")
        ended = run_kdctl(["run", "preset.json", "--run", "run"], folder)
        expect(ended.code == 0, ended.err[-3000:])

    shutil.copytree(once(shared(where) / "made", make), where, dirs_exist_ok=True)
    return where / "run"


def weights_pickled_instead(where: Path, pick: Random) -> None:
    """Pickled weights are not opened where there are no others."""
    folder = model(where)
    (folder / "model.safetensors").unlink()
    name = pick.choice(["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model.safetensors.bin"])
    (folder / name).write_bytes(pickled(where))
    if pick.random() < 0.5:
        index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": name}}
        (folder / pick.choice(["pytorch_model.bin.index.json", "model.safetensors.index.json"])).write_text(
            json.dumps(index)
        )
    quantize(where, [2])


def weights_pickled_beside(where: Path, pick: Random) -> None:
    """Pickles beside the weights are left alone."""
    folder = model(where)
    names = [
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "adapter_model.bin",
        "vocab.pkl",
    ]
    for name in pick.sample(names, 4):
        (folder / name).write_bytes(pickled(where))
    if pick.random() < 0.5:
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(where / OUTSIDE)}))
    if pick.random() < 0.3:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
    quantize(where)


def tokenizer_pickled(where: Path, pick: Random) -> None:
    """No tokenizer is unpickled."""
    folder = model(where)
    for name in ("vocab.pkl", "tokenizer.pickle", "vocab.bin", "vocab.txt", "tokenizer.model"):
        (folder / name).write_bytes(pickled(where))
    names = ["TransfoXLTokenizer", "BertJapaneseTokenizer", "LlamaTokenizer", "ReformerTokenizer", "RagTokenizer"]
    edit(folder / "tokenizer_config.json", tokenizer_class=pick.choice(names))
    if pick.random() < 0.5:
        (folder / "tokenizer.json").unlink()
    quantize(where)


def prompts_pickled(where: Path, pick: Random) -> None:
    """No prompts are unpickled, whatever the file is called."""
    model(where)
    name = pick.choice(["p.pkl", "p.jsonl", "p.json", "p.parquet", "p.pickle", "p.arrow", "p.csv"])
    (where / name).write_bytes(pickled(where))
    quantize(where, [2], prompts__train=name, prompts__heldout=name)


def prompts_of_pickled_type(where: Path, pick: Random) -> None:
    """A Parquet file whose schema holds a pickled type is read without it, or refused."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model(where)
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled(where)}
    field = pa.field("prompt", pa.string(), metadata=metadata)
    table = pa.table([pa.array(["one", "two"] * 8)], schema=pa.schema([field]))
    pq.write_table(table, where / "p.parquet")
    quantize(where, prompts__train="p.parquet", prompts__heldout="p.parquet")


def code_of_a_model(where: Path, pick: Random) -> None:
    """No class that a configuration names in a file of its own is imported."""
    folder = model(where)
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "own.py"):
        (folder / name).write_text(code(where))
    names = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    if pick.random() < 0.7:
        edit(folder / "config.json", auto_map=names)
    if pick.random() < 0.5:
        edit(folder / "config.json", model_type=pick.choice(["own", "llama", ""]), architectures=["Own"])
    if pick.random() < 0.7:
        auto = pick.choice([{"AutoTokenizer": ["tokenization_own.Own", None]}, ["tokenization_own.Own", "own.Own"]])
        edit(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class=pick.choice(["Own", "LlamaTokenizer"]))
    quantize(where)


def code_for_generation(where: Path, pick: Random) -> None:
    """No function for generating, attention or quantizing that a model brings is run."""
    folder = model(where)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(where))
    edit(folder / "generation_config.json", custom_generate="model", trust_remote_code=True)
    named = pick.choice(["own/kernel", "kernels-community/own", "paged|own/kernel", "flash_attention_2", "eval"])
    key = pick.choice(["attn_implementation", "_attn_implementation", "experts_implementation", "kernel_config"])
    edit(folder / "config.json", **{key: named, "trust_remote_code": True})
    quantize(where)


TRICKS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{ joiner.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}{{ messages.clear() }}",
    "{% include 'outside/x.jinja' %}",
    "{% include '../outside/x.jinja' ignore missing %}",
    "{% import 'outside/x.jinja' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'outside/x.jinja' import y %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (messages|map(attribute='__class__')|list) }}",
    "{{ request.application.__globals__ }}",
    "{% for x in range(10 ** 12) %}a{% endfor %}",
)


def templates(where: Path, pick: Random) -> None:
    """Templates reach neither Python nor files."""
    folder = model(where)
    trick = pick.choice(TRICKS).replace("MARK", str(where / MARK))
    text = tiny.TEMPLATE + trick if pick.random() < 0.5 else trick + tiny.TEMPLATE
    place = pick.randrange(3)
    if place == 0:
        (folder / "chat_template.jinja").write_text(text)
    else:
        (folder / "chat_template.jinja").unlink()
        named = [{"name": "default", "template": text}, {"name": "tool_use", "template": trick}]
        edit(folder / "tokenizer_config.json", chat_template=text if place == 1 else named)
    quantize(where)


def names_of_templates(where: Path, pick: Random) -> None:
    """A template's name leads nowhere."""
    folder = model(where)
    (folder / "chat_template.jinja").unlink()
    name = pick.choice(["../../mark", "../../outside/x", str(where / OUTSIDE / "x"), "..", "a/b", "", "a\\..\\b"])
    named = [{"name": "default", "template": tiny.TEMPLATE}, {"name": name, "template": tiny.TEMPLATE}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    quantize(where)
    expect(not any((where / OUTSIDE).iterdir()), "a template was written outside")


def names_of_weights(where: Path, pick: Random) -> None:
    """An index or a configuration names no weights outside the folder."""
    folder = model(where)
    outside = where / OUTSIDE / "model.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    name = pick.choice(["../outside/model.safetensors", str(outside), "./../outside/model.safetensors"])
    if pick.random() < 0.3:
        edit(folder / "config.json", transformers_weights=name)
    else:
        from safetensors import safe_open

        with safe_open(outside, "pt") as file:
            keys = list(file.keys())
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"metadata": {"total_size": outside.stat().st_size}, "weight_map": dict.fromkeys(keys, name)}
        if pick.random() < 0.5:
            index["weight_map"][keys[0]] = "model-00001-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantize(where, [2])


def names_of_tokenizer_files(where: Path, pick: Random) -> None:
    """A tokenizer is made of its own folder's files."""
    folder = model(where)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (where / OUTSIDE / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|elsewhere|>"))
    key = pick.choice(["tokenizer_file", "vocab_file", "merges_file", "added_tokens_file", "special_tokens_map_file"])
    edit(folder / "tokenizer_config.json", **{key: str(where / OUTSIDE / "tokenizer.json")})
    if quantize(where).code == 0:
        written = (where / "run" / "student" / "tokenizer.json").read_text(encoding="utf-8")
        expect("elsewhere" not in written, "the tokenizer came from outside its folder")


def names_in_records(where: Path, pick: Random) -> None:
    """Names in a run folder's own files stay inside it."""
    folder = made_run(where)
    bad = pick.choice(["../../outside/x", str(where / OUTSIDE / "x"), "..", "", "a\0b", "../heldout/shard-00000.arrow"])
    (variant,) = (folder / "distill").iterdir()
    store = pick.choice([folder / "rollouts" / "heldout", folder / "rollouts" / "teacher"])
    shutil.copy(store / "shard-00000.arrow", where / OUTSIDE / "x")
    kind = pick.choice(["shard", "sums", "task", "variant", "replay", "stores", "model"])
    if kind == "shard":
        shards = json.loads((store / "manifest.json").read_text())["shards"]
        edit(store / "manifest.json", shards=[shards[0] | {"file": bad}, *shards[1:]])
        shutil.rmtree(folder / "eval")
        shutil.rmtree(variant)
        run(where, ["distill", "--run", "run"], [2])
    elif kind == "sums":
        with open(folder / "student" / "SHA256SUMS", "a", encoding="utf-8") as file:
            print("0" * 64, "", bad, file=file)
        run(where, ["quantize", "--run", "run"], [2])
        run(where, ["verify", "run/student"], [1, 2])
    elif kind == "task":
        results = folder / "eval" / "ptq" / "results.json"
        tasks = json.loads(results.read_text())["tasks"]
        for path in (folder / "eval").glob("*/results.json"):
            edit(path, tasks={bad: next(iter(tasks.values()))})
        run(where, ["report", "run"])
    elif kind == "model":
        edit(folder / "eval" / "ptq" / "results.json", model=bad)
        run(where, ["report", "run"])
    else:
        report = json.loads((variant / "distill.json").read_text())
        report |= {"variant": bad} if kind == "variant" else {}
        report["settings"] |= {"replay": bad, "refresh_every": 0} if kind == "replay" else {}
        report["stores"] = {bad: "0" * 64} if kind == "stores" else report["stores"]
        edit(variant / "distill.json", **report)
        run(where, ["report", "run"])
        run(where, ["eval", "--run", "run"])


def names_on_the_command_line(where: Path, pick: Random) -> None:
    """Variants, rows and tasks have names, not paths."""
    made_run(where)
    bad = pick.choice(
        ["../../outside/x", str(where / OUTSIDE / "x"), "..", "a/../../x", "<script>", "a\tb", "teacher/.."]
    )
    (where / "task.yaml").write_text("task: own\noutput_type: multiple_choice\ndoc_to_text: !function own.run\n")
    (where / "own.py").write_text(code(where))
    words = pick.choice([
        ["distill", "--name", bad], ["eval", "--also", "model", "--as", bad], ["eval", bad],
        ["rollout", "--source", bad], ["quantize", "--compare", bad],
        ["distill", "--set", f"distill.replay={bad}", "--lambda", "1"],
        ["eval", "--task", bad], ["eval", "--task", "task.yaml"], ["eval", "--task", str(where / "task.yaml")],
        ["distill", "--set", f"distill.replay={bad}", "--set", "distill.lmbda=1", "--set", "distill.refresh_every=0"],
    ])  # fmt: skip
    run(where, [*words, "--run", "run"], [2])
    expect(not any((where / OUTSIDE).iterdir()), "something was written outside")


def sweep_files(where: Path, pick: Random) -> None:
    """Sweep files are plain YAML, and trials have plain names."""
    made_run(where)
    tags = ["!!python/object/apply:os.system ['touch MARK']", "!!python/name:os.system", "!!python/module:own"]
    metric = (
        "metric: {name: eval/forward_kl, goal: minimize}\nmethod: grid\nparameters:\n  preset: {value: preset.json}\n"
    )
    (where / "own.py").write_text(code(where))
    if pick.random() < 0.5:
        text = metric + f"  distill.lr: {pick.choice(tags).replace('MARK', str(where / MARK))}\n"
    else:
        text = metric + "  distill.replay: {values: ['../../outside/x', '/outside']}\n  distill.lmbda: {value: 1.0}\n"
    (where / "s.yaml").write_text(text)
    run(where, ["sweep", "s.yaml", "--run", "run"], [2])
    expect(not any((where / OUTSIDE).iterdir()), "something was written outside")


def archives(where: Path, pick: Random) -> None:
    """Archives are not unpacked, whatever they are called."""
    folder, member = model(where), "member-of-the-archive.jsonl"
    (where / "in.jsonl").write_text('{"prompt": "hello"}\n' * 40)
    name = pick.choice(["p.zip", "p.jsonl", "p.jsonl.zip", "p.tar.gz", "p.json", "p.parquet", "p.tar", "p.csv"])
    if pick.random() < 0.6:
        with zipfile.ZipFile(where / name, "w") as archive:
            archive.write(where / "in.jsonl", pick.choice([member, "../" + member]))
    else:
        with tarfile.open(where / name, "w:gz") as archive:
            archive.add(where / "in.jsonl", member)
    (where / "in.jsonl").unlink()
    if pick.random() < 0.3:
        shutil.rmtree(folder)
        (where / name).rename(where / pick.choice(["model", "model.zip", "model.gguf"]))
        tiny.write_preset(where / "preset.json", pick.choice(["model", "model.zip", "model.gguf"]))
        run(where, ["quantize", "--preset", "preset.json", "--run", "run"], [2])
    else:
        quantize(where, [2], prompts__train=name, prompts__heldout=name)
    found = [path for root in (where, Path(os.environ["HF_HOME"])) for path in root.rglob(f"*{member}*")]
    expect(not found, f"the archive was unpacked: {found}")


def data_set_with_code(where: Path, pick: Random) -> None:
    """A folder's loading script is not run."""
    model(where)
    folder = where / "data"
    folder.mkdir()
    (folder / "data.py").write_text(code(where))
    (folder / "train.jsonl").write_text('{"prompt": "hello"}\n' * 40)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../outside/*\n---\n")
    (where / OUTSIDE / "x.jsonl").write_text('{"prompt": "elsewhere"}\n' * 40)
    if pick.random() < 0.5:
        (folder / "README.md").unlink()
    quantize(where, prompts__train=pick.choice(["data", "./data", "data/data.py"]), prompts__split="train")


def modules_beside(where: Path, pick: Random) -> None:
    """Modules in the working folder are not imported, by child processes neither."""
    model(where)
    for name in ("auto_round", "torch", "kdctl", "random", "sitecustomize", "usercustomize", "transformers"):
        (where / f"{name}.py").write_text(code(where))
    method = pick.choice(["autoround", "hqq", "gptq"])
    quantize(where, [0], quantize__method=method)


def card_of_the_teacher(where: Path, pick: Random) -> None:
    """A model card is data, in the student's card and in the report."""
    folder = model(where)
    license_ = pick.choice(
        ["!!python/object/apply:os.system ['touch MARK']", "'<script>alert(1)</script>'", "|\n  ---\n  x"]
    )
    text = f"---\nlicense: {license_.replace('MARK', str(where / MARK))}\n---\n"
    (folder / "README.md").write_text(text)
    quantize(where)


def secrets_of_a_run(where: Path, pick: Random) -> None:
    """What the environment holds is in no file and no message, wandb's own folder included."""
    model(where)
    tiny.write_preset(where / "preset.json", "model", tracking__wandb=pick.choice(["off", "offline", "offline"]))
    words = [["run", "preset.json"], ["distill", "--preset", "preset.json"], ["run", "preset.json", "--verbose"]]
    run(where, [*pick.choice(words), "--run", "run"], [0], **dict.fromkeys(SECRETS, SECRET))


def secrets_of_a_failure(where: Path, pick: Random) -> None:
    """What the environment holds is in no message of a run that fails."""
    model(where)
    tiny.write_preset(where / "preset.json", pick.choice(["model", "nowhere/at-all", "missing"]))
    words = pick.choice([
        ["run", "preset.json", "--run", "preset.json"], ["run", "nowhere.toml"], ["report", "nowhere"],
        ["sweep", "lr_onpolicy", "--backend", "kubernetes", "--pod", "image=x"], ["run", "preset.json", "--set", "x=1"],
        ["quantize", "--preset", "preset.json", "--set", "teacher.model=nobody/nothing"],
    ])  # fmt: skip
    run(where, words, **dict.fromkeys(SECRETS, SECRET))


RULES: Mapping[str, Callable[[Path, Random], None]] = {
    rule.__name__.replace("_", " "): rule
    for rule in (
        weights_pickled_instead, names_of_weights, code_of_a_model, templates, names_in_records, archives,
        names_on_the_command_line, secrets_of_a_failure, weights_pickled_beside, tokenizer_pickled, prompts_pickled,
        prompts_of_pickled_type, code_for_generation, names_of_templates, names_of_tokenizer_files, sweep_files,
        data_set_with_code, modules_beside, card_of_the_teacher, secrets_of_a_run,
    )
}  # fmt: skip


def case(seed: int, index: int, where: Path) -> str:
    """Try one rule."""
    name = list(RULES)[index % len(RULES)]
    (where / OUTSIDE).mkdir()
    RULES[name](where, draw("safety", seed, index))
    return name
