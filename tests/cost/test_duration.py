"""How long a run takes: what divides it, what repeats it, and which part of a machine decides."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl.config.resolve import load_preset
from kdctl.cost.duration import Duration, make_timing
from kdctl.cost.estimate import Cost
from kdctl.cost.network import Network, look_at
from kdctl.cost.rates import ACCELERATORS, find_rates
from kdctl.cost.records import Pace, Rates, Stretch, Timing
from kdctl.cost.work import Passes
from kdctl.distill.divergence import Objective
from kdctl.model.configuration import read_config


@pytest.fixture(scope="module")
def network(tiny_dir: Path) -> Network:
    """Look at the tiny network."""
    return look_at(read_config(tiny_dir), load_preset("smoke").quantize, torch.bfloat16, Objective())


def h100(processes: int = 1) -> Rates:
    """Return a vendor's rates, with operators that take no time, so that what is computed decides."""
    found = find_rates(None, "h100", None, None, None, processes)
    assert found is not None
    return found.model_copy(update={"operator_s": 1e-30})


def timing(network: Network, shards: int = 1, copies: int = 1, **settings: Any) -> Timing:
    """Plan the seconds of the smoke preset with a batch that divides well."""
    own = {"distill.micro_batch_size": 4, "distill.gradient_accumulation": 16, "quantize.method": "minmax"}
    preset = load_preset("smoke", own | {key.replace("__", "."): value for key, value in settings.items()})
    found = make_timing(Cost(preset, network, False, shards, copies), h100(shards * copies), None)
    assert found is not None
    return found


def named(found: Timing, name: str) -> Stretch:
    """Return one kind of work."""
    return next(each for each in found.stretches if each.name == name)


def test_twice_the_steps_take_twice_as_long(network: Network) -> None:
    one, two = (timing(network, distill__steps=steps, distill__lmbda=1.0) for steps in (10, 20))
    for name in ("training", "generating, live"):
        assert named(two, name).seconds_s == pytest.approx(2 * named(one, name).seconds_s)
    assert two.step_s == pytest.approx(one.step_s)
    assert named(two, "quantizing") == named(one, "quantizing")


@pytest.mark.parametrize("way", ["copies", "shards"])
def test_more_processes_never_compute_longer(network: Network, way: str) -> None:
    found = [timing(network, **{way: count}, rollout__num_prompts=256) for count in (1, 2, 4, 8, 16, 64)]
    for name in ("training", "generating"):
        products = [named(each, name).parts_s.get("products", 0.0) for each in found]
        memory = [named(each, name).parts_s.get("memory", 0.0) for each in found]
        both = [one + other for one, other in zip(products, memory, strict=True)]
        assert both == sorted(both, reverse=True), name
    assert [named(each, "quantizing") for each in found] == [named(found[0], "quantizing")] * len(found)


def test_copies_send_gradients_and_one_process_sends_nothing(network: Network) -> None:
    def sent(**ways: int) -> float:
        preset = load_preset("smoke", {"distill.micro_batch_size": 4, "distill.gradient_accumulation": 16})
        works = Duration(Cost(preset, network, False, **ways)).works()["training"]
        return sum(work.sent * work.times for work in works) / preset.distill.steps

    weights = network.quantized_parameters
    assert sent() == 0
    assert sent(copies=4) == 2 * 3 / 4 * 4 * weights
    assert sent(shards=8) == 2 * 7 / 8 * (2 + 2 * 2 + 4) * weights  # 8 rows each are two passes
    assert sent(shards=8, copies=2) == 7 / 8 * (2 + 2 * 2 + 4) * weights  # 4 rows each are one


def test_groups_on_machines_send_less_between_them_than_shards_over_all(network: Network) -> None:
    settings = {"distill.micro_batch_size": 1, "distill.gradient_accumulation": 64}
    steps = []
    for shards, copies in ((64, 1), (8, 8)):
        rates = find_rates(None, "h100", None, None, None, shards, copies)
        assert rates is not None
        works = Duration(Cost(load_preset("smoke", settings), network, False, shards, copies)).works()["training"]
        steps.append(sum(work.parts(rates)["network"] for work in works))
    whole, rows = (2 + 2 * 2 + 4) * 63 / 64 / 50e9, (2 + 2 * 2 + 4) * 7 / 8 / 450e9 + 2 * 7 / 8 * 4 / 8 / 50e9
    assert steps[1] / steps[0] == pytest.approx(rows / whole, rel=0.2)


