"""Chat templates: what transformers renders, and bounds on what a hostile one may cost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from octavo.model.weights.resolve import resolve_model
from octavo.server import chat_sandbox
from octavo.server.chat_template import ChatTemplate, ChatTemplateError
from octavo.server.tokenizer import load_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Héllo 🎉"},
    {"role": "assistant", "content": "Hi\n", "tool_calls": [{"name": "f", "arguments": {"x": "é"}}]},
    {"role": "user", "content": "Bye"},
]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"a": "<é>"}}}]

TEMPLATES = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "tools": "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
    "{%- for m in messages if m.role != 'system' -%}\n  {%- if m.tool_calls is defined %}\n"
    "    {{- m.tool_calls | tojson }}\n  {%- endif %}\n{{ m.content }}\n{%- endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.role ~ ':' ~ loop.index0 %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{{ ns.n }} {{ ns.last }} {{ messages[1:] | map(attribute='role') | join(', ') }}",
    "macro": "{% macro show(m, sep=' ') %}{{ m.role + sep + m.content }}{% endmacro %}"
    "{% for m in messages %}{% generation %}{{ show(m, sep='=') }}{% endgeneration %}{{ '-' * 3 }}{% endfor %}",
    "methods": "{{ messages[0].content.split('.')[0].upper().replace('BRIEF', 'b') }}{{ '%s=%d' | format('a', 3) }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'x'.strip() in ['x'] }}",
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    import tokenizers
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(theirs: Any, name: str, tools: Any, prompt: bool) -> None:
    expected = theirs.apply_chat_template(
        CHAT, chat_template=TEMPLATES[name], tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    ours = ChatTemplate(TEMPLATES[name], "<s>", "</s>")
    assert ours.render(CHAT, add_generation_prompt=prompt, tools=tools) == expected


@pytest.mark.real_model
def test_default_models_template_equals_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(resolve_model(None))
    assert tokenizer.chat_template is not None
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    chat = [message for message in CHAT if message["role"] != "system"]
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    for messages in (CHAT, chat):
        expected = other.apply_chat_template(
            messages, chat_template=tokenizer.chat_template, add_generation_prompt=True, tokenize=False
        )
        assert template.render(messages, add_generation_prompt=True) == expected


def test_variables_reach_the_template_but_not_the_reserved_ones() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ messages | length }}", None, None)
    assert template.render(CHAT, add_generation_prompt=False, enable_thinking=False) == "False 4"


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplate(None, None, None).render(CHAT, add_generation_prompt=True)


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 +", "{% endfor %}", "{{ x | nofilter }}", "{{" + "(" * 5000])
def test_a_broken_template_is_reported_when_compiled(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="does not compile") as caught:
        ChatTemplate(source, None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[9].content.text }}",
        "{{ messages + 3 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_refusals_are_one_line(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source, None, None).render(CHAT, add_generation_prompt=True)
    assert "\n" not in str(caught.value)


HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(50) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 9) | length }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ '{:>10000000000}'.format('a') }}",
    "{{ '{:>{}}'.format('a', 10 ** 9) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ (range(90000) | map('string')) | join('b' * 999) }}",
    "{{ 'b'.join(['a' * 99999] * 9999) }}",
    "{{ [[1] * 9999] * 9999 }}",
    "{{ ([[1] * 9999] * 9999) | tojson }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_OUTPUT_CHARS", 1 << 18)
    monkeypatch.setattr(chat_sandbox, "MAX_STEPS", 20_000)
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, None, None).render(CHAT, add_generation_prompt=True)


def test_one_template_renders_in_several_threads() -> None:
    template = ChatTemplate(TEMPLATES["chatml"], "<s>", "</s>")
    expected = template.render(CHAT, add_generation_prompt=True)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(template.render(CHAT, add_generation_prompt=True)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
