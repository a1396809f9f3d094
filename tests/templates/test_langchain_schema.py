"""LangChain's prompt templates: schemas, and segments that join to what LangChain renders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)

from jinja_templates import MACROS, contexts, sources
from pcache_core import TemplateError
from pcache_core.pml import parse_schema
from pcache_integrations.langchain._schema import schema_for, segments_for

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


def texts(segments: list[list[Any]]) -> list[str]:
    return ["".join(segment.text for segment in block) for block in segments]


@pytest.mark.parametrize("template_format", FORMATS)
def test_every_format_is_rendered_as_langchain_does(template_format: Any) -> None:
    template = PromptTemplate.from_template(
        FORMATS[template_format], template_format=template_format
    )
    values = {name: VALUES[name] for name in template.input_variables}
    (segments,) = segments_for(template, values)
    assert texts([segments]) == [template.format(**values)]
    assert {segment.kind for segment in segments} >= {"literal", "argument"}
    assert all(segment.name for segment in segments)
    literals = "".join(segment.text for segment in segments if segment.kind == "literal")
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
def test_any_jinja_template_is_rendered_as_langchain_does(
    source: str, values: dict[str, Any]
) -> None:
    template = PromptTemplate.from_template(MACROS + source, template_format="jinja2")
    try:
        expected = template.format(**values)
    except Exception as error:
        with pytest.raises(type(error)):
            segments_for(template, values)
    else:
        (segments,) = segments_for(template, values)
        assert texts([segments]) == [expected]
        assert not [segment for segment in segments if segment.kind == "text"]


def test_partial_variables_are_read_once() -> None:
    calls: list[int] = []

    def day() -> str:
        calls.append(1)
        return f"day {len(calls)}"

    template = PromptTemplate.from_template("On {day} of {n}.").partial(day=day, n="5")
    (segments,) = segments_for(template, {})
    assert texts([segments]) == ["On day 1 of 5."]
    assert [(s.text, s.name) for s in segments if s.kind == "argument"] == [
        ("day 1", "day"),
        ("5", "n"),
    ]


def test_a_chat_template_has_segments_for_each_text() -> None:
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
    values = {
        "history": [("human", "a {who}"), HumanMessage("b")],
        "question": "why?",
        "start": "Well,",
    }
    segments = segments_for(template, values)
    messages = template.format_messages(**values)
    assert texts(segments)[:5] == [message.content for message in messages[:5]]
    assert texts(segments)[5:] == ["Q: why?", "Well,"]
    assert [[(s.text, s.kind) for s in block] for block in segments] == [
        [("You are ", "literal"), ("kind", "argument"), (".", "literal")],
        [("Be brief.", "literal")],
        [("Hello.", "argument")],
        [("a {who}", "argument")],
        [("b", "argument")],
        [("Q: ", "literal"), ("why?", "argument")],
        [("Well,", "argument")],
    ]
    schema = parse_schema(schema_for(template))
    assert [type(node).__name__ for node in schema.children] == ["Role"] * 3 + ["Slot"] + [
        "Role"
    ] * 2


@pytest.mark.parametrize(
    ("template", "values", "message"),
    [
        (
            FewShotPromptTemplate(
                examples=[{"x": "1"}],
                example_prompt=PromptTemplate.from_template("x {x}"),
                suffix="y {y}",
                input_variables=["y"],
            ),
            {"y": "2"},
            "FewShotPromptTemplate has no schema",
        ),
        (
            ChatPromptTemplate.from_messages([("human", [{"image_url": "{u}"}, {"text": "a"}])]),
            {"u": "https://x"},
            "ImagePromptTemplate has no schema",
        ),
        (
            ChatPromptTemplate.from_messages(
                [("human", "{{#f}}x{{/f}}")], template_format="mustache"
            ),
            {"f": lambda text, render: "called"},
            None,
        ),
    ],
)
def test_what_can_not_be_traced_is_one_text(
    template: Any, values: Any, message: str | None
) -> None:
    if message:
        with pytest.raises(TemplateError, match=message):
            schema_for(template)
    segments = segments_for(template, values)
    assert all([s.kind for s in block] == ["text"] for block in segments)
    assert len(segments) == 1


def test_an_iterator_among_the_values_is_read_by_langchain_alone() -> None:
    def words() -> Iterator[str]:
        yield from ("a", "b")

    template = PromptTemplate.from_template(
        "{% for d in docs %}{{ d }}{% endfor %}", template_format="jinja2"
    )
    (segments,) = segments_for(template, {"docs": words()})
    assert [(s.text, s.kind) for s in segments] == [("ab", "text")]


def test_a_template_that_langchain_refuses_fails_as_in_langchain() -> None:
    with pytest.raises(KeyError, match="question"):
        segments_for(PromptTemplate.from_template("{question}"), {})
