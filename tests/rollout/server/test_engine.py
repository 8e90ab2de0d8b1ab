"""Each server, and each thing that one does wrong: the right message, and nothing that was not checked."""

import json
import re
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from stub_server import Stub, serving
from tiny import build

from kdctl.base.errors import ServerError
from kdctl.base.progress import Silent
from kdctl.config.preset import RolloutSection
from kdctl.model.load import load_model
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.engine import Served
from kdctl.rollout.server.llama import Llama
from kdctl.rollout.server.protocol import About, Draw
from kdctl.rollout.work import Work
from kdctl.run.records import Prompt

KINDS = ("vllm", "sglang", "llama-server")
STOP = 258
PROMPTS = [Prompt(f"p{i}", i, [10 + i, 20, 30, 40 + i]) for i in range(8)]


class Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


class Files:
    """The teacher's folder."""

    def __init__(self, folder):
        self.folder, self.log, self.trained = folder, folder / "log", False

    def start(self, form):
        return self.folder

    def write(self, form, policy_step):
        return self.folder

    def clear(self, policy_step=-1):
        pass


@pytest.fixture
def made(tiny_dir_fp32, teacher_fp32):
    """Make the engine for one server or more, and what it tells."""

    def make(*urls, reporter=None, stop=(STOP,), prompts=PROMPTS, **changes):
        settings = RolloutSection.model_validate({"engine": "server", "url": urls, "max_new_tokens": 8} | changes)
        work = Work(teacher_fp32, stop, "teacher", settings, prompts, Files(tiny_dir_fp32), "w", reporter or Silent())
        return Served(work)

    return make


def complete(engine, model, **changes):
    """Load a model and have every prompt completed."""
    engine.load(model, 0)
    sampling = Sampling.of(engine.work.settings)
    return engine.complete([(prompt, 0) for prompt in PROMPTS], sampling, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_tokens_of_the_model_with_its_log_probabilities(kind, made, teacher_fp32):
    with serving(kind, teacher_fp32) as stub:
        engine, notes = made(stub.url, reporter=(told := Notes())), []
        found = complete(engine, teacher_fp32, progress=notes.append)
    assert [(one.prompt_index, one.sample_index) for one in found] == [(i, 0) for i in range(8)]
    assert sum(notes) == sum(len(one.completion_ids) for one in found)
    for one in found:
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        with torch.inference_mode():
            logs = teacher_fp32(ids).logits[0].double().log_softmax(-1)
        first = len(one.prompt_ids)
        expected = logs[torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]]
        torch.testing.assert_close(torch.tensor(one.logprobs).double(), expected, atol=1e-4, rtol=0)
        assert one.finish_reason == ("stop" if one.completion_ids[-1] == STOP else "length")
        assert one.source == "teacher"
    assert any(f"{kind} " in text and stub.url in text for text in told.said)
    record = engine.record()
    assert not record.reproducible
    assert record.server is not None
    assert (record.server.kind, record.server.servers) == (kind, 1)
    assert record.server.gap == engine.metrics()["rollout/server_gap"] < 1e-5
    assert stub.url not in record.model_dump_json()


def twice(engine):
    """Have each prompt completed twice, without a look at the server."""
    engine._pool.meet()
    return engine.complete([(p, sample) for p in PROMPTS for sample in range(2)], Sampling.of(engine.work.settings))


