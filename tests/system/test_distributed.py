"""Several processes: what is divided comes back in order, and training is that of one process."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError, PresetError, ProcessError, StoreError
from kdctl.base.progress import Silent
from kdctl.config.preset import DistillSection, PromptsSection, QuantizeSection
from kdctl.data.prompts import PromptReader
from kdctl.distill.checkpoint import Checkpoints
from kdctl.distill.feed import Feed, Live
from kdctl.distill.fsdp import divided_student, load_divided
from kdctl.distill.loop import Trainer, heldout_metrics
from kdctl.distill.shadow import Shadow, make_shadow
from kdctl.eval.distribution import Yardstick, make_yardstick
from kdctl.model.activation_checkpointing import Checkpointing, set_checkpointing
from kdctl.model.load import load_model
from kdctl.model.tokenizer import load_tokenizer
from kdctl.quant.affine import QuantizedWeight
from kdctl.quant.apply import build_student, dense, quantize_layers, select_layers
from kdctl.rollout.fill import Plan, fill
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.teacher_states import TeacherStates
from kdctl.run import files
from kdctl.run.records import CheckpointMeta, Rollout
from kdctl.system.distributed import ALONE, PIECE, Processes, connect, pieces

Together = Callable[..., None]
GRID = QuantizeSection(group_size=32, method="minmax")
SETTINGS = DistillSection(steps=3, lr=1e-3, warmup_ratio=0.0, max_tokens=64, micro_batch_size=2)
SAMPLING = Sampling(1.0, 1.0, 0, 6, 0, 0)


def test_alone_everything_is_its_own_result() -> None:
    tensor = torch.tensor([1.5, 2.5])
    ALONE.sum_([tensor])
    assert tensor.tolist() == [1.5, 2.5]
    assert ALONE.total(0.1) == 0.1
    assert ALONE.merge(ALONE.share([1, 2, 3])) == [1, 2, 3]
    assert ALONE.on_main(lambda: "done") == ALONE.main_first(lambda: "done") == "done"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_a_partition(count: int) -> None:
    shares = [Processes(rank, count).share(range(7)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_that_cannot_be_divided_are_refused_with_what_can() -> None:
    Processes(0, 2).check_rows(4)
    with pytest.raises(PresetError, match=r"6 rows a step .* among 4 processes.* launch 1, 2, 3, 6 processes"):
        Processes(1, 4).check_rows(6)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "asks for FSDP version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "kept in CPU memory"),
    ],
)
def test_what_shards_in_another_way_is_refused(
    found: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in found.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(PresetError, match=f"{words}.*--use_fsdp --fsdp_version 2"):
        connect("cpu")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"TP": "2"}, "asks for tp, which kdctl does not have"),
        ({"DP_REPLICATE": "3", "DP_SHARD": "2"}, "copies of models, .* are 6 processes, and 4 were started"),
        ({"DP_REPLICATE": "2"}, "dp_shard_size=1 processes, are 2 processes, and 4 were started"),
    ],
)
def test_copies_of_divided_models_that_the_processes_do_not_make_are_refused(
    sizes: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    settings |= {f"PARALLELISM_CONFIG_{name}_SIZE": size for name, size in sizes.items()}
    for variable, value in (settings | {"WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(PresetError, match=words):
        connect("cpu")


@pytest.mark.parametrize("length", [1, 3, 4, 7])
def test_each_copy_has_all_rows(length: int) -> None:
    copies = [Processes(rank, 6, sharded=True, copies=2) for rank in range(6)]
    for group in (copies[:3], copies[3:]):
        assert [row for one in group for row in range(length)[one.span(length)]] == list(range(length))
    assert copies[0].span(length) == copies[3].span(length) == Processes(0, 3, sharded=True).span(length)


def test_training_that_needs_whole_models_is_refused_on_shards() -> None:
    settings = SETTINGS.model_copy(update={"optimizer": "adafactor"})
    Processes(0, 2).check_trainable(settings)
    Processes(0, 2, sharded=True).check_trainable(SETTINGS.model_copy(update={"lmbda": 0.5}))
    with pytest.raises(PresetError, match="optimizer=adafactor needs them whole; use adamw"):
        Processes(0, 2, sharded=True).check_trainable(settings)


def test_one_process_connects_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert connect("auto") is ALONE


def test_pieces_hold_every_tensor_once_and_no_more_than_they_may() -> None:
    tensors = [torch.empty(size, device="meta") for size in (5, PIECE - 5, 1, 2 * PIECE, 7, 7)]
    parts = list(pieces(tensors))
    assert [tensor for part in parts for tensor in part] == tensors
    assert [len(part) for part in parts] == [2, 1, 1, 2]


@pytest.mark.slow
def test_two_processes_are_as_one(together: Together, tiny_dir: Path, tiny_dir_fp32: Path, tmp_path: Path) -> None:
    (tmp_path / "float32").symlink_to(tiny_dir_fp32)
    (tmp_path / "bfloat16").symlink_to(tiny_dir)
    together(
        __file__,
        "train_in_float32",
        "train_row_shards",
        "write_checkpoints",
        "train_in_bfloat16",
        "write_stores",
        "agree_and_end",
    )


def divide_rows(shards: Processes) -> None:
    """Check that rows are those that torch gives, and that the main process gets all of them back."""
    mesh = init_device_mesh("cpu", (shards.count,))
    for length in (1, 2, 5):
        tensor = torch.arange(2 * length).view(length, 2)
        rows = tensor[shards.span(len(tensor))]
        assert torch.equal(rows, distribute_tensor(tensor, mesh, [Shard(0)]).to_local())
        assert torch.equal(shards.whole(rows), tensor if shards.is_main else rows)
        assert replace(shards, sharded=False).span(len(tensor)) == slice(0, len(tensor))


def rollouts(count: int) -> list[Rollout]:
    """Make rollouts of random tokens with ragged prompts and completions."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        prompt, completion = (int(torch.randint(2, 12, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(0, 256, (prompt + completion,), generator=generator).tolist()
        made.append(Rollout(str(index), index, 0, ids[:prompt], ids[prompt:], None, "length", 0, 0, "teacher"))
    return made


