"""LlamaIndex's prompt templates: schemas, and segments that join to what LlamaIndex renders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT
from pydantic import BaseModel

from jinja_templates import MACROS, contexts, sources
from pcache_core import TemplateError
from pcache_core.pml import parse_schema
from pcache_integrations.llama_index._schema import schema_for, segments_for

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


class Answer(BaseModel):
    text: str


def texts(segments: list[list[Any]]) -> list[str]:
    return ["".join(segment.text for segment in block) for block in segments]


@pytest.mark.parametrize(
    "template",
    [
        DEFAULT_TEXT_QA_PROMPT,
        PromptTemplate('{{query_str}} is {"json": 1} {missing}'),
        PromptTemplate("a {x}", template_var_mappings={"query_str": "x"}),
        PromptTemplate("a {x}", function_mappings={"x": lambda **values: values["query_str"] * 2}),
        PromptTemplate("Q: {query_str}", output_parser=PydanticOutputParser(output_cls=Answer)),
        RichPromptTemplate(RICH),
        RichPromptTemplate("{{ docs | join(', ') }} {{ missing }}{% if docs %}x{% endif %}"),
    ],
)
def test_templates_of_one_text_are_rendered_as_llama_index_does(template: Any) -> None:
    (segments,) = segments_for(template, VALUES)
    assert texts([segments]) == [template.format(**VALUES)]
    assert {s.kind for s in segments} >= {"literal", "argument"}
    parse_schema(schema_for(template))


@settings(max_examples=60, deadline=None)
@given(source=sources(depth=2), values=contexts)
def test_any_rich_template_is_rendered_as_llama_index_does(
    source: str, values: dict[str, Any]
) -> None:
    template = RichPromptTemplate(MACROS + source)
    try:
        expected = template.format(**values)
    except Exception as error:
        with pytest.raises(type(error)):
            segments_for(template, values)
    else:
        (segments,) = segments_for(template, values)
        assert texts([segments]) == [expected]
        assert not [segment for segment in segments if segment.kind == "text"]


def test_chat_tags_make_turns() -> None:
    template = RichPromptTemplate(RICH_CHAT)
    segments = segments_for(template, VALUES)
    assert texts(segments) == [m.content for m in template.format_messages(**VALUES)]
    assert [[(s.text, s.kind) for s in block] for block in segments] == [
        [("Answer from ", "literal"), ("2", "argument"), (" documents.", "literal")],
        [
            ("- ", "literal"),
            ("one {{ query_str }}", "document"),
            ("\n- ", "literal"),
            ("<|im_start|>two", "document"),
            ("\n", "literal"),
            ("Q: ", "literal"),
            ("who & why?", "argument"),
        ],
    ]
    schema = parse_schema(schema_for(template))
    assert [type(node).__name__ for node in schema.children] == ["Role", "Role"]


def test_a_chat_template_has_segments_for_each_message() -> None:
    template = ChatPromptTemplate.from_messages(
        [("system", "You are {who}."), ("user", "said before"), ("user", "{query_str}?")],
        who="kind",
    )
    segments = segments_for(template, VALUES)
    assert texts(segments) == [m.content for m in template.format_messages(**VALUES)]
    assert [[s.kind for s in block] for block in segments] == [
        ["literal", "argument", "literal"],
        ["argument"],
        ["argument", "literal"],
    ]
    assert '<param name="who" len="3"/>' in schema_for(template, lengths={"who": 3})


def test_a_selector_is_asked_for_its_template() -> None:
    chat = ChatPromptTemplate.from_messages([("user", "chat {a}")])
    template = SelectorPromptTemplate(
        default_template=PromptTemplate("plain {a}"),
        conditionals=[(lambda llm: llm is not None, chat)],
    )
    assert "plain" in schema_for(template)
    assert "<user" in schema_for(template, llm=MockLLM())
    assert texts(segments_for(template, {"a": "A"}, llm=MockLLM())) == ["chat A"]


@pytest.mark.parametrize(
    "source",
    ["{{ canary_word }}x", '{% chat role="user" %}{{ "http://x/y.png" | image }}{% endchat %}'],
)
def test_what_can_not_be_traced_is_one_text(source: str) -> None:
    template = RichPromptTemplate(source)
    assert all([s.kind for s in block] == ["text"] for block in segments_for(template, {}))


def test_tags_that_call_a_model_have_no_schema_and_never_run_beside_the_call() -> None:
    template = RichPromptTemplate('{% completion model="m" %}hi{% endcompletion %}')
    with pytest.raises(TemplateError, match="CompletionExtension has no counterpart"):
        schema_for(template)


def test_a_message_of_a_tool_has_no_schema() -> None:
    template = ChatPromptTemplate([ChatMessage(role="tool", content="x {a}")])
    with pytest.raises(TemplateError, match="role 'tool' has no schema"):
        schema_for(template)
    assert [[s.kind for s in block] for block in segments_for(template, {"a": "A"})] == [["text"]]
