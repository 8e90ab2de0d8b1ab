"""A server's model as lm-eval sees it: likelihoods are those that it states of tokens that it is sent."""

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.config.preset import EvalSection
from kdctl.eval.answers import LiveModel
from kdctl.eval.likelihood import Answer, Question, Result
from kdctl.eval.tasks import LoadedTask
from kdctl.rollout.server.stranger import Stranger
from kdctl.run.records import Rollout


class ServedModel(LiveModel):
    """A server as lm-eval sees it. model: the one that is here, of the same tokens, whose lengths hold for both."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, server: Stranger, settings: EvalSection
    ):
        super().__init__(model, tokenizer, server, settings)
        self.server = server
        if server.reach is not None:  # a live model never reads the last token, which a server does
            self.encoder.max_tokens = min(self.encoder.max_tokens, server.reach - 1)

    def _judged(self, batch: Sequence[Question]) -> Iterator[tuple[Answer, Result]]:
        answers = [answer for question in batch for answer in question.answers]
        yield from zip(answers, self._read(answers), strict=True)

    def _read(self, windows: Sequence[Answer]) -> list[Result]:
        """Sum what the server says of the judged tokens; whether it would write them greedily it does not say."""
        said = iter(self.server.score([_as_rollout(window) for window in windows]))
        return [(sum(next(said) for _ in range(window.scored)), False) for window in windows]


def check_servable(tasks: Mapping[str, LoadedTask]) -> None:
    """Raise DataError for a task whose score is whether greedy decoding would write an answer: no server says so."""
    for name, task in tasks.items():
        if any(one.OUTPUT_TYPE == "loglikelihood" for one in task.subtasks.values()):
            raise DataError(
                f"task {name!r} asks whether greedy decoding would write each answer, and a server that scores tokens "
                "does not say it; take the task out, or compare folders"
            )


def _as_rollout(answer: Answer) -> Rollout:
    before, judged = answer.tokens[: -answer.scored], answer.tokens[-answer.scored :]
    return Rollout("scored", answer.index, 0, before, judged, None, "length", 0, 0, "server")
