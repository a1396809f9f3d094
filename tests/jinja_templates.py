"""Random Jinja2 templates. Template text is Latin lower case, values are Greek: no overlap."""

from __future__ import annotations

from hypothesis import strategies as st

TEXT = "ab <>&\n}%#"
VALUE = "ΔΘΨ4 \n"

texts = st.text(TEXT, min_size=1, max_size=6)
values = st.text(VALUE + "{%}<", max_size=8) | st.sampled_from(
    ["{{ a }}", "{% if x %}", "</module><Δ/>", "<|Δ|>", "Δ" * 30]
)
contexts = st.fixed_dictionaries(
    {
        "a": values,
        "b": values,
        "n": st.integers(0, 3),
        "docs": st.lists(values, max_size=3),
        "rows": st.lists(st.fixed_dictionaries({"t": values, "k": st.integers(0, 2)}), max_size=3),
    }
)

_PLAIN = ["a", "b", "n", "docs[0]", "rows|length", "a ~ b", "n + 1"]
_ITEM = ["d", "r.t", "r.k", "loop.index", "d ~ a"]
_TESTS = ["n", "n > 1", "not a", "a and n", "n == 2 or b", "docs"]
_LOOP_TESTS = ["loop.first", "loop.index is odd", "not loop.last", "r.k", "d"]


def expressions(in_loop: bool) -> st.SearchStrategy[str]:
    """What stands between braces. Filters may mix the alphabets, so there are none."""
    return st.sampled_from(_PLAIN + (_ITEM if in_loop else []))


def conditions(in_loop: bool) -> st.SearchStrategy[str]:
    """What stands behind `if`."""
    return st.sampled_from(_TESTS + (_LOOP_TESTS if in_loop else []))


def leaves(in_loop: bool) -> st.SearchStrategy[str]:
    """Template source without other source in it."""
    return st.one_of(
        texts,
        texts,
        expressions(in_loop).map(lambda e: f"{{{{ {e} }}}}"),
        expressions(in_loop).map(lambda e: f"{{{{- {e} -}}}}"),
        st.sampled_from(["{{ 'a{{' }}", "{% raw %}{{ a }}{% endraw %}", "{# b #}", "{#- b -#}"]),
        st.just("{{ card(a) }}"),
        st.just("{% set c = a %}{{ c }}"),
    )


@st.composite
def _if(draw: st.DrawFn, body: st.SearchStrategy[str], in_loop: bool) -> str:
    dash = draw(st.sampled_from(["", "-"]))
    source = f"{{% if {draw(conditions(in_loop))} {dash}%}}{draw(body)}"
    for _ in range(draw(st.integers(0, 2))):
        source += f"{{% elif {draw(conditions(in_loop))} %}}{draw(body)}"
    if draw(st.booleans()):
        source += f"{{%{dash} else %}}{draw(body)}"
    return source + "{% endif %}"


@st.composite
def _for(draw: st.DrawFn, body: st.SearchStrategy[str], otherwise: st.SearchStrategy[str]) -> str:
    head = draw(st.sampled_from(["d in docs", "r in rows", "d in docs if d"]))
    other = f"{{% else %}}{draw(otherwise)}" if draw(st.booleans()) else ""
    return f"{{% for {head} %}}{draw(body)}{other}{{% endfor %}}"


@st.composite
def sources(draw: st.DrawFn, depth: int = 3, in_loop: bool = False) -> str:
    """Template source."""
    if depth == 0:
        return draw(leaves(in_loop))
    body = sources(depth - 1, in_loop)
    looped = sources(depth - 1, in_loop=True)
    parts = st.one_of(
        leaves(in_loop),
        leaves(in_loop),
        _if(body, in_loop),
        _for(looped, body),
        body.map(lambda s: f"{{% set c %}}{s}{{% endset %}}{{{{ c }}}}"),
        body.map(lambda s: f"{{% with c = a %}}{s}{{{{ c }}}}{{% endwith %}}"),
        body.map(lambda s: f"{{% call wrap(b) %}}{s}{{% endcall %}}"),
    )
    return "".join(draw(st.lists(parts, max_size=4)))


MACROS = """\
{%- macro card(x) %}aa{{ x }}{% if x %}b{{ n }}{% endif %}{% for d in docs %}{{ d }},{% endfor %}\
{% endmacro %}
{%- macro wrap(x) %}<{{ x }}>{{ caller() }}{{ card(x) }}</>{% endmacro %}
"""
