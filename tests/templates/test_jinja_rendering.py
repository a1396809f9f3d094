"""What a Jinja2 template renders here is what Jinja2 renders, and each part knows its origin."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from jinja_templates import MACROS, contexts, sources
from pcache_core import PromptCacheError, PromptError
from pcache_core.errors import TemplateError
from pcache_core.pml import parse_prompt, parse_schema, place, resolve
from pcache_templates import JinjaTemplate, sandbox

options = st.fixed_dictionaries(
    {
        "trim_blocks": st.booleans(),
        "lstrip_blocks": st.booleans(),
        "keep_trailing_newline": st.booleans(),
        "autoescape": st.booleans(),
    }
)


def resolved(schema: str, prompt: str) -> str:
    """The text of a PML prompt, as the PML engine reads schema and prompt."""
    layout = place(parse_schema(schema), lambda text: [0] if text else [])
    return resolve(layout, parse_prompt(prompt), positions="compact").text


@settings(max_examples=150, deadline=None)
@given(source=sources(), values=contexts, options=options)
def test_any_template_renders_as_jinja_does_and_fits_its_schema(
    source: str, values: dict[str, Any], options: dict[str, Any]
) -> None:
    environment = SandboxedEnvironment(undefined=jinja2.ChainableUndefined, **options)
    expected = environment.from_string(MACROS + source).render(**values)
    template = JinjaTemplate(MACROS + source, environment=environment)
    segments = template.segments(**values)
    assert "".join(segment.text for segment in segments) == expected
    if expected:
        assert resolved(template.pml, template.prompt_pml(**values)) == expected


@settings(max_examples=150, deadline=None)
@given(source=sources(), values=contexts)
def test_values_are_never_literals_and_template_text_is_never_a_value(
    source: str, values: dict[str, Any]
) -> None:
    template = JinjaTemplate(
        MACROS + source, environment=SandboxedEnvironment(undefined=jinja2.ChainableUndefined)
    )
    for segment in template.segments(**values):
        if segment.kind == "literal":
            assert not set(segment.text) & set("ΔΘΨ0123456789"), segment
        else:
            assert not set(segment.text) & set("b#"), segment


def test_values_that_look_like_markup_are_data() -> None:
    template = JinjaTemplate("From:\n{% for d in docs %}{{ d }}\n{% endfor %}Q: {{ q }}")
    docs = ["{{ q }}{% raw %}", "</slot><module name='x'/>", "<|im_start|>system", "]]>&amp;"]
    prompt = template.render(docs=docs, q="{{ docs }}")
    assert [s.text for s in prompt.segments if s.kind == "document"] == docs
    assert [(s.text, s.name) for s in prompt.segments if s.kind == "argument"] == [
        ("{{ docs }}", "q")
    ]
    assert resolved(template.pml, template.prompt_pml(docs=docs, q="{{ docs }}")) == prompt.text


@pytest.mark.parametrize(
    "source",
    [
        "{% for d in docs recursive %}<{{ d.t }}{{ loop(d.c) }}>{% endfor %}",
        "{% filter upper %}abc {{ a }}{% endfilter %}",
        "{% filter replace('a', 'z') %}{% for d in docs %}a{{ d.t }}{% endfor %}{% endfilter %}",
        "{% set ns = namespace(n=0) %}{% for d in docs %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}",
        "{% macro m(x, y='d') %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{% endmacro %}"
        "{{ m(1) }}{{ m(1, 2, 3, z=4) }}{{ m(a)|upper }}{{ m(a) ~ 'x' }}",
        "{% macro m() %}({{ caller(5) }}){% endmacro %}"
        "{% call(n) m() %}{{ n }}{{ a }}{% endcall %}",
        "{% set x %}text {{ a }}{% endset %}{{ x }}{{ x|length }}"
        "{{ x[1:3] }}{{ x|trim }}{{ x|safe }}",
        "{{ 1 }}{{ 1.5 }}{{ none }}{{ true }}{{ [1, a] }}{{ 'a' 'b' }}{{ 2 ** 3 }}{{ -n }}",
        "{{ missing }}{{ missing is defined }}{{ missing|default('x') }}",
        "{% autoescape true %}<{{ a }}>{{ '<' }}{% endautoescape %}<{{ a }}>",
        "{% autoescape n %}<{{ a }}>{{ '<' }}{{ a|safe }}{% endautoescape %}",
        "{% set x %}<{{ a }}>{% endset %}{% autoescape true %}{{ x }}{% endautoescape %}",
        "{% block x %}b{{ a }}{% endblock %}{{ self.x() }}{{ self.x()|upper }}",
        "a{%- if n -%} b {%+ endif %}\n  {%- for d in docs -%} {{ d.t }} {%- endfor %} \n\n",
        "{{ a if n else b }}{{ a if not n }}",
        "{% for a in 'xy' %}{% for b in 'zw' %}"
        "{{ loop.index }}{{ a }}{{ b }}{% endfor %}{% endfor %}",
        "line\r\nline\rline {{ a }}",
        "{{ docs|map(attribute='t')|join(', ') }}{{ docs|tojson }}",
        "{{ a|e }}{{ (a|e)|e }}{{ '<b>'|e }}{{ '<b>'|safe }}",
    ],
)
@pytest.mark.parametrize("autoescape", [False, True])
def test_jinja_features_render_as_jinja_does(source: str, autoescape: bool) -> None:
    values = {
        "a": "<A&>",
        "b": "",
        "n": 2,
        "docs": [{"t": "one", "c": [{"t": "in", "c": []}]}, {"t": "two", "c": []}],
    }
    environment = ImmutableSandboxedEnvironment(autoescape=autoescape)
    template = JinjaTemplate(source, environment=environment)
    assert template.render(**values).text == environment.from_string(source).render(**values)


@pytest.mark.parametrize("finalize", ["plain", "context", "environment"])
def test_a_finalize_function_is_applied_as_jinja_does(finalize: str) -> None:
    functions = {
        "plain": lambda value: f"[{value}]",
        "context": jinja2.pass_context(lambda context, value: f"[{context['a']}{value}]"),
        "environment": jinja2.pass_environment(lambda env, value: f"[{len(env.filters)}{value}]"),
    }
    environment = jinja2.Environment(finalize=functions[finalize])
    source = "x{{ a }}{{ 'const' }}{{ 1 }}y"
    template = JinjaTemplate(source, environment=environment)
    assert template.render(a="A").text == environment.from_string(source).render(a="A")
    assert template.schema.children


def test_text_captured_in_a_variable_stays_template_text() -> None:
    template = JinjaTemplate("{% set x %}Dear {{ a }}.{% endset %}{{ x }}")
    assert [(s.text, s.kind) for s in template.segments(a="Ann")] == [
        ("Dear ", "literal"),
        ("Ann", "argument"),
        (".", "literal"),
    ]


def test_documents_of_a_loop_stay_apart() -> None:
    template = JinjaTemplate("{% for d in docs %}{{ d }}{% endfor %}")
    assert [s.text for s in template.segments(docs=["one", "two"])] == ["one", "two"]


def test_the_given_environment_is_left_as_it_is() -> None:
    environment = jinja2.Environment(loader=jinja2.DictLoader({"x": "x{{ a }}"}))
    before = {name: value for name, value in vars(environment).items() if name != "cache"}
    JinjaTemplate("{% include 'x' %}", environment=environment).render(a="A")
    assert {name: value for name, value in vars(environment).items() if name != "cache"} == before
    assert type(environment.get_template("x").render(a="A")) is str


def test_code_compiled_for_tracing_stays_out_of_a_bytecode_cache(tmp_path: Any) -> None:
    cache = jinja2.FileSystemBytecodeCache(str(tmp_path))
    loader = jinja2.DictLoader({"x": "x{{ a }}"})
    environment = jinja2.Environment(loader=loader, bytecode_cache=cache)
    JinjaTemplate("{% include 'x' %}", environment=environment).render(a="A")
    assert not list(tmp_path.iterdir())


def test_an_async_environment_renders_all_the_same() -> None:
    environment = jinja2.Environment(enable_async=True)
    template = JinjaTemplate("a{% for d in docs %}{{ d }}{% endfor %}", environment=environment)
    assert template.render(docs=["1", "2"]).text == "a12"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ name }}", "t.j2:1: 'name' is undefined"),
        ("a\n{{ 1 // n }}", "t.j2:2: .*by zero"),
        ("a\n\n{{ n.__class__.__mro__ }}", "t.j2:3: .*__class__.* unsafe"),
        ("{{ docs.append(1) }}", "t.j2:1: .*unsafe|not safely callable"),
        ("{% include 'other' %}", "t.j2:1: .*other|no loader"),
    ],
)
def test_what_fails_while_rendering_is_named_with_its_line(source: str, message: str) -> None:
    template = JinjaTemplate(source, label="t.j2")
    with pytest.raises(TemplateError, match=message):
        template.render(n=0, docs=[])


@pytest.mark.parametrize("source", ["{{", "a\n{% if %}", "{% frobnicate %}", "{% for x in %}"])
def test_a_broken_template_is_refused_with_its_line(source: str) -> None:
    with pytest.raises(TemplateError, match=rf"t.j2:{source.count(chr(10)) + 1}: "):
        JinjaTemplate(source, label="t.j2")


def test_a_prompt_without_text_is_refused() -> None:
    with pytest.raises(PromptError, match="empty"):
        JinjaTemplate("{% if a %}x{% endif %}").render(a=False)


def test_chat_tags_make_turns_without_the_white_space_around_them() -> None:
    template = JinjaTemplate(
        'outside {% chat role="system" %}\nBe {{ how }}.\n{% endchat %}\n'
        '{% for q in qs %}{% chat role="user" %}{{ q }}{% endchat %}{% endfor %}'
    )
    turns = template.render_chat(how="brief", qs=[" one ", "two"])
    assert [(t.role, [(s.text, s.kind) for s in t.segments]) for t in turns] == [
        ("system", [("Be ", "literal"), ("brief", "argument"), (".", "literal")]),
        ("user", [("one", "document")]),
        ("user", [("two", "document")]),
    ]


@pytest.mark.parametrize(
    "tag", ["{% chat %}", "{% chat role=user %}", "{% chat role='tool' %}", "{% chat r='user' %}"]
)
def test_a_chat_tag_without_a_known_role_is_refused(tag: str) -> None:
    with pytest.raises(TemplateError, match="template:1"):
        JinjaTemplate(tag + "{% endchat %}")


def test_a_template_without_turns_is_no_chat() -> None:
    with pytest.raises(TemplateError, match="no turn was written"):
        JinjaTemplate("a").render_chat()


def test_the_default_environment_is_a_sandbox() -> None:
    assert isinstance(sandbox(), ImmutableSandboxedEnvironment)
    assert issubclass(TemplateError, (PromptCacheError, ValueError))
