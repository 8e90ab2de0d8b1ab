"""Chat templates: whatever they raise is one message, and the day is the run folder's."""

import copy
import resource
import signal
from datetime import date

import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import DataError, ModelError
from kdctl.data import templates
from kdctl.data.templates import rendered
from kdctl.model.tokenizer import load_tokenizer

ASKED = [{"role": "user", "content": "hello"}]
DAY = "2024-02-29"


def render(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Render a conversation with another template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return rendered(other, ASKED, True, DAY)


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ tools | length }}", "TypeError: object of type 'NoneType' has no len"),
        ("{{ 'turns: ' + (messages | length) }}", "TypeError: can only concatenate str"),
        ("{{ 1 / (0 * (messages | length)) }}", "ZeroDivisionError"),
        ("{{ messages[0].name.first }}", "has no attribute"),
        ("{{ raise_exception('documents are missing') }}", "conversation of user: documents are missing"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% if %}", "Expected an expression"),
        ("{% include 'other' %}", "no loader"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 12) | list }}", "OverflowError: Range too big"),
        ("{{ 'x' * 10 ** 11 }}", "MemoryError"),
        ("{{ '%100000000000d' % 1 }}", "MemoryError"),
        ("{{ 9 ** (9 ** 9) }}", "OverflowError: a power"),
        ("{{ strftime_now(7) }}", "TypeError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("{{ messages[0].content.encode('utf-16').decode() }}", "UnicodeDecodeError"),
    ],
)
def test_whatever_a_template_raises_is_one_message(
    tokenizer: PreTrainedTokenizerBase, template: str, word: str
) -> None:
    with pytest.raises(DataError, match="the teacher's chat template refuses") as found:
        render(tokenizer, template)
    assert word in str(found.value)


def test_a_template_that_does_not_end_is_stopped(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=r"TimeoutError: it did not end within 0\.2 seconds"):
        render(tokenizer, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %B %Y') }}",
        "{% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}",
        "{% macro day() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ day() }}",
        "{% set ns = namespace(f=strftime_now) %}{% for m in messages %}{{ ns.f('%d %B %Y') }}{% endfor %}",
    ],
)
def test_the_day_is_the_given_one(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    assert render(tokenizer, template) == "29 February 2024"


def test_a_template_without_a_day_is_rendered_as_transformers_does(tokenizer: PreTrainedTokenizerBase) -> None:
    theirs = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert rendered(tokenizer, ASKED, True, date.today().isoformat()) == theirs
    assert render(tokenizer, "{{ 2 ** 10 }} {{ 2 ** 0.5 }} {{ 2 ** -1 }}") == f"1024 {2**0.5} 0.5"


def test_templates_by_name_need_a_default(tokenizer: PreTrainedTokenizerBase, tmp_path) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = {"default": "{{ 'plain' }}", "tool_use": "{{ tools | length }}"}
    assert rendered(own, ASKED, True, DAY) == "plain"
    own.chat_template = {"chat": "a", "tool_use": "b"}
    own.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'chat', 'tool_use'"):
        load_tokenizer(tmp_path)
