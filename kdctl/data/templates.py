"""Conversations to text with a model's chat template, which is a program of the model's author and may do anything.

transformers runs it in jinja's sandbox. Here it also gets a fixed day, so that prompts of today are those of tomorrow,
and bounds; whatever it raises becomes one message.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from kdctl.base.errors import DataError
from kdctl.run.records import Message
from kdctl.system.limits import limited
from kdctl.system.patches import replaced

SECONDS = 5.0
"""A conversation's text takes less than a millisecond."""
BYTES = 1 << 30
LARGEST_POWER = 1024
"""Exponent, above which a power of whole numbers may take longer than can be interrupted."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox without powers that never end."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Any, operator_name: str, left: Any, right: Any) -> Any:
        """Compute a power of small exponent."""
        if isinstance(right, int) and abs(right) > LARGEST_POWER:
            raise OverflowError(f"a power with the exponent {right} is too large")
        return operator.pow(left, right)


@contextmanager
def _on(day: str) -> Iterator[None]:
    """Fix the clock that ``strftime_now`` reads, and the sandbox in which templates are compiled, once each."""
    clock = SimpleNamespace(now=lambda: datetime.fromisoformat(day))
    module = chat_template_utils
    with replaced(module, "ImmutableSandboxedEnvironment", Sandbox), replaced(module, "datetime", clock):
        yield


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a chat template asks for the day."""
    return "strftime" in str(tokenizer.chat_template)


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool, day: str
) -> str:
    """Return a conversation as its chat template writes it on a day, an ISO date.

    Raises DataError for whatever the template raises, and where it takes too long or too much memory.
    """
    conversation: Any = list(messages)
    try:
        with _on(day), limited(SECONDS, BYTES):
            template = tokenizer.apply_chat_template
            text = str(template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt))
            text.encode()  # what is not valid Unicode cannot be tokenized
            return text
    except Exception as error:  # noqa: BLE001 - a template can raise any
        roles = ", ".join(message["role"] for message in messages)
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        silent = "it needs too much memory" if isinstance(error, MemoryError) else "no reason given"
        reason = str(error)[:400] or silent
        raise DataError(
            f"the teacher's chat template refuses a conversation of {roles:.100}: {kind}{reason}; kdctl gives a "
            "template messages of text, and neither tools nor documents. Use other prompts or mend the template"
        ) from None
