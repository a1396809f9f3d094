"""LlamaIndex's prompt templates: schemas, and Jinja's segments, which join to what it renders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT

from jinja_templates import MACROS, contexts, sources
from pcache_core import TemplateError
from pcache_core.pml import parse_schema
from pcache_integrations.llama_index.schema import render_rich, schema_for

VALUES = {
    "context_str": "some {query_str} <text>",
    "query_str": "who & why?",
    "docs": ["one {{ query_str }}", "<|im_start|>two"],
}
RICH = "{% for d in docs %}\n<doc>{{ d }}</doc>\n{% endfor %}\nQ: {{ query_str }}"
RICH_CHAT = """\
{% chat role="system" %}
Answer from {{ docs | length }} documents.
{% endchat %}
{% chat role="user" %}
{% for d in docs %}- {{ d }}
{% endfor %}Q: {{ query_str }}
{% endchat %}
"""


@pytest.mark.parametrize(
    "template",
    [
        DEFAULT_TEXT_QA_PROMPT,
        PromptTemplate('{{query_str}} is {"json": 1} {missing}'),
        PromptTemplate("a {x}", template_var_mappings={"query_str": "x"}),
        RichPromptTemplate(RICH),
        RichPromptTemplate("{{ docs | join(', ') }} {{ missing }}{% if docs %}x{% endif %}"),
    ],
)
def test_templates_of_one_text_have_a_schema(template: Any) -> None:
    parse_schema(schema_for(template))


@settings(max_examples=60, deadline=None)
@given(source=sources(depth=2), values=contexts)
def test_any_rich_template_is_rendered_as_llama_index_does(
    source: str, values: dict[str, Any]
) -> None:
    template = RichPromptTemplate(MACROS + source)
    try:
        expected = template.format(**values)
    except Exception:
        with pytest.raises(TemplateError):
            render_rich(template, values)
    else:
        ((_, segments),) = render_rich(template, values)
        assert "".join(segment.text for segment in segments) == expected
        assert {segment.kind for segment in segments} <= {"literal", "argument"}


def test_chat_tags_make_turns() -> None:
    template = RichPromptTemplate(RICH_CHAT)
    rendered = render_rich(template, VALUES)
    messages = template.format_messages(**VALUES)
    assert ["".join(s.text for s in turn) for _, turn in rendered] == [m.content for m in messages]
    assert [role for role, _ in rendered] == ["system", "user"]
    assert [[(s.text, s.kind) for s in turn] for _, turn in rendered] == [
        [("Answer from ", "literal"), ("2", "argument"), (" documents.", "literal")],
        [
            ("- ", "literal"),
            ("one {{ query_str }}", "argument"),
            ("\n- ", "literal"),
            ("<|im_start|>two", "argument"),
            ("\n", "literal"),
            ("Q: ", "literal"),
            ("who & why?", "argument"),
        ],
    ]
    schema = parse_schema(schema_for(template))
    assert [type(node).__name__ for node in schema.children] == ["Role", "Role"]


def test_a_chat_template_has_a_schema_with_the_lengths_that_are_given() -> None:
    template = ChatPromptTemplate.from_messages(
        [("system", "You are {who}."), ("user", "said before"), ("user", "{query_str}?")],
        who="kind",
    )
    assert '<param name="who" len="3"/>' in schema_for(template, lengths={"who": 3})


def test_a_selector_is_asked_for_its_template() -> None:
    chat = ChatPromptTemplate.from_messages([("user", "chat {a}")])
    template = SelectorPromptTemplate(
        default_template=PromptTemplate("plain {a}"),
        conditionals=[(lambda llm: llm is not None, chat)],
    )
    assert "plain" in schema_for(template)
    assert "<user" in schema_for(template, llm=MockLLM())


@pytest.mark.parametrize(
    "source",
    ["{{ canary_word }}x", '{% chat role="user" %}{{ "http://x/y.png" | image }}{% endchat %}'],
)
def test_what_can_not_be_traced_is_refused_or_of_another_text(source: str) -> None:
    template = RichPromptTemplate(source)
    try:
        rendered = render_rich(template, {})
    except TemplateError:
        return
    texts = ["".join(s.text for s in segments) for _, segments in rendered]
    assert texts != [m.content for m in template.format_messages()]


def test_tags_that_call_a_model_have_no_schema_and_never_run_beside_the_call() -> None:
    template = RichPromptTemplate('{% completion model="m" %}hi{% endcompletion %}')
    with pytest.raises(TemplateError, match="CompletionExtension has no counterpart"):
        schema_for(template)


def test_a_message_of_a_tool_has_no_schema() -> None:
    template = ChatPromptTemplate([ChatMessage(role="tool", content="x {a}")])
    with pytest.raises(TemplateError, match="role 'tool' has no schema"):
        schema_for(template)
