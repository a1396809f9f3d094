"""LangChain's prompt templates as schemas."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)

from pcache_core import TemplateError
from pcache_core.pml import parse_schema
from pcache_integrations.langchain.schema import schema_for

FORMATS = {
    "f-string": "From:\n{context}\n\nQ: {question:>6} {{x}}\nA:",
    "jinja2": "From:\n{% for d in docs %}{{ loop.index }}. {{ d }}\n{% endfor %}Q: {{ question }}",
    "mustache": "From:\n{{#docs}}\n- {{.}}\n{{/docs}}\nQ: {{{question}}}\nA: {{question}}",
}


@pytest.mark.parametrize("template_format", FORMATS)
def test_every_format_has_a_schema_that_parses(template_format: Any) -> None:
    template = PromptTemplate.from_template(
        FORMATS[template_format], template_format=template_format
    )
    schema = parse_schema(schema_for(template, name="qa", lengths={"question": 9}))
    assert schema.name == "qa"
    assert '<param name="question" len="9"/>' in schema_for(template, lengths={"question": 9})


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
