"""Mustache templates: rendered as LangChain renders them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from langchain_core.utils import mustache

from pcache_core import TemplateError
from pcache_core.pml import parse_prompt, parse_schema, place, resolve
from pcache_templates import Module, MustacheTemplate, Param, Slot, Text

KEYS = ["a", "b", "c", "a.b", ".", "docs", "docs.0"]
values = st.recursive(
    st.text('ΔΘ<&"{}', max_size=4) | st.integers(0, 2) | st.booleans() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3)
    ),
    max_leaves=8,
)
contexts = st.dictionaries(st.sampled_from(["a", "b", "c", "docs"]), values, max_size=4)


@st.composite
def sources(draw: st.DrawFn, depth: int = 3) -> str:
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(KEYS))
        kind = draw(st.integers(0, 6 if depth else 4))
        if kind <= 1:
            parts.append(draw(st.text("xy \n", max_size=4)))
        elif kind <= 4:
            parts.append(
                draw(
                    st.sampled_from(
                        [
                            f"{{{{{key}}}}}",
                            f"{{{{{{{key}}}}}}}",
                            f"{{{{& {key} }}}}",
                            "{{! no }}",
                            "{{> part}}",
                            "{{=<% %>=}}<%a%><%={{ }}=%>",
                        ]
                    )
                )
            )
        else:
            sign = draw(st.sampled_from("#^"))
            body = draw(sources(depth - 1))
            line = draw(st.sampled_from(["", "\n"]))
            parts.append(f"{{{{{sign}{key}}}}}{line}{body}{line}{{{{/{key}}}}}{line}")
    return "".join(parts)


@settings(max_examples=300, deadline=None)
@given(source=sources(), values=contexts)
def test_any_template_renders_as_langchain_does_and_fits_its_schema(
    source: str, values: dict[str, Any]
) -> None:
    template = MustacheTemplate(mustache.tokenize(source))
    try:
        expected = mustache.render(source, values)
    except IndexError:  # LangChain's own renderer can't do a section inside its own inversion
        reject()
    segments = template.segments(**values)
    assert "".join(segment.text for segment in segments) == expected
    assert not any(set(s.text) & set("ΔΘ&<") for s in segments if s.kind == "literal")
    assert not any(set(s.text) & set("xy") for s in segments if s.kind != "literal")
    layout = place(parse_schema(template.pml), lambda text: [0] if text else [])
    if expected:
        prompt = parse_prompt(template.prompt_pml(**values))
        assert resolve(layout, prompt, positions="compact").text == expected


def test_sections_become_slots_and_inverted_ones_modules() -> None:
    source = "Hi {{name}}.{{#docs}}\nDoc: {{text}}\n{{/docs}}\n{{^docs}}None.{{/docs}}"
    template = MustacheTemplate(mustache.tokenize(source))
    assert template.schema.children == (
        Module("text-1", (Text("Hi "), Param("name"), Text("."))),
        Slot("for-docs"),
        Module("for-docs-text-1", (Text("\nDoc: "),)),
        Module("if-not-docs", (Text("None."),)),
    )


def test_what_a_section_goes_through_is_documents_and_what_is_around_it_is_not() -> None:
    template = MustacheTemplate(mustache.tokenize("{{#docs}}{{text}} {{name}}{{/docs}}"))
    segments = template.segments(docs=[{"text": "One."}], name="Ann")
    assert [(s.text, s.kind) for s in segments] == [
        ("One.", "document"),
        (" ", "literal"),
        ("Ann", "argument"),
    ]


@pytest.mark.parametrize("source", ["{{a", "{{#a}}", "{{/a}}", "{{}}"])
def test_a_broken_template_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match="can't be read"):
        MustacheTemplate(mustache.tokenize(source))


def test_a_function_as_a_section_is_refused() -> None:
    template = MustacheTemplate(mustache.tokenize("{{#f}}x{{/f}}"))
    with pytest.raises(TemplateError, match="'f' is a function"):
        template.render(f=lambda text, render: text)