def accumulated(trainer: Trainer, data: list[Rollout]) -> tuple[float, int]:
    """Add up the gradients of rollouts; return the mean loss per completion token of all processes, and the tokens."""
    work = trainer.lay_out(data)
    return trainer.processes.total(sum(trainer.accumulate(work).tolist())) / work.tokens, work.tokens


def trainer_on(folder: Path, processes: Processes, dtype: torch.dtype, **settings) -> Trainer:
    teacher = load_model(folder, dtype, torch.device("cpu"))
    weights = quantize_layers(teacher, select_layers(teacher, GRID), GRID)
    student = build_student(teacher, weights)
    section = SETTINGS.model_copy(update=settings)
    feed = Feed(section, rollouts(13), processes=processes)
    if processes.sharded:
        teacher = load_divided(folder, dtype, torch.device("cpu"), weights.keys(), processes)
        weights = {name: cut(weight, processes) for name, weight in weights.items()}
        student = divided_student(teacher, teacher.config, weights, processes)
    shadow = make_shadow(section, student, weights, teacher)
    return Trainer(teacher, student, shadow, feed, section)


def rows_of(tensor: Tensor, processes: Processes) -> Tensor:
    """Return a process's rows of a tensor, or all of it where nothing is divided."""
    return tensor[processes.span(len(tensor))]


def cut(weight: QuantizedWeight, processes: Processes) -> QuantizedWeight:
    """Return a process's rows of a weight on the grid."""
    part = processes.span(len(weight.codes))
    return weight.rows(part.start, part.stop)


