"""Templates take time in proportion to their text and their values, whatever these are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jinja2
import pytest

from growth import growth
from pcache_templates import (
    BraceTemplate,
    FormatTemplate,
    JinjaTemplate,
    MustacheTemplate,
    prompt_program,
)

LINEAR = 8
RUNS = [" ", "\n", "-", "[", "]", "- ", "a"]


@pytest.mark.parametrize("run", [*RUNS, "{", "}", "{ ", "{{"])
def test_a_long_run_in_a_brace_template_takes_linear_time(run: str) -> None:
    def make(chars: int) -> None:
        template = BraceTemplate(f"x{run * (chars // len(run))}")
        assert template.pml
        assert template.render(a="x")

    assert growth(make, 2**18) < LINEAR


@pytest.mark.parametrize("run", [*RUNS, "{{", "}}"])
def test_a_long_run_in_a_format_string_takes_linear_time(run: str) -> None:
    def make(chars: int) -> None:
        template = FormatTemplate(f"x{run * (chars // len(run))}")
        assert template.pml
        assert template.render(a="x")

    assert growth(make, 2**12 if run in ("{{", "}}") else 2**18) < LINEAR


@pytest.mark.parametrize("make", [BraceTemplate, FormatTemplate])
def test_many_fields_of_one_name_are_named_in_linear_time(make: Callable[[str], object]) -> None:
    assert growth(lambda count: make("{a} " * count).pml, 1000) < LINEAR  # type: ignore[attr-defined]


def test_calls_of_a_library_of_macros_take_linear_time() -> None:
    def make(count: int) -> None:
        macros = "".join(f"{{% macro m{i}() %}}x{{% endmacro %}}" for i in range(count))
        environment = jinja2.Environment(loader=jinja2.DictLoader({"lib": macros}))
        calls = "".join(f"{{{{ lib.m{i}() }}}}" for i in range(count))
        source = f"{{% import 'lib' as lib %}}{calls}"
        assert JinjaTemplate(source, environment=environment).pml

    assert growth(make, 100) < LINEAR


@pytest.mark.parametrize("run", [*RUNS, "{", "}", "&", "]]>", "{{ a }}"])
def test_long_values_take_linear_time(run: str) -> None:
    templates = [
        BraceTemplate("From {a}."),
        FormatTemplate("From {a}."),
        JinjaTemplate("From {{ a }}."),
        MustacheTemplate([("literal", "From "), ("no escape", "a"), ("literal", ".")]),
    ]

    def fill(chars: int) -> None:
        value = run * (chars // len(run))
        for template in templates:
            assert template.prompt_pml(a=value)

    assert growth(fill, 2**17) < LINEAR


def test_values_that_imitate_a_program_are_told_apart_in_linear_time() -> None:
    @prompt_program
    def ask(one: Callable[[], str], two: Callable[[], str]) -> Iterator[str]:
        yield f"Q: {one()}\nA: {two()}"

    def run(count: int) -> None:
        text = "\nA:" * count
        assert ask.segments(lambda: text, lambda: "\nA: ")

    assert growth(run, 2**16) < LINEAR
