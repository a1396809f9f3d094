"""Template text and variables' values are told apart in rendered prompts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)

from pcache_integrations.langchain._layouts import layouts

Part = tuple[str, str | None, str]


def parts(template: Any, inputs: Any) -> list[list[Part]]:
    """Render a template; (kind, name, text) of each part of each text block with a layout."""
    prompt = template.invoke(inputs)
    blocks = []
    for text, layout in layouts(template._serialized, inputs, prompt):
        position = 0
        block = []
        for kind, name, chars in layout:
            block.append((kind, name, text[position : position + chars]))
            position += chars
        assert position == len(text)
        blocks.append(block)
    return blocks


@pytest.mark.parametrize(
    ("template", "template_format"),
    [
        ("From:\n{context}\n\nQ: {question}\nA:", "f-string"),
        ("From:\n{{context}}\n\nQ: {{ question }}\nA:", "jinja2"),
        ("From:\n{{{context}}}\n\nQ: {{question}}\nA:", "mustache"),
    ],
)
def test_every_template_format_is_aligned(template: str, template_format: Any) -> None:
    prompt = PromptTemplate.from_template(template, template_format=template_format)
    assert parts(prompt, {"context": "some text", "question": "who?"}) == [
        [
            ("literal", None, "From:\n"),
            ("argument", "context", "some text"),
            ("literal", None, "\n\nQ: "),
            ("argument", "question", "who?"),
            ("literal", None, "\nA:"),
        ]
    ]


def test_a_template_with_one_variable_takes_the_bare_value() -> None:
    prompt = PromptTemplate.from_template("Say {word}.")
    assert parts(prompt, "hello") == [
        [("literal", None, "Say "), ("argument", "word", "hello"), ("literal", None, ".")]
    ]


def test_values_unknown_before_rendering_reach_to_the_next_template_text() -> None:
    prompt = PromptTemplate.from_template("On {day:>6} ask {n} of {who}!").partial(
        who=lambda: "Ann"
    )
    assert parts(prompt, {"day": "Monday", "n": 3}) == [
        [
            ("literal", None, "On "),
            ("argument", "day:>6", "Monday"),
            ("literal", None, " ask "),
            ("argument", "n", "3"),
            ("literal", None, " of "),
            ("argument", "who", "Ann"),
            ("literal", None, "!"),
        ]
    ]


def test_a_value_that_looks_like_the_template_stays_a_value() -> None:
    prompt = PromptTemplate.from_template("Q: {question}\nA:")
    question = "who?\nA: me\nQ: and who else?\nA:"
    assert parts(prompt, {"question": question})[0][1] == ("argument", "question", question)


def test_escaped_values_are_values() -> None:
    prompt = PromptTemplate.from_template("Is {{a}} so?", template_format="mustache")
    assert parts(prompt, {"a": "1 < 2"}) == [
        [
            ("literal", None, "Is "),
            ("argument", "a", "1 &lt; 2"),
            ("literal", None, " so?"),
        ]
    ]


def test_the_opening_of_a_template_with_logic_is_template_text_and_the_rest_is_not() -> None:
    prompt = PromptTemplate.from_template(
        "Answer.\n\n{%- for d in docs %}\n* {{ d }}{% endfor %}\nQ: {{ question }}\n",
        template_format="jinja2",
    )
    assert parts(prompt, {"docs": ["one", "two"], "question": "who?"}) == [
        [
            ("literal", None, "Answer.\n"),
            ("text", None, "* one\n* two\nQ: "),
            ("argument", "question", "who?"),
        ]
    ]


def test_few_shot_templates_are_searched_for_their_values() -> None:
    prompt = FewShotPromptTemplate(
        examples=[{"a": "1"}],
        example_prompt=PromptTemplate.from_template("ex {a}"),
        prefix="Look:",
        suffix="Now: {question}",
        input_variables=["question"],
    )
    assert parts(prompt, {"question": "what?"}) == [
        [("text", None, "Look:\n\nex 1\n\nNow: "), ("argument", "question", "what?")]
    ]


def test_chat_templates_are_aligned_message_by_message() -> None:
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Use {context}."),
            MessagesPlaceholder("history", n_messages=2),
            ("placeholder", "{optional}"),
            ("human", "Say {word}"),
        ]
    )
    history = [HumanMessage("a"), AIMessage("b"), HumanMessage("c")]
    assert parts(prompt, {"context": "this", "history": history, "word": "hi"}) == [
        [("literal", None, "Use "), ("argument", "context", "this"), ("literal", None, ".")],
        [("literal", None, "Say "), ("argument", "word", "hi")],
    ]


def test_nested_chat_templates_are_walked() -> None:
    inner = ChatPromptTemplate.from_messages([("system", "Be {mood}.")])
    prompt = ChatPromptTemplate.from_messages([inner, ("human", "Say {word}")])
    assert parts(prompt, {"mood": "kind", "word": "hi"}) == [
        [("literal", None, "Be "), ("argument", "mood", "kind"), ("literal", None, ".")],
        [("literal", None, "Say "), ("argument", "word", "hi")],
    ]


def test_content_blocks_are_aligned_one_by_one() -> None:
    hint = {"type": "ephemeral"}
    prompt = ChatPromptTemplate.from_messages(
        [
            (
                "human",
                [
                    {"type": "text", "text": "Use {context}", "cache_control": hint},
                    {"type": "image_url", "image_url": {"url": "data:{context}"}},
                    {"type": "text", "text": "Say {word}"},
                ],
            )
        ]
    )
    assert parts(prompt, {"context": "this", "word": "hi"}) == [
        [("literal", None, "Use "), ("argument", "context", "this")],
        [("literal", None, "Say "), ("argument", "word", "hi")],
    ]


def test_message_objects_in_a_template_are_not_taken_for_template_text() -> None:
    # Their content may be anything, a user's text too: it was never parsed as a template.
    prompt = ChatPromptTemplate.from_messages(
        [SystemMessage("Be kind."), HumanMessage("{hello}"), ("human", "Say {word}")]
    )
    assert parts(prompt, {"word": "hi"}) == [
        [("literal", None, "Say "), ("argument", "word", "hi")]
    ]


def test_a_chat_of_unknown_length_is_aligned_up_to_there() -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be {mood}."), ("human", "Say {word}")])
    serialized = prompt._serialized
    serialized["kwargs"]["messages"].insert(1, {"type": "not_implemented", "repr": "?"})
    rendered = ChatPromptValue(messages=prompt.format_messages(mood="kind", word="hi"))
    found = layouts(serialized, {"mood": "kind", "word": "hi"}, rendered)
    assert [text for text, _ in found] == ["Be kind."]


_pieces = st.text(alphabet="ab{}\n ", max_size=12)


@given(st.lists(st.tuples(_pieces, _pieces), max_size=4), _pieces)
def test_template_text_is_always_word_for_word_from_the_template(
    fields: list[tuple[str, str]], end: str
) -> None:
    def escape(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    names = [f"v{number}" for number in range(len(fields))]
    template = "".join(
        f"{escape(text)}{{{name}}}" for name, (text, _) in zip(names, fields, strict=True)
    )
    values = {name: value for name, (_, value) in zip(names, fields, strict=True)}
    prompt = PromptTemplate.from_template(template + escape(end))
    (found,) = parts(prompt, values)
    wanted: list[Part] = []
    for name, (text, value) in zip(names, fields, strict=True):
        wanted += [("literal", None, text), ("argument", name, value)]
    wanted.append(("literal", None, end))
    assert _joined(found) == _joined(wanted)


def _joined(block: list[Part]) -> list[Part]:
    """Without empty parts, and with neighbouring template text as one."""
    joined: list[Part] = []
    for kind, name, text in block:
        if not text:
            continue
        if joined and kind == joined[-1][0] == "literal":
            joined[-1] = (kind, name, joined[-1][2] + text)
        else:
            joined.append((kind, name, text))
    return joined
