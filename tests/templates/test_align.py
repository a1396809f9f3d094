"""Parts of a joined text are told apart only where there is no other way to read it."""

from __future__ import annotations

from itertools import combinations_with_replacement

from hypothesis import given, settings
from hypothesis import strategies as st

from pcache_templates.align import Part, align

texts = st.text("ab", max_size=3)
parts = st.lists(
    st.builds(Part, st.just("literal"), texts)
    | st.builds(Part, st.just("argument"), texts | st.none()),
    min_size=1,
    max_size=5,
)


def readings(given: list[Part], text: str) -> list[tuple[int, ...]]:
    """Where parts may end, by trying everything."""
    found = []
    for ends in combinations_with_replacement(range(len(text) + 1), len(given) - 1):
        bounds = (0, *ends, len(text))
        stretches = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        if all(p.text in (None, s) for p, s in zip(given, stretches, strict=True)):
            found.append((*ends, len(text)))
    return found


@settings(max_examples=500, deadline=None)
@given(given=parts, filling=st.lists(texts, min_size=5, max_size=5), other=st.none() | texts)
def test_a_cut_is_made_where_all_readings_agree_and_nowhere_else(
    given: list[Part], filling: list[str], other: str | None
) -> None:
    written = [
        fill if part.text is None else part.text for part, fill in zip(given, filling, strict=False)
    ]
    text = "".join(written) if other is None else other
    spans = align(given, text, ("p",))
    assert sum(span.chars for span in spans) == len(text)
    possible = readings(given, text)
    if not possible:
        assert all(span == (len(text), "argument", ("p",)) for span in spans)
        return
    position = 0
    for span in spans:
        start, position = position, position + span.chars
        if span.path == ("p",):
            assert span.kind == "argument"
            continue
        number = span.path[1]
        assert isinstance(number, int)
        assert span.kind == given[number].kind
        for ends in possible:
            assert (0, *ends)[number] == start
            assert ends[number] == position
    if len(possible) == 1:
        assert all(len(span.path) == 2 for span in spans)


def test_a_value_that_imitates_the_template_is_no_template_text() -> None:
    given = [Part("literal", "Q: "), Part("argument", None), Part("literal", "\nA: "),
             Part("argument", None)]  # fmt: skip
    spans = align(given, "Q: a\nA: b\nA: c", ("p",))
    assert [(span.chars, span.kind) for span in spans] == [(3, "literal"), (11, "argument")]