def compare_training(
    folder: Path, processes: Processes, dtype: torch.dtype, how: Checkpointing = "none", **settings
) -> tuple[Trainer, Trainer]:
    """Do three steps in two processes, and the same alone with twice the rows at once; compare losses."""
    settings = {"gradient_accumulation": 2} | settings
    divided = trainer_on(folder, processes, dtype, **settings)
    settings["gradient_accumulation"] //= 2
    whole = trainer_on(folder, ALONE, dtype, micro_batch_size=4, **settings)
    for trainer in (divided, whole):
        set_checkpointing(trainer.student, how)
    for step in range(3):
        found, expected = divided.step(step), whole.step(step)
        assert found["train/forward_kl"] == pytest.approx(expected["train/forward_kl"], rel=2e-2)
        assert found["train/completion_tokens"] == expected["train/completion_tokens"]
        assert found["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=2e-2)
    return divided, whole


def differing(one: Trainer, other: Trainer) -> float:
    """Return the share of codes that differ."""
    pairs = [
        (a.codes, b.codes) for (_, a), (_, b) in zip(one.shadow.quantized(), other.shadow.quantized(), strict=True)
    ]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def train_in_float32(processes: Processes, folder: Path) -> None:
    first = trainer_on(folder / "float32", processes, torch.float32, gradient_accumulation=2)
    alone = trainer_on(folder / "float32", ALONE, torch.float32, micro_batch_size=4)
    (loss, tokens), (expected, all_tokens) = (accumulated(each, rollouts(4)) for each in (first, alone))
    assert tokens == all_tokens
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, master in first.shadow.trained.items():
        torch.testing.assert_close(master.grad, alone.shadow.trained[name].grad, rtol=1e-3, atol=1e-6)
    divided, whole = compare_training(folder / "float32", processes, torch.float32)
    assert differing(divided, whole) <= 1e-4


def train_row_shards(processes: Processes, folder: Path) -> None:
    ways: list[tuple[bool, Checkpointing, dict[str, Any]]] = [
        (True, "selective", {}),
        (True, "full", {"gradient_accumulation": 4, "learn_scales": True}),
        (False, "none", {"gradient_accumulation": 4}),
    ]
    for freed, how, changes in ways:
        shards = replace(processes, sharded=True, freed=freed)
        divided, whole = compare_training(folder / "float32", shards, torch.float32, how, **changes)
        matches_whole(divided, whole)
        compare_gradients(divided, whole)
        compare_checkpoints(folder / how, divided, whole)
        found, expected = (heldout_metrics(each.student, yardstick(each.teacher)) for each in (divided, whole))
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_adapters_and_scales_as_one(
    together: Together, tiny_dir_fp32: Path, tmp_path: Path
) -> None:
    (tmp_path / "float32").symlink_to(tiny_dir_fp32)
    together(__file__, "train_little")


def train_little(processes: Processes, folder: Path) -> None:
    shards = replace(processes, sharded=True)
    for changes in (
        {"train": "lora", "lora_rank": 2, "lora_targets": ["*_proj"], "gradient_accumulation": 4},
        {"train": "lora", "lora_rank": 4, "lora_targets": ["*.mlp.*"]},
        {"train": "scales", "train_norms": True, "gradient_accumulation": 4},
    ):
        divided, whole = compare_training(folder / "float32", shards, torch.float32, "selective", **changes)
        matches_whole(divided, whole)
        compare_gradients(divided, whole)
        compare_checkpoints(folder / "_".join(map(str, changes.values())).replace("*", ""), divided, whole)
        for name, parameter in whole.student.named_parameters():
            if "norm" in name:
                torch.testing.assert_close(divided.student.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def yardstick(teacher: PreTrainedModel) -> Yardstick:
    return make_yardstick(teacher, rollouts(5))


def matches_whole(divided: Trainer, whole: Trainer) -> None:
    """Check that shards are half of each tensor, the codes of the whole and what the model computes with."""
    expected, mine = dict(whole.shadow.quantized()), divided.processes
    different = 0
    for name, weight in divided.shadow.quantized():
        parameter = divided.student.get_parameter(f"{name}.weight")
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.to_local(), dense(weight))
        assert len(weight.codes) * 2 == len(expected[name].codes)
        different += int((weight.codes != rows_of(expected[name].codes, mine)).sum())
    assert different <= 1e-4 * sum(weight.codes.numel() for weight in expected.values())
    assert sum(p.numel() for p in divided.shadow.parameters()) * 2 == sum(p.numel() for p in whole.shadow.parameters())


def compare_gradients(divided: Trainer, whole: Trainer) -> None:
    """Check that what backward leaves on shards is the whole gradient's rows."""
    for trainer in (divided, whole):
        accumulated(trainer, rollouts(trainer.settings.rows_per_step))
    for name, tensor in divided.shadow.trained.items():
        expected = whole.shadow.trained[name].grad
        assert expected is not None
        torch.testing.assert_close(tensor.grad, rows_of(expected, divided.processes), rtol=1e-3, atol=1e-6)
    for trainer in (divided, whole):
        trainer.optimizer.zero_grad()
        trainer.shadow.write_back()


def compare_checkpoints(folder: Path, divided: Trainer, whole: Trainer) -> None:
    """Check that each process writes its rows, and that one process reads all of them."""
    shards = divided.processes
    kept = {name: tensor.detach().clone() for name, tensor in divided.shadow.trained.items()}
    with Checkpoints(folder, divided.shadow, divided.optimizer, shards) as checkpoints:
        checkpoints.save(CheckpointMeta(identity="", step=3), keep_last=1)
    sizes = [file.stat().st_size for file in (folder / "step_000003").glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)
    Checkpoints(folder, whole.shadow, whole.optimizer).load(3)
    with torch.no_grad():
        for name, tensor in divided.shadow.trained.items():
            tensor.zero_()
            assert torch.equal(rows_of(whole.shadow.trained[name], shards), kept[name])
    checkpoints.load(3)
    for name, tensor in divided.shadow.trained.items():
        assert torch.equal(tensor, kept[name])
        for key in ("exp_avg", "exp_avg_sq"):
            moments = [trainer.optimizer.state[trainer.shadow.trained[name]][key] for trainer in (divided, whole)]
            assert torch.equal(moments[0], rows_of(moments[1], shards))
            assert moments[0].count_nonzero() > 0
    matches_whole(divided, whole)


class Held(Shadow):
    """Tensors that are trained, and no student."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(nn.Module(), {})
        self.trained = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}

    def receive(self, name: str, gradient: Tensor) -> None:
        raise NotImplementedError

    def quantized_layer(self, name: str) -> QuantizedWeight:
        raise NotImplementedError

    def write(self, name: str, place: Tensor) -> None:
        raise NotImplementedError


def write_checkpoints(processes: Processes, folder: Path) -> None:
    """Write by rows, copies and one process what each of the others reads; rows do not divide evenly, one has none."""
    generator = torch.Generator().manual_seed(0)
    whole = {str(rows): torch.randn(rows, 3, generator=generator) for rows in (5, 1, 4, 3)}
    ways = {"rows": replace(processes, sharded=True), "copies": processes, "alone": ALONE}
    for how, writer in ways.items():
        root = folder / "checkpoints" / (how if how != "alone" else f"alone{processes.rank}")
        saved = held({name: rows_of(tensor, writer) for name, tensor in whole.items()})
        with Checkpoints(root, *saved, writer) as checkpoints:
            checkpoints.save(CheckpointMeta(identity="", step=1), keep_last=1)
        written = [load_file(file) for file in sorted((root / "step_000001").glob("*.safetensors"))]
        assert len(written) == writer.count
        sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in written]
        assert sum(sizes) == 3 * sum(tensor.nbytes for tensor in whole.values()), "nothing is written twice"
        assert max(sizes) <= 0.7 * sum(sizes) or writer is ALONE
        for reader in ways.values():
            shadow, optimizer = held(
                {name: torch.zeros_like(rows_of(tensor, reader)) for name, tensor in whole.items()}
            )
            Checkpoints(root, shadow, optimizer, reader).load(1)
            for name, tensor in whole.items():
                found = shadow.trained[name]
                assert torch.equal(found, rows_of(tensor, reader)), (how, name)
                for times, key in enumerate(("exp_avg", "exp_avg_sq"), 2):
                    assert torch.equal(optimizer.state[found][key], rows_of(times * tensor, reader)), (how, name, key)
    fill_one_disk(folder / "no space", processes, held(whole))
    damage_one(folder / "checkpoints" / "rows" / "step_000001", processes)
    with pytest.raises(StoreError, match=r"shard_00002\.safetensors is damaged"):
        Checkpoints(folder / "checkpoints" / "rows", *held(whole), processes).load(1)


def held(tensors: dict[str, Tensor]) -> tuple[Shadow, torch.optim.Optimizer]:
    """Hold tensors, with twice and three times them as moments."""
    shadow = Held(tensors)
    optimizer = torch.optim.AdamW(shadow.parameters())
    for tensor in shadow.parameters():
        state = {"step": torch.zeros(()), "exp_avg": 2 * tensor.detach(), "exp_avg_sq": 3 * tensor.detach()}
        optimizer.state[tensor] = state
    return shadow, optimizer


def fill_one_disk(folder: Path, processes: Processes, state: tuple[Shadow, torch.optim.Optimizer]) -> None:
    """Let the second process find no space, which both must say; nothing half-written is left."""

    def full(operation: str, path: Path) -> None:
        if operation == "sync" and not processes.is_main:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    checkpoints = Checkpoints(folder, *state, processes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "before", full)
        checkpoints.save(CheckpointMeta(identity="", step=1), keep_last=1)
        with pytest.raises(OSError, match=r"No space left on device: .*step_000001/shard_00002"):
            checkpoints.wait()
    processes.wait()
    assert list(folder.iterdir()) == []


def damage_one(folder: Path, processes: Processes) -> None:
    """Change a byte of what the second process wrote."""

    def change() -> None:
        file = folder / "shard_00002.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    processes.on_main(change)


def train_in_bfloat16(processes: Processes, folder: Path) -> None:
    lone = trainer_on(folder / "bfloat16", processes, torch.bfloat16, gradient_accumulation=2)
    accumulated(lone, rollouts(4))
    assert {p.grad.dtype for p in lone.shadow.parameters() if p.grad is not None} == {torch.bfloat16}
    divided, whole = compare_training(folder / "bfloat16", processes, torch.bfloat16)
    assert differing(divided, whole) <= 0.02
    mine = torch.cat([p.detach().flatten() for p in divided.shadow.parameters()])
    main = processes.on_main(lambda: mine)
    assert torch.equal(mine, main), "all processes must hold the same masters to the bit"


def write_stores(processes: Processes, folder: Path) -> None:
    model = load_model(folder / "float32", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder / "float32")
    prompts = PromptReader(tokenizer, PromptsSection()).train(5, 0)
    engine = InProcess(model, [258], "student")
    plan = Plan("student", "identity", "writer", prompts, prompts_per_block=2, num_generations=2)
    divided, alone = RolloutStore(folder / "divided"), RolloutStore(folder / f"alone{processes.rank}")
    assert fill(divided, plan, engine, SAMPLING, Silent(), processes) == fill(alone, plan, engine, SAMPLING, Silent())
    rows, counts = alone.read(), [len(rollout.completion_ids) for rollout in alone.read()]
    states, own = TeacherStates("teacher"), TeacherStates("teacher")
    states.fill(divided, model, Silent(), processes)
    own.fill(alone, model, Silent())
    assert torch.equal(states.of(rows, counts), own.of(rows, counts))
    settings = SETTINGS.model_copy(update={"lmbda": 0.5, "refresh_every": 2, "gradient_accumulation": 2})

    def live(store: RolloutStore, who: Processes) -> Live:
        return Live(settings, prompts.prompts, model, engine, SAMPLING, store, "identity", "writer", who)

    stores = [RolloutStore(folder / "live"), RolloutStore(folder / f"live{processes.rank}")]
    feeds = [
        Feed(settings, rollouts(9), live(store, who), who)
        for store, who in zip(stores, (processes, ALONE), strict=True)
    ]
    found, expected = [], []
    for step in range(3):
        found, expected = (feed.rows(step) for feed in feeds)
        assert [row.completion_ids for row in found] == [row.completion_ids for row in expected]
        assert [row.source for row in found] == [row.source for row in expected]
    assert stores[0].manifest().steps == stores[1].manifest().steps

    def resumed() -> list[Rollout]:
        again = live(stores[0], ALONE)
        again.resume(2)
        return Feed(settings, rollouts(9), again).rows(2)

    assert [row.completion_ids for row in processes.on_main(resumed)] == [row.completion_ids for row in expected]


def fail_in(processes: Processes, rank: int) -> None:
    if processes.rank == rank:
        raise ModelError("only here")


def agree_and_end(processes: Processes, folder: Path) -> None:
    for length in range(6):
        items = [f"item {i}" for i in range(length)]
        assert processes.merge(processes.share(items)) == items
    assert processes.on_main(lambda: processes.rank) == 0
    assert processes.alike(lambda: processes.rank) == processes.rank
    with pytest.raises(ModelError, match="only here"):
        processes.alike(lambda: fail_in(processes, 1))
    assert processes.total(0.25 + processes.rank) == 1.5
    mark = folder / "mark"
    assert processes.main_first(lambda: mark.exists() or mark.write_text("here") < 0) == (not processes.is_main)
    tensors = {
        rank: [
            torch.randn(33, 3, generator=torch.Generator().manual_seed(rank)),
            torch.randn(50, generator=torch.Generator().manual_seed(rank)).bfloat16(),
        ]
        for rank in range(2)
    }
    mine = [tensor.clone() for tensor in tensors[processes.rank]]
    processes.sum_(mine)
    for found, first, second in zip(mine, *tensors.values(), strict=True):
        assert torch.equal(found, (first.float() + second.float()).to(found.dtype))
    divide_rows(replace(processes, sharded=True))
    if processes.is_main:  # the other one ends here
        with pytest.raises(ProcessError, match="another process of this run has ended"):
            processes.wait()
