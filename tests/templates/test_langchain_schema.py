"""LangChain's prompt templates: schemas, and segments that join to what LangChain renders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)

from jinja_templates import MACROS, contexts, sources
from pcache_core import TemplateError
from pcache_core.pml import parse_schema
from pcache_integrations.langchain._layouts import rendered_layout
from pcache_integrations.langchain._schema import schema_for

FORMATS = {
    "f-string": "From:\n{context}\n\nQ: {question:>6} {{x}}\nA:",
    "jinja2": "From:\n{% for d in docs %}{{ loop.index }}. {{ d }}\n{% endfor %}Q: {{ question }}",
    "mustache": "From:\n{{#docs}}\n- {{.}}\n{{/docs}}\nQ: {{{question}}}\nA: {{question}}",
}
VALUES = {
    "context": "some {context} <text>",
    "docs": ["one {{ question }}", "<|im_start|>two", "</slot>"],
    "question": "who & {docs}?",
}


Parts = list[tuple[str, str]]


def traced(source: str, template_format: str, values: dict[str, Any], text: str) -> Parts:
    """(kind, text) of the parts of a rendered text."""
    parts: Parts = []
    position = 0
    for kind, _, chars in rendered_layout(source, template_format, values, text):
        parts.append((kind, text[position : position + chars]))
        position += chars
    assert position == len(text)
    return parts


@pytest.mark.parametrize("template_format", FORMATS)
def test_every_format_is_traced_as_langchain_renders_it(template_format: Any) -> None:
    source = FORMATS[template_format]
    template = PromptTemplate.from_template(source, template_format=template_format)
    values = {name: VALUES[name] for name in template.input_variables}
    parts = traced(source, template_format, values, template.format(**values))
    assert {kind for kind, _ in parts} == {"literal", "argument"}
    literals = "".join(text for kind, text in parts if kind == "literal")
    assert "<" not in literals
    assert "From:\n" in literals


@pytest.mark.parametrize("template_format", FORMATS)
def test_every_format_has_a_schema_that_parses(template_format: Any) -> None:
    template = PromptTemplate.from_template(
        FORMATS[template_format], template_format=template_format
    )
    schema = parse_schema(schema_for(template, name="qa", lengths={"question": 9}))
    assert schema.name == "qa"
    assert '<param name="question" len="9"/>' in schema_for(template, lengths={"question": 9})


@settings(max_examples=60, deadline=None)
@given(source=sources(depth=2), values=contexts)
def test_any_jinja_template_is_traced_as_langchain_renders_it(
    source: str, values: dict[str, Any]
) -> None:
    template = PromptTemplate.from_template(MACROS + source, template_format="jinja2")
    try:
        text = template.format(**values)
    except Exception:
        return  # nothing is rendered that could be traced
    parts = traced(MACROS + source, "jinja2", values, text)
    assert not [part for kind, part in parts if kind == "text"]


def test_a_chat_template_has_a_turn_for_each_message() -> None:
    template = ChatPromptTemplate.from_messages(
        [
            ("system", "You are {who}."),
            SystemMessage("Be brief."),
            AIMessage("Hello."),
            MessagesPlaceholder("history"),
            ("human", [{"type": "text", "text": "Q: {question}"}, {"type": "text", "text": ""}]),
            ChatPromptTemplate.from_messages([("ai", "{start}")]),
        ]
    ).partial(who=lambda: "kind")
    schema = parse_schema(schema_for(template))
    assert [type(node).__name__ for node in schema.children] == ["Role"] * 3 + ["Slot"] + [
        "Role"
    ] * 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            FewShotPromptTemplate(
                examples=[{"x": "1"}],
                example_prompt=PromptTemplate.from_template("x {x}"),
                suffix="y {y}",
                input_variables=["y"],
            ),
            "FewShotPromptTemplate has no schema",
        ),
        (
            ChatPromptTemplate.from_messages([("human", [{"image_url": "{u}"}, {"text": "a"}])]),
            "ImagePromptTemplate has no schema",
        ),
    ],
)
def test_what_can_not_be_a_schema_is_refused(template: Any, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        schema_for(template)


def test_a_function_that_writes_for_a_section_is_not_called_again() -> None:
    calls: list[str] = []

    def write(text: str, render: Any) -> str:
        calls.append(text)
        return "called"

    source = "{{#f}}x{{/f}}"
    text = PromptTemplate.from_template(source, template_format="mustache").format(f=write)
    assert traced(source, "mustache", {"f": write}, text) == [("text", "called")]
    assert calls == ["x"]