def test_samples_of_a_prompt_differ_and_come_again_with_their_seed(made, teacher_fp32):
    with serving("vllm", teacher_fp32) as stub:
        first, again = (twice(made(stub.url)) for _ in range(2))
        other = twice(made(stub.url, seed=1))
    tokens = [one.completion_ids for one in first]
    assert tokens == [one.completion_ids for one in again]
    assert tokens != [one.completion_ids for one in other]
    assert all(one != two for one, two in zip(tokens[::2], tokens[1::2], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampling_field_is_sent(kind, made, teacher_fp32):
    with serving(kind, teacher_fp32) as stub:
        complete(made(stub.url, temperature=0.7, top_p=0.9, top_k=11), teacher_fp32)
    body = next(one for one in reversed(stub.bodies) if one)
    sent = {**body, **body.get("sampling_params", {})}
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0.7, 0.9, 11, 0.0)
    assert (sent["presence_penalty"], sent["frequency_penalty"]) == (0.0, 0.0)
    assert sent.get("repetition_penalty", sent.get("repeat_penalty")) == 1.0
    assert {"seed", "sampling_seed"} & sent.keys()


FAULTS = {
    "drops_ids": "no token_ids|not those of output_ids|no ids of the",
    "inherits": r"does not draw as it was asked to: its tokens are e\^\d+ times likelier under .*top_p",
    "double_bos": "read 5 prompt tokens and 4 were sent",
    "nan": "log-probabilities that are no numbers",
    "order": "nats",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(kind, fault, made, teacher_fp32):
    with serving(kind, teacher_fp32, fault) as stub, pytest.raises(ServerError, match=FAULTS[fault]) as error:
        complete(made(stub.url), teacher_fp32)
    assert stub.url in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("vllm", "two", "one request with 2 completions"),
        ("vllm", "more", "8 log-probabilities of 10 tokens"),
        ("llama-server", "says_inherits", "takes min_p=0.05, and the request said otherwise"),
    ],
)
def test_what_only_one_server_can_do_wrong_is_said(kind, fault, message, made, teacher_fp32):
    with serving(kind, teacher_fp32, fault) as stub, pytest.raises(ServerError, match=message):
        complete(made(stub.url), teacher_fp32)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_is_told_by_its_gap(kind, made, teacher_fp32, tmp_path):
    other = load_model(build(tmp_path / "other", torch.float32, seed=1), torch.float32, torch.device("cpu"))
    with serving(kind, other) as stub, pytest.raises(ServerError, match=r"does not hold these weights.*nats off on av"):
        complete(made(stub.url), teacher_fp32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_silently_put_before_the_prompt_is_told(kind, made, teacher_fp32):
    with (
        serving(kind, teacher_fp32, "double_bos", "silently") as stub,
        pytest.raises(ServerError, match="puts a token before the prompt that was not sent"),
    ):
        complete(made(stub.url), teacher_fp32)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_log_probabilities_after_temperature_are_refused_with_what_to_switch_off(kind, made, teacher_fp32):
    with (
        serving(kind, teacher_fp32, "processed") as stub,
        pytest.raises(ServerError, match="those after temperature and masks; start"),
    ):
        complete(made(stub.url, temperature=0.6), teacher_fp32)
    with serving(kind, teacher_fp32, "processed") as stub:  # at temperature 1 they are the same
        assert complete(made(stub.url), teacher_fp32)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_of_another_program_passes(kind, made, teacher_fp32):
    with serving(kind, teacher_fp32, "noise") as stub:
        engine = made(stub.url)
        complete(engine, teacher_fp32)
    assert engine.metrics()["rollout/server_gap"] == pytest.approx(0.03, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_server_is_asked_again(kind, made, teacher_fp32, monkeypatch):
    monkeypatch.setattr("kdctl.rollout.server.client.FIRST_WAIT_S", 0.01)
    with serving(kind, teacher_fp32, "busy") as stub:
        assert len(complete(made(stub.url), teacher_fp32)) == 8


def test_an_answer_that_breaks_off_is_asked_for_again(made, teacher_fp32, monkeypatch):
    monkeypatch.setattr("kdctl.rollout.server.client.FIRST_WAIT_S", 0.01)
    with serving("vllm", teacher_fp32, "closes") as stub:
        assert len(complete(made(stub.url), teacher_fp32)) == 8


def test_a_server_that_hangs_ends_the_work_within_its_time(made, teacher_fp32):
    with serving("vllm", teacher_fp32, "hangs") as stub, pytest.raises(ServerError, match="does not answer any more"):
        complete(made(stub.url, timeout_s=0.3), teacher_fp32)


def test_nobody_there(made, teacher_fp32, monkeypatch):
    monkeypatch.setattr("kdctl.rollout.server.client.AWAY", 0)
    with pytest.raises(ServerError, match=r"no server answers at http://127\.0\.0\.1:9.*start it"):
        made("http://127.0.0.1:9").load(teacher_fp32, 0)


def test_a_server_of_no_known_kind(made, teacher_fp32):
    with (
        serving("vllm", teacher_fp32) as stub,
        pytest.raises(ServerError, match="answers like none of vllm, sglang, ll"),
    ):
        made(f"{stub.url}/other").load(teacher_fp32, 0)


def test_a_key_is_sent_and_asked_for(made, teacher_fp32, monkeypatch):
    with serving("vllm", teacher_fp32, "locked") as stub, pytest.raises(ServerError, match="KDCTL_SERVER_KEY"):
        made(stub.url).load(teacher_fp32, 0)
    monkeypatch.setenv("KDCTL_SERVER_KEY", "s3cret")
    with serving("vllm", teacher_fp32) as stub:
        engine = made(stub.url)
        complete(engine, teacher_fp32)
    assert {headers.get("Authorization") for headers in stub.headers} == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(engine.record().model_dump(mode="json"))


@pytest.mark.slow
def test_a_server_that_leaves_the_stop_token_out_gets_it_back(made, teacher_fp32):
    stop = _likely(teacher_fp32)
    with serving("sglang", teacher_fp32, "drops_stop") as stub:
        found = complete(made(stub.url, stop=stop, max_new_tokens=20), teacher_fp32)
    ended = [one for one in found if one.finish_reason == "stop"]
    assert ended
    for one in ended:
        assert one.completion_ids[-1] in stop
        assert len(one.logprobs or []) == len(one.completion_ids)


def _likely(model):
    """Return the token that the model draws most often, as stop tokens."""
    drawn = InProcess(model, (), "x").complete([(prompt, 0) for prompt in PROMPTS], Sampling(1.0, 1.0, 0, 12, 0, 0))
    return (Counter(token for one in drawn for token in one.completion_ids).most_common(1)[0][0],)


def test_which_of_several_stop_tokens_was_left_out_cannot_be_told(made, teacher_fp32):
    with (
        serving("sglang", teacher_fp32, "drops_stop") as stub,
        pytest.raises(ServerError, match="leaves out the token that ends a completion, and this model has 2"),
    ):
        made(stub.url, stop=(257, 258)).load(teacher_fp32, 0)


def test_a_stop_at_a_token_that_is_none_of_the_models_is_refused(made, teacher_fp32):
    with (
        serving("llama-server", teacher_fp32, stop=_likely(teacher_fp32)) as stub,
        pytest.raises(ServerError, match=r"ended a completion after .* stops at tokens or texts of its own"),
    ):
        complete(made(stub.url, max_new_tokens=40, stop=()), teacher_fp32)


@pytest.mark.slow
def test_tokens_behind_a_stop_token_of_the_model_are_cut(made, teacher_fp32):
    stop = _likely(teacher_fp32)
    with serving("llama-server", teacher_fp32, stop=()) as stub:
        found = complete(made(stub.url, max_new_tokens=20, stop=stop), teacher_fp32)
    assert any(one.finish_reason == "stop" for one in found)
    assert all(stop[0] not in one.completion_ids[:-1] for one in found)


def test_log_probabilities_that_llama_server_leaves_out_are_read_by_force(made, teacher_fp32):
    with serving("llama-server", teacher_fp32, "no_logprobs") as stub:
        found = complete(made(stub.url, max_new_tokens=6), teacher_fp32)
    assert all(len(one.logprobs or []) == len(one.completion_ids) for one in found)


def test_a_shortest_length_is_refused_where_the_server_has_none(made, teacher_fp32):
    with (
        serving("llama-server", teacher_fp32) as stub,
        pytest.raises(ServerError, match=r"min_new_tokens=3; set it to 0"),
    ):
        made(stub.url, min_new_tokens=3).load(teacher_fp32, 0)


def test_a_sequence_longer_than_the_server_takes_is_refused_before_any_is_drawn(made, teacher_fp32):
    with serving("vllm", teacher_fp32) as stub:
        engine = made(stub.url)
        engine.load(teacher_fp32, 0)
        drawn = stub.seen["/v1/completions"]
        with pytest.raises(ServerError, match=r"takes sequences of 512 tokens.*can have 604"):
            engine.complete([(PROMPTS[0], 0)], Sampling(1.0, 1.0, 0, 600, 0, 0))
        assert stub.seen["/v1/completions"] == drawn


@pytest.mark.slow
def test_two_servers_share_and_one_that_dies_leaves_its_requests(made, teacher_fp32, monkeypatch):
    monkeypatch.setattr("kdctl.rollout.server.client.FIRST_WAIT_S", 0.01)
    with serving("vllm", teacher_fp32) as one, serving("vllm", teacher_fp32) as two:
        engine = made(one.url, two.url, reporter=(told := Notes()), max_new_tokens=6)
        engine.load(teacher_fp32, 0)
        before = one.seen["/v1/completions"], two.seen["/v1/completions"]
        items = [(prompt, sample) for prompt in PROMPTS for sample in range(2)]
        sampling = Sampling.of(engine.work.settings)
        shared = engine.complete(items, sampling)
        assert one.seen["/v1/completions"] > before[0]
        assert two.seen["/v1/completions"] > before[1]
        two.faults.add("closes_all")
        alone = engine.complete(items, sampling)
        assert [x.completion_ids for x in alone] == [x.completion_ids for x in shared]
        assert any("warning" in text and two.url in text for text in told.said)
        one.faults.add("closes_all")
        with pytest.raises(ServerError, match="no other is left; start it again and repeat the command"):
            engine.complete(items, sampling)


@pytest.mark.slow
def test_a_server_that_dies_at_a_check_is_dropped_while_others_live(made, teacher_fp32, monkeypatch):
    monkeypatch.setattr("kdctl.rollout.server.client.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(Stub, "reload", lambda stub, folder: None)
    with ExitStack() as held:
        one, two, three = (held.enter_context(serving("vllm", teacher_fp32)) for _ in range(3))
        engine = made(one.url, two.url, three.url, reporter=(told := Notes()))
        one.faults.add("closes_all")  # before any check
        engine.load(teacher_fp32, 0)
        three.faults.add("closes_all")  # before a refresh
        engine.load(teacher_fp32, 1)
        assert [url for text in told.said if "warning" in text for url in urls(text)] == [one.url, three.url]
        assert len(engine.complete([(PROMPTS[0], 0)], Sampling.of(engine.work.settings))) == 1
        two.faults.add("closes_all")
        with pytest.raises(ServerError, match="no other is left"):
            engine.load(teacher_fp32, 2)


def test_servers_that_take_other_files_cannot_be_refreshed_together(made, teacher_fp32):
    with serving("vllm", teacher_fp32) as one, serving("llama-server", teacher_fp32) as two:
        engine = made(one.url, two.url)
        with pytest.raises(ServerError, match=r"llama-server, vllm take weights in different files.*rollout.weights"):
            engine.load(teacher_fp32, 1)


def urls(text):
    """List the addresses in a message."""
    return re.findall(r"http://[\d.:]+\d", text)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_ends_that_are_masked_are_no_sign_of_another_rule(kind, made, teacher_fp32):
    stop = _likely(teacher_fp32)
    with serving(kind, teacher_fp32) as stub:
        found = complete(made(stub.url, stop=stop, min_new_tokens=6), teacher_fp32)
    assert all(len(one.completion_ids) > 6 for one in found)


def test_an_end_before_the_shortest_length_is_refused(made, teacher_fp32):
    stop = _likely(teacher_fp32)
    with (
        serving("vllm", teacher_fp32, "ends_early") as stub,
        pytest.raises(ServerError, match=r"asked not to before rollout.min_new_tokens=6"),
    ):
        complete(made(stub.url, stop=stop, min_new_tokens=6), teacher_fp32)


def test_llama_server_masks_in_the_order_of_the_engine_in_process():
    fields = Llama(About("b1", "m")).fields(Draw([1], 0.7, 0.9, 5, 0, 8, (), 1))
    assert fields["samplers"] == ["temperature", "top_k", "top_p"]
