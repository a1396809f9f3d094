"""Format strings and brace templates: rendered as Python and LlamaIndex render them."""

from __future__ import annotations

from datetime import date
from string import Formatter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.prompts.utils import format_string

from pcache_core import TemplateError
from pcache_core.pml import parse_prompt, parse_schema, place, resolve
from pcache_templates import BraceTemplate, FormatTemplate, Module, Param, Text

VALUES = {"a": "{b}", "b": "x{{", "n": 3.14159, "d": {"k": ["v", "w"]}, "width": 7}
pieces = st.sampled_from(
    ["{a}", "{b}", "{n:.2f}", "{a!r}", "{d[k][1]}", "{n:{width}}", "{{", "}}", "text ", "\r\n", "Δ"]
)
braces = st.text("{}ab \n", max_size=12) | st.sampled_from(['{"a": 1}', "{{a}}", "{a.b}", "{ a }"])


@given(source=st.lists(pieces, max_size=8).map("".join))
def test_a_format_template_renders_as_python_formats(source: str) -> None:
    template = FormatTemplate(source)
    expected = Formatter().vformat(source, (), VALUES)
    assert "".join(s.text for s in template.segments(**VALUES)) == expected
    layout = place(parse_schema(template.pml), lambda text: [0] if text else [])
    if expected:
        prompt = parse_prompt(template.prompt_pml(**VALUES))
        assert resolve(layout, prompt, positions="compact").text == expected


@given(source=st.lists(braces, max_size=4).map("".join))
def test_a_brace_template_renders_as_llama_index_formats(source: str) -> None:
    values: dict[str, Any] = {"a": "{b}", "b": "x{{"}
    template = BraceTemplate(source)
    assert "".join(s.text for s in template.segments(**values)) == format_string(source, **values)
    assert template.pml


def test_fields_are_parameters_and_escaped_braces_text() -> None:
    template = FormatTemplate("{{{a}}} and {d[k][0]}: {a!r:>4}", lengths={"a": 8})
    assert template.schema.children == (
        Module(
            "text-1",
            (
                Text("{"), Param("a", 8), Text("}"), Text(" and "), Param("d-k-0", 64),
                Text(": "), Param("a-2", 8),
            ),
        ),
    )  # fmt: skip


def test_json_and_unknown_names_stay_text_in_a_brace_template() -> None:
    template = BraceTemplate('{"k": 1} {a} {c}')
    assert [(s.text, s.kind) for s in template.segments(a="A")] == [
        ('{"k": 1} ', "literal"),
        ("A", "argument"),
        (" ", "literal"),
        ("{c}", "literal"),
    ]
    assert template.schema.children == (
        Module("text-1", (Text('{"k": 1}'), Text(" "), Param("a"), Text(" "), Param("c"))),
    )


@pytest.mark.parametrize("source", ["{", "a}", "{a", "{}", "{0}", "{a!x}"])
def test_a_broken_format_string_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match="can't be read|without a name|can't be filled"):
        FormatTemplate(source).render(a=1)


@pytest.mark.parametrize(
    ("source", "values"), [("{a}", {}), ("{a:d}", {"a": "x"}), ("{a.b}", {"a": 1})]
)
def test_a_field_that_can_not_be_filled_is_named(source: str, values: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match=r"the field \{a.* can't be filled"):
        FormatTemplate(source).render(**values)


@pytest.mark.parametrize(
    "source",
    [
        'Answer as JSON: {"name": "x"}\nQ: {question}',
        "{'a': 1}",
        '{\n  "a": 1\n}',
        "{ name }",
        "{a, b}",
        "function f() { return x; }",
        "a {{b}} {c {{d}}",
        "{[0]}",
        "{a.}",
    ],
)
def test_braces_that_hold_no_name_are_refused_with_a_way_out(source: str) -> None:
    with pytest.raises(TemplateError, match="write {{ and }} for braces"):
        FormatTemplate(source)


@pytest.mark.parametrize("source", ["a {color:red}", "{x: y}", "{a:1px solid}"])
def test_braces_that_no_value_of_pythons_own_fills_make_no_schema(source: str) -> None:
    with pytest.raises(TemplateError, match="is not a field; write {{ and }} for braces"):
        assert FormatTemplate(source).pml


def test_a_type_of_ones_own_may_know_its_format() -> None:
    class Moment:
        def __format__(self, spec: str) -> str:
            return spec.replace("YYYY", "2024")

    assert FormatTemplate("In {when:YYYY-MM}.").render(when=Moment()).text == "In 2024-MM."


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("{user question}", "Who?"),
        ("{chat-history}", "…"),
        ("{größe}", "12"),
        ("{x: >+08.2f}", 1.5),
        ("{x:_>10,.1f}", 1234.5),
        ("{x:#06x}", 17),
        ("{x:%d %B}", date(2024, 5, 1)),
        ("{x!r:>{x}}", 4),
    ],
)
def test_fields_that_python_fills_are_parameters(field: str, value: object) -> None:
    name = field.strip("{}").partition(":")[0].partition("!")[0]
    template = FormatTemplate(f"a {field}")
    assert template.render(**{name: value}).text == f"a {field}".format(**{name: value})
    (module,) = template.schema.children
    assert isinstance(module, Module)
    assert [type(node) for node in module.children] == [Text, Param]
