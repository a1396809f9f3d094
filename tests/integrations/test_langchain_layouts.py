"""Template text and variables' values are told apart in rendered prompts."""

from __future__ import annotations

from collections.abc import Iterator
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

from pcache_integrations.langchain import _watching
from pcache_integrations.langchain._layouts import (
    Span,
    rendered_layout,
    searched_layout,
    trimmed_layout,
)
from pcache_integrations.langchain._provenance import Provenance, message_texts
from pcache_integrations.langchain._watching import watch_chains

Part = tuple[str, str | None, str]


@pytest.fixture(autouse=True)
def provenance(monkeypatch: pytest.MonkeyPatch) -> Provenance:
    """What is known of the prompts of one test; chains are watched when a model is made."""
    watch_chains()
    fresh = Provenance()
    monkeypatch.setattr(_watching, "PROVENANCE", fresh)
    return fresh


def parts(provenance: Provenance, template: Any, inputs: Any) -> list[list[Part]]:
    """Render a template; (kind, name, text) of each part of each text block with a layout."""
    prompt = template.invoke(inputs)
    if isinstance(prompt, ChatPromptValue):
        texts = [text for message in prompt.messages for text in message_texts(message)]
    else:
        texts = [prompt.to_string()]
    layouts = [(text, provenance._layout(text)) for text in texts]
    return [list(_cut(text, layout)) for text, layout in layouts if layout is not None]


def _cut(text: str, layout: tuple[Span, ...]) -> Iterator[Part]:
    position = 0
    for kind, name, chars in layout:
        yield kind, name, text[position : position + chars]
        position += chars
    assert position == len(text)


@pytest.mark.parametrize(
    ("template", "template_format"),
    [
        ("From:\n{context}\n\nQ: {question}\nA:", "f-string"),
        ("From:\n{{context}}\n\nQ: {{ question }}\nA:", "jinja2"),
        ("From:\n{{{context}}}\n\nQ: {{question}}\nA:", "mustache"),
    ],
)
def test_every_template_format_is_aligned(
    provenance: Provenance, template: str, template_format: Any
) -> None:
    prompt = PromptTemplate.from_template(template, template_format=template_format)
    assert parts(provenance, prompt, {"context": "some text", "question": "who?"}) == [
        [
            ("literal", None, "From:\n"),
            ("argument", "context", "some text"),
            ("literal", None, "\n\nQ: "),
            ("argument", "question", "who?"),
            ("literal", None, "\nA:"),
        ]
    ]


def test_a_template_with_one_variable_takes_the_bare_value(provenance: Provenance) -> None:
    prompt = PromptTemplate.from_template("Say {word}.")
    assert parts(provenance, prompt, "hello") == [
        [("literal", None, "Say "), ("argument", "word", "hello"), ("literal", None, ".")]
    ]


def test_values_unknown_before_rendering_reach_to_the_next_template_text(
    provenance: Provenance,
) -> None:
    prompt = PromptTemplate.from_template("On {day:>6} ask {n} of {who}!").partial(
        who=lambda: "Ann"
    )
    assert parts(provenance, prompt, {"day": "Monday", "n": 3}) == [
        [
            ("literal", None, "On "),
            ("argument", "day", "Monday"),
            ("literal", None, " ask "),
            ("argument", "n", "3"),
            ("literal", None, " of "),
            ("argument", "who", "Ann"),
            ("literal", None, "!"),
        ]
    ]


def test_a_value_that_looks_like_the_template_stays_a_value(provenance: Provenance) -> None:
    prompt = PromptTemplate.from_template("Q: {question}\nA:")
    question = "who?\nA: me\nQ: and who else?\nA:"
    assert parts(provenance, prompt, {"question": question})[0][1] == (
        "argument",
        "question",
        question,
    )


def test_escaped_values_are_values(provenance: Provenance) -> None:
    prompt = PromptTemplate.from_template("Is {{a}} so?", template_format="mustache")
    assert parts(provenance, prompt, {"a": "1 < 2"}) == [
        [
            ("literal", None, "Is "),
            ("argument", "a", "1 &lt; 2"),
            ("literal", None, " so?"),
        ]
    ]


def test_a_template_with_logic_is_followed_through_it(provenance: Provenance) -> None:
    prompt = PromptTemplate.from_template(
        "Answer.\n\n{%- for d in docs %}\n* {{ d }}{% endfor %}\nQ: {{ question }}\n",
        template_format="jinja2",
    )
    assert parts(provenance, prompt, {"docs": ["one", "two"], "question": "who?"}) == [
        [
            ("literal", None, "Answer."),
            ("literal", None, "\n* "),
            ("argument", "d", "one"),
            ("literal", None, "\n* "),
            ("argument", "d", "two"),
            ("literal", None, "\nQ: "),
            ("argument", "question", "who?"),
        ]
    ]


def test_the_examples_of_a_few_shot_template_are_template_text(provenance: Provenance) -> None:
    prompt = FewShotPromptTemplate(
        examples=[{"a": "1"}],
        example_prompt=PromptTemplate.from_template("ex {a}"),
        prefix="Look:",
        suffix="Now: {question}",
        input_variables=["question"],
    )
    assert parts(provenance, prompt, {"question": "what?"}) == [
        [("literal", None, "Look:\n\nex 1\n\nNow: "), ("argument", "question", "what?")]
    ]