def test_text_to_calibrate_on_takes_longer_only_where_it_is_read(network: Network) -> None:
    def seconds(method: str, sequences: int) -> float:
        own = {"quantize.method": method, "quantize.calibration_sequences": sequences, "quantize.group_size": 32}
        cost = Cost(load_preset("smoke", own), network, False)
        found = make_timing(cost, h100(), None)
        assert found is not None
        return named(found, "quantizing").seconds_s

    assert seconds("minmax", 8) == seconds("minmax", 4096)
    assert seconds("minmax", 8) < seconds("gptq", 8) < seconds("gptq", 4096) < seconds("kl", 4096)


def test_kept_states_take_a_pass_once_and_none_in_training(network: Network) -> None:
    without, kept = timing(network), timing(network, rollout__keep_states="int8")
    assert named(kept, "training").seconds_s < named(without, "training").seconds_s
    assert "keeping teacher states" in {each.name for each in kept.stretches}
    assert "keeping teacher states" not in {each.name for each in without.stretches}


def test_more_rows_at_once_read_the_weights_less_often(network: Network) -> None:
    few, many = (timing(network, rollout__batch_size=rows, rollout__num_prompts=256) for rows in (1, 32))
    assert named(few, "generating").seconds_s > 1.4 * named(many, "generating").seconds_s
    assert named(few, "generating").limit == "memory"


def test_a_server_starts_no_operators_one_by_one(network: Network) -> None:
    settings = {"distill.lmbda": 1.0, "distill.refresh_every": 1}
    served = settings | {"rollout.engine": "server", "rollout.url": ("http://127.0.0.1:8000",)}
    started = []
    for own in (settings, served):
        works = Duration(Cost(load_preset("smoke", own), network, False)).works()["generating, live"]
        started.append(sum(work.started for work in works))
    assert started[0] > started[1] == 0


def test_a_gpu_starts_few_steps_of_a_completion_one_by_one(network: Network) -> None:
    def started(tokens: int, cpu: bool) -> float:
        preset = load_preset("smoke", {"rollout.max_new_tokens": tokens, "distill.lmbda": 1.0})
        works = Duration(Cost(preset, network, cpu)).works()["generating, live"]
        return sum(work.times for work in works if work.started) / sum(work.times for work in works)

    assert started(128, cpu=True) == 1.0
    assert 0.2 < started(128, cpu=False) < 0.25, "of 128: 16, two for the recording, 8 looks, and reading the prompt"
    assert started(16, cpu=False) == 1.0


def test_a_long_prompt_costs_more_than_in_proportion(network: Network) -> None:
    passes = Passes(network)
    assert passes.forward(4096, 4096).products > passes.forward(4096, 512).products


def test_measured_steps_stand_where_no_rates_are_named(network: Network) -> None:
    preset = load_preset("smoke")
    pace = Pace(variant="some", steps=3, step_seconds_median_s=2.0, step_seconds_mean_s=4.0)
    found = make_timing(Cost(preset, network, True), None, pace)
    assert found is not None
    assert (found.total_s, found.step_s, found.rates) == (4.0 * preset.distill.steps, 4.0, None)
    assert found.stretches[0].limit == "measured"
    assert make_timing(Cost(preset, network, True), None, None) is None


def test_every_accelerator_has_rates_and_links_are_slower_between_machines() -> None:
    for name in ACCELERATORS:
        one, many = (find_rates(None, name, None, None, None, count) for count in (8, 64))
        assert one is not None
        assert many is not None
        assert not one.measured
        assert one.memory_bytes_per_s == many.memory_bytes_per_s
    wide = [find_rates(None, "h100", None, None, None, count) for count in (8, 64)]
    assert [each.network_bytes_per_s for each in wide if each] == [450e9, 50e9]
