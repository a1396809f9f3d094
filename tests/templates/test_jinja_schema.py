"""What of a Jinja2 template becomes what in a schema, and under which name."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
from lxml import etree

from pcache_core import OptionError, PMLError, TemplateError
from pcache_core.pml import parse_prompt, parse_schema, place, resolve
from pcache_templates import JinjaTemplate, Module, Param, Slot, Text, Union

N = Module  # short, for trees that are read as a whole


def tree(source: str, **templates: str) -> tuple[object, ...]:
    environment = jinja2.Environment(loader=jinja2.DictLoader(templates))
    return JinjaTemplate(source, environment=environment).schema.children


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a\n{# no #} b", (N("text-1", (Text("a\n"), Text(" b"))),)),
        ("{% raw %}{{ x }}{% endraw %}", (N("text-1", (Text("{{ x }}"),)),)),
        ("{{ '{{' }}", (N("text-1", (Text("{{"),)),)),
        ("Hi {{ x }}!", (N("text-1", (Text("Hi "), Param("x"), Text("!"))),)),
        ("{{ x }}{{ x }}", (N("text-1", (Param("x"), Param("x-2"))),)),
        ("a {%- if x %} b {%- endif %}", (N("text-1", (Text("a"),)), N("if-x", (Text(" b"),)))),
        (
            "{% if x %}a{% elif y == 3 %}b{% else %}c{% endif %}",
            (
                Union(
                    (
                        N("if-x", (Text("a"),)),
                        N("if-y-eq-3", (Text("b"),)),
                        N("else", (Text("c"),)),
                    )
                ),
            ),
        ),
        ("{% if x %}{% else %}c{% endif %}", (N("else", (Text("c"),)),)),
        ("{% if x %}{% set y = 1 %}{% endif %}", ()),
        (
            "{% if x %}a{% if y %}b{% endif %}{{ c }}{% endif %}",
            (
                N(
                    "if-x",
                    (
                        N("text-1", (Text("a"),)),
                        N("if-y", (Text("b"),)),
                        N("text-2", (Param("c"),)),
                    ),
                ),
            ),
        ),
        (
            "{% for d in docs %}Document: {{ d.t }}\n- {% else %}none{% endfor %}",
            (
                Slot("for-d"),
                N("for-d-text-1", (Text("Document: "),)),
                N("else", (Text("none"),)),
            ),
        ),
        (
            "{% for a, b in x %}{% if loop.first %}one{% else %}two{% endif %}{{ b }}{% endfor %}",
            (
                Slot("for-a-b"),
                N("for-a-b-text-1", (Text("one"),)),
                N("for-a-b-text-2", (Text("two"),)),
            ),
        ),
        (
            "{% for d in docs %}By {{ d.a }}, By {{ d.b }}{{ 'By ' }}{% endfor %}",
            (
                Slot("for-d"),
                N("for-d-text-1", (Text("By "),)),
                N("for-d-text-2", (Text(", By "),)),
            ),
        ),
        (
            "{% macro m(x) %}<{{ x }}>{{ caller() }}{% endmacro %}{% call m(1) %}in{% endcall %}",
            (
                N(
                    "call-m",
                    (
                        N("text-1", (Text("<"), Param("x"), Text(">"))),
                        N("caller", (Text("in"),)),
                    ),
                ),
            ),
        ),
        ("{% filter upper %}a{{ b }}{% endfilter %}", (N("text-1", (Param("filter-upper"),)),)),
        ("{% set x %}a{% endset %}{{ x }}", (N("text-1", (Param("x"),)),)),
        ("{% with y = 1 %}a{{ y }}{% endwith %}", (N("text-1", (Text("a"), Param("y"))),)),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", (N("call-m", (Param("m"),)),)),
    ],
)
def test_each_statement_becomes_its_counterpart(source: str, expected: tuple[object, ...]) -> None:
    assert tree(source) == expected


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("user.name", "user.name"),
        ("user['first name']", "user.first-name"),
        ("docs[0]", "docs.0"),
        ("date | strftime('%d')", "date-d-strftime"),
        ("a if b else c", "b-a-c"),
        ("x ~ y", "x-y"),
        ("f(x, y=2)", "f-x-2"),
        ("naïve", "naïve"),
        ("[1][n]", "_1-n"),
        ("xmlns", "_xmlns"),
        ("'%s' % _", "s-_"),
        ("a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r.s.t.u", "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r.s.t"),
    ],
)
def test_an_expression_is_a_parameter_with_a_name_that_tells_it(expression: str, name: str) -> None:
    environment = jinja2.Environment()
    environment.filters["strftime"] = str
    template = JinjaTemplate("{{ " + expression + " }}", environment=environment)
    assert template.schema.children == (Module("text-1", (Param(name),)),)
    assert parse_schema(template.pml).children[0].children[0].name == name  # type: ignore[union-attr]


TEMPLATES = {
    "base.j2": "Start {% block body %}base{% endblock %} end.{% block foot %}foot{% endblock %}",
    "mid.j2": "{% extends 'base.j2' %}{% block foot %}mid, {{ super() }}{% endblock %}",
    "head.j2": "Head {{ a }}.",
    "lib.j2": "{% macro m(x) %}[{{ x }}]{% endmacro %}",
    "loop.j2": "{% if a %}{% include 'loop.j2' %}{% endif %}",
}


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("{% include 'head.j2' %}!", ["include-head.j2: Head <a>.", "text-1: !"]),
        (
            "{% include 'head.j2' %}{% include 'head.j2' %}",
            ["include-head.j2: Head <a>.", "include-head.j2-2: Head <a>."],
        ),
        ("{% include 'none' ignore missing %}x", ["text-1: x"]),
        ("{% include ['none', 'head.j2'] %}", ["include-head.j2: Head <a>."]),
        ("{% import 'lib.j2' as l %}{{ l.m(a) }}", ["call-m: [<x>]"]),
        ("{% from 'lib.j2' import m as n %}{{ n(a) }}", ["call-m: [<x>]"]),
        (
            "{% extends 'mid.j2' %}lost{% block body %}own {{ a }}{% endblock %}",
            [
                "text-1: Start ",
                "block-body: own <a>",
                "text-2:  end.",
                "text-3: mid, ",
                "super-foot: foot",
            ],
        ),
        (
            "{% extends 'base.j2' %}",
            ["text-1: Start ", "block-body: base", "text-2:  end.", "block-foot: foot"],
        ),
    ],
)
def test_other_templates_are_followed(source: str, texts: list[str]) -> None:
    environment = jinja2.Environment(loader=jinja2.DictLoader(TEMPLATES))
    template = JinjaTemplate(source, environment=environment)
    found = [
        f"{node.name}: " + "".join(c.text if isinstance(c, Text) else f"<{c.name}>" for c in leaves)
        for node in template.schema
        if isinstance(node, Module)
        and (leaves := [c for c in node.children if isinstance(c, Text | Param)])
    ]
    assert found == texts
    expected = environment.from_string(source).render(a="A")
    assert template.render(a="A").text == expected
    assert all(segment.name for segment in template.segments(a="A"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% include name %}", "t.j2:2: include computes the template's name"),
        ("{% extends name %}", "t.j2:1: extends computes the template's name"),
        ("{% if a %}{% extends 'base.j2' %}{% endif %}", "t.j2:1: extends stands in a condition"),
        ("{% include 'none' %}", "t.j2:1: there is no template 'none'"),
        ("{% include 'loop.j2' %}", "includes or extends itself"),
        ("\n\n{% shout %}a{% endshout %}", "t.j2:3: the tag of Shout has no counterpart in PML"),
        ("a\fb", r"'a\\x0cb' holds U\+000C, which XML can't hold"),
    ],
)
def test_what_no_schema_can_express_is_refused_and_still_rendered(
    source: str, message: str
) -> None:
    environment = jinja2.Environment(loader=jinja2.DictLoader(TEMPLATES), extensions=[Shout])
    template = JinjaTemplate(source, environment=environment, label="t.j2")
    with pytest.raises(TemplateError, match=message):
        assert template.pml
    if "none" not in source:
        expected = environment.from_string(source).render(name="head.j2")
        assert "".join(s.text for s in template.segments(name="head.j2")) == expected


class Shout(jinja2.ext.Extension):
    """A tag that schemas know nothing of."""

    tags = {"shout"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endshout",), drop_needle=True)
        call = self.call_method("_shout")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _shout(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller()).upper()


def test_macros_that_would_write_without_end_are_refused() -> None:
    macros = "".join(
        f"{{% macro m{i}() %}}{{{{ m{i + 1}() }}}}{{{{ m{i + 1}() }}}}{{% endmacro %}}"
        for i in range(40)
    )
    template = JinjaTemplate(macros + "{% macro m40() %}x{% endmacro %}{{ m0() }}")
    with pytest.raises(TemplateError, match="over 20,000 parts"):
        assert template.schema


def test_a_template_that_nests_too_deeply_is_refused() -> None:
    with pytest.raises(TemplateError, match="nests too deeply"):
        assert JinjaTemplate("{% if a %}" * 5000 + "{% endif %}" * 5000).schema


def test_lengths_are_set_by_name_and_must_be_known() -> None:
    template = JinjaTemplate("{{ a }}{{ b }}", lengths={"b": 7})
    assert template.schema.children == (Module("text-1", (Param("a", 64), Param("b", 7))),)
    with pytest.raises(OptionError, match="'c', which is no parameter of the template; it has a"):
        assert JinjaTemplate("{{ a }}", lengths={"c": 1}).schema
    with pytest.raises(OptionError, match="must be a number of tokens, got 0"):
        assert JinjaTemplate("{{ a }}", lengths={"a": 0}).schema


def test_schemas_are_well_formed_whatever_the_text_holds() -> None:
    text = "<module name='x'> & ]]> \r\n\t &#1; {{ a }}"
    pml = JinjaTemplate(text, name="1 <&> schema").pml
    root = etree.fromstring(pml.encode())
    assert root.get("name") == "_1-schema"
    assert root[0].text == "<module name='x'> & ]]> \n\t &#1; "


def test_a_schema_is_called_by_its_content_or_as_asked() -> None:
    assert JinjaTemplate("a").schema.name == JinjaTemplate("a").schema.name
    assert JinjaTemplate("a").schema.name != JinjaTemplate("b").schema.name
    assert JinjaTemplate("a", name="mine").schema.name == "mine"


def test_files_include_from_their_own_folder_and_no_other(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.j2").write_text("secret")
    (inside / "part.j2").write_text("part")
    (inside / "link.j2").symlink_to(outside / "secret.j2")
    for name, works in [("part.j2", True), ("link.j2", False), ("../outside/secret.j2", False)]:
        (inside / "main.pml.j2").write_text(f"a {{% include '{name}' %}}")
        template = JinjaTemplate.from_file(inside / "main.pml.j2")
        assert works == (not _fails(lambda t=template: t.pml))
        assert works == (not _fails(lambda t=template: t.render()))
    assert template._name == "main"


def _fails(action: object) -> bool:
    try:
        action()  # type: ignore[operator]
    except TemplateError:
        return True
    return False


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.j2"
    if content:
        path.write_bytes(content)
    with pytest.raises(TemplateError, match="x.j2: .*(No such file|UTF-8)"):
        JinjaTemplate.from_file(path)


def test_chat_tags_become_roles_and_what_is_around_them_nothing() -> None:
    template = JinjaTemplate(
        'out {% chat role="system" %}\n{# no #} Be {{ a }}\n{% endchat %}{% if b %}x'
        '{% chat role="user" %}hi{% endchat %}{% endif %}'
    )
    schema = parse_schema(template.pml)
    assert [type(node).__name__ for node in schema.children] == ["Role", "Module"]
    assert template.pml == template.pml.replace("out", "")


def test_a_loops_slot_takes_a_length_and_has_its_positions_then() -> None:
    source = "{% for item in items %}{{ item }}\n{% endfor %}{{ question }}"
    values = {"items": ["Ada.", "Bo."], "question": "Who?"}
    open_slot = JinjaTemplate(source, name="t")
    prompt = parse_prompt(open_slot.prompt_pml(**values))
    with pytest.raises(PMLError, match="slot 'for-item' has no max-tokens"):
        resolve(place(parse_schema(open_slot.pml), list), prompt)
    sized = JinjaTemplate(source, name="t", lengths={"for-item": 64})
    assert sized.schema.children[0] == Slot("for-item", 64)
    layout = place(parse_schema(sized.pml), list)
    resolution = resolve(layout, prompt)
    assert resolution.text == "Ada.\nBo.\nWho?"
    assert resolution.runs[-1].start == 64


def test_lengths_are_set_by_the_names_that_errors_name() -> None:
    source = "{{ a }}{{ a }}{% for d in x %}{{ d }}{% endfor %}{% for d in y %}{{ d }}{% endfor %}"
    lengths = {"a": 5, "a-2": 7, "for-d": 8, "for-d-2": 9}
    assert JinjaTemplate(source, lengths=lengths).schema.children == (
        Module("text-1", (Param("a", 5), Param("a-2", 7))),
        Slot("for-d", 8),
        Slot("for-d-2", 9),
    )
    everywhere = JinjaTemplate(source, lengths={"a": 5, "for-d": 8}).schema.children
    assert everywhere == (
        Module("text-1", (Param("a", 5), Param("a-2", 5))),
        Slot("for-d", 8),
        Slot("for-d-2", 8),
    )


def test_a_length_for_what_is_written_in_a_loop_is_refused_and_names_the_loop() -> None:
    template = JinjaTemplate("{% for d in docs %}{{ d }}{% endfor %}", lengths={"d": 8})
    with pytest.raises(OptionError, match="'d', which is no parameter .* it has for-d"):
        assert template.schema


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "part.j2").write_text("part", "utf-8-sig")
    (tmp_path / "main.j2").write_text("main {% include 'part.j2' %}", "utf-8-sig")
    template = JinjaTemplate.from_file(tmp_path / "main.j2")
    assert template.render().text == "main part"
    assert "\ufeff" not in template.pml