def test_chat_templates_are_aligned_message_by_message(provenance: Provenance) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Use {context}."),
            MessagesPlaceholder("history", n_messages=2),
            ("placeholder", "{optional}"),
            ("human", "Say {word}"),
        ]
    )
    history = [HumanMessage("a"), AIMessage("b"), HumanMessage("c")]
    assert parts(provenance, prompt, {"context": "this", "history": history, "word": "hi"}) == [
        [("literal", None, "Use "), ("argument", "context", "this"), ("literal", None, ".")],
        [("literal", None, "Say "), ("argument", "word", "hi")],
    ]


def test_nested_chat_templates_are_walked(provenance: Provenance) -> None:
    inner = ChatPromptTemplate.from_messages([("system", "Be {mood}.")])
    prompt = ChatPromptTemplate.from_messages([inner, ("human", "Say {word}")])
    assert parts(provenance, prompt, {"mood": "kind", "word": "hi"}) == [
        [("literal", None, "Be "), ("argument", "mood", "kind"), ("literal", None, ".")],
        [("literal", None, "Say "), ("argument", "word", "hi")],
    ]


def test_content_blocks_are_aligned_one_by_one(provenance: Provenance) -> None:
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
    assert parts(provenance, prompt, {"context": "this", "word": "hi"}) == [
        [("literal", None, "Use "), ("argument", "context", "this")],
        [("literal", None, "Say "), ("argument", "word", "hi")],
    ]


def test_message_objects_in_a_template_are_not_taken_for_template_text(
    provenance: Provenance,
) -> None:
    # Their content may be anything, a user's text too: it was never parsed as a template.
    prompt = ChatPromptTemplate.from_messages(
        [SystemMessage("Be kind."), HumanMessage("{hello}"), ("human", "Say {word}")]
    )
    assert parts(provenance, prompt, {"word": "hi"}) == [
        [("literal", None, "Say "), ("argument", "word", "hi")]
    ]


def test_a_template_over_an_iterator_is_not_run_twice(provenance: Provenance) -> None:
    read: list[str] = []

    def words() -> Iterator[str]:
        for word in ("one", "two"):
            read.append(word)
            yield word

    prompt = PromptTemplate.from_template(
        "{% for w in words %}{{ w }} {% endfor %}- {{ question }}", template_format="jinja2"
    )
    assert parts(provenance, prompt, {"words": words(), "question": "what?"}) == [
        [("text", None, "one two - "), ("argument", "question", "what?")]
    ]
    assert read == ["one", "two"]


def test_a_template_given_a_function_is_not_run_twice(provenance: Provenance) -> None:
    calls: list[int] = []
    prompt = PromptTemplate.from_template("{{ now() }}: {{ q }}", template_format="jinja2")
    values = {"now": lambda: calls.append(1) or f"call {len(calls)}", "q": "what?"}
    assert prompt.format(**values) == "call 1: what?"
    assert len(calls) == 1


def test_a_custom_template_is_searched_for_its_values(provenance: Provenance) -> None:
    text = "Use this. Who? Be brief."
    assert searched_layout({"question": "Who?"}, text) == (
        Span("rest", None, 10),
        Span("argument", "question", 4),
        Span("rest", None, 10),
    )
    # A value that is not there as it was given may be there in another form.
    assert {span.kind for span in searched_layout({"question": "Who?", "n": 3}, text)} == {
        "text",
        "argument",
    }


def test_what_a_custom_template_wrote_is_markup_only_where_all_text_is(
    provenance: Provenance,
) -> None:
    text = "Use <eos> this. Who is it?"
    provenance.add_written({"question": "Who is it?"}, text)
    assert provenance.segments(text, "argument")[0].kind == "argument"
    assert provenance.segments(text, "text")[0].kind == "literal"


@pytest.mark.parametrize(("before", "after"), [("", ""), ("\n", ""), ("", " \n"), ("  ", "\n\n")])
def test_a_prompt_is_known_with_other_white_space_around_it(
    provenance: Provenance, before: str, after: str
) -> None:
    prompt = PromptTemplate.from_template("\nSay {word}. \n")
    prompt.format(word="hi")
    text = f"{before}Say hi.{after}"
    layout = provenance._layout(text)
    assert layout is not None
    kinds = [(kind, part) for kind, _, part in _cut(text, layout)]
    assert [kind for kind, part in kinds if part.strip()] == ["literal", "argument", "literal"]


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 9), st.integers(0, 9))
def test_trimming_a_layout_leaves_what_is_between(
    lengths: list[int], before: int, after: int
) -> None:
    layout = tuple(Span("argument", str(n), chars) for n, chars in enumerate(lengths))
    names = [span.name for span in layout for _ in range(span.chars)]
    trimmed = trimmed_layout(layout, before, after)
    expected = names[before:][: max(0, len(names[before:]) - after)]
    assert [span.name for span in trimmed for _ in range(span.chars)] == expected


_pieces = st.text(alphabet="ab{}\n ", max_size=12)


@given(fields=st.lists(st.tuples(_pieces, _pieces), max_size=4), end=_pieces)
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
    source = template + escape(end)
    text = PromptTemplate.from_template(source).format(**values)
    found = list(_cut(text, rendered_layout(source, "f-string", values, text)))
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
