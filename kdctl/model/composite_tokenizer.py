"""The tokenizer of a composite model, with a chat template that takes messages of text.

Templates of such models may be a processor's, in a file that no tokenizer reads, and may take a message's content as a
list of parts only. Some then leave out text that is no such part, without a word.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError, brief
from kdctl.model.tokenizer import SPECIALS, differences, open_tokenizer
from kdctl.system.limits import limited

PROCESSOR = "chat_template.json"
AS_PARTS = (
    "{%- set as_parts = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set said = message['content'] -%}"
    "{%- set parts = [{'type': 'text', 'text': said}] if said is string else said -%}"
    "{%- set as_parts.messages = as_parts.messages + [dict(message, content=parts)] -%}"
    "{%- endfor -%}{%- set messages = as_parts.messages -%}{{ '' }}"
)
"""What lets a template of parts take text as well; the empty text keeps a line break that the template begins with."""
SAID = ("kdctl asks", "kdctl answers", "kdctl thanks")
SECONDS, BYTES = 5.0, 1 << 30


def text_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a composite model. Raises ModelError if it is damaged, or its template leaves out text."""
    tokenizer = open_tokenizer(path)
    template = tokenizer.chat_template or _processor_template(path / PROCESSOR)
    if not isinstance(template, str):
        return tokenizer  # none, or several by name, which are the tokenizer's own
    plain = _written(tokenizer, template, SAID)
    if not _complete(plain):
        listed = _written(tokenizer, template, [[{"type": "text", "text": text}] for text in SAID])
        if _complete(listed) and _written(tokenizer, AS_PARTS + template, SAID) == listed:
            template = AS_PARTS + template
        elif plain is not None:
            raise ModelError(
                f"{path}: its chat template leaves out the text of messages, so every prompt would be the same; use "
                "another model or mend the template"
            )
    tokenizer.chat_template = template
    return tokenizer


def check_kept(folder: Path, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise ModelError unless the tokenizer of a composite model reads the same beside the text part alone.

    transformers chooses its class by the model's type, too; one may add a token for the unknown, which no text meets.
    """
    found = open_tokenizer(folder)
    unlike = [part for part in differences(found, tokenizer) if part != SPECIALS]
    unlike += [name for name in ("bos_token", "eos_token") if getattr(found, name) != getattr(tokenizer, name)]
    if unlike or found("")["input_ids"] != tokenizer("")["input_ids"]:
        raise ModelError(
            f"{path}: beside the text part alone its tokenizer would read other tokens "
            f"({', '.join(unlike) or 'at the start and end'}); use a text model"
        )


def _processor_template(file: Path) -> Any:
    """Return the template that the processor of an older folder has, None if there is none."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {brief(error)}; fetch the model again") from None


def _written(tokenizer: PreTrainedTokenizerBase, template: str, contents: Sequence[Any]) -> str | None:
    """Return what a template makes of a conversation, None where it refuses it, which is told when prompts are made."""
    messages: Any = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant", "user"), contents, strict=True)
    ]
    try:
        with limited(SECONDS, BYTES):
            return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception:  # noqa: BLE001 - a template can raise any
        return None


def _complete(text: str | None) -> bool:
    return text is not None and all(said in text for said in SAID)
