"""Prompt programs: the schema comes from the source, the prompt from running."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcache_core import PromptError, TemplateError
from pcache_core.pml import parse_prompt, parse_schema, place, resolve
from pcache_templates import Module, Param, Slot, Text, Union, prompt_program

N = Module


@prompt_program
def greeting(name: str) -> Iterator[str]:
    yield f"Dear {name},\n"


@prompt_program(lengths={"city": 8}, name="travel")
def trip(
    city: str, days: int = 3, season: str = "", docs: Iterable[str] = (), premium: bool = False
) -> Iterator[str]:
    """Plan a trip."""
    yield from greeting(city.upper())
    yield "Plan "
    yield f"{days} days in {city}." + "\n"
    if premium:
        yield "Use the best hotels.\n"
    elif days > 7:
        yield "Take it slowly.\n"
    else:
        yield "Save money.\n"
    match season:
        case "winter" | "autumn":
            yield "Pack a coat.\n"
        case _:
            yield "Pack light.\n"
    for number, doc in enumerate(docs):
        yield f"Source {number}: {doc}\n"
    yield from docs


def test_statements_become_their_counterparts() -> None:
    assert trip.schema.name == "travel"
    assert trip.schema.children == (
        N("call-greeting", (Text("Dear "), Param("name"), Text(",\n"))),
        N(
            "text-1",
            (
                Text("Plan "), Param("days"), Text(" days in "), Param("city", 8),
                Text("."), Text("\n"),
            ),
        ),
        Union(
            (
                N("if-premium", (Text("Use the best hotels.\n"),)),
                N("if-days-gt-7", (Text("Take it slowly.\n"),)),
                N("else", (Text("Save money.\n"),)),
            )
        ),
        Union(
            (
                N("case-winter-autumn", (Text("Pack a coat.\n"),)),
                N("else-2", (Text("Pack light.\n"),)),
            )
        ),
        Slot("for-number-doc"),
        N("for-number-doc-text-1", (Text("Source "),)),
        Slot("from-docs"),
    )  # fmt: skip


def test_a_prompt_is_what_the_generator_yields_and_knows_its_parts() -> None:
    prompt = trip.render("Paris", days=9, docs=["One."])
    assert [(s.text, s.kind, s.name) for s in prompt.segments] == [
        ("Dear ", "literal", "call-greeting"),
        ("PARIS", "argument", "name"),
        (",\n", "literal", "call-greeting"),
        ("Plan ", "literal", "text-1"),
        ("9", "argument", "days"),
        (" days in ", "literal", "text-1"),
        ("Paris", "argument", "city"),
        (".\n", "literal", "text-1"),
        ("Take it slowly.\n", "literal", "if-days-gt-7"),
        ("Pack light.\n", "literal", "else-2"),
        ("Source ", "literal", "for-number-doc-text-1"),
        ("0", "document", "number"),
        (": ", "literal", "for-number-doc"),
        ("One.", "document", "doc"),
        ("\n", "literal", "for-number-doc"),
        ("One.", "document", "from-docs"),
    ]


@settings(deadline=None)
@given(
    city=st.text("ab {}<.\n", max_size=12) | st.sampled_from([" days in ", "{days}", ".\n"]),
    days=st.integers(0, 12),
    season=st.sampled_from(["winter", "summer"]),
    docs=st.lists(st.text("ab: \n", max_size=6) | st.just("Source 1: x\n"), max_size=3),
    premium=st.booleans(),
)
def test_prompts_join_to_what_was_yielded_and_fit_the_schema(
    city: str, days: int, season: str, docs: list[str], premium: bool
) -> None:
    given = (city, days, season, docs, premium)
    plain = "".join(trip(*given))
    assert trip.render(*given).text == plain
    layout = place(parse_schema(trip.pml), lambda text: [0] if text else [])
    prompt = parse_prompt(trip.prompt_pml(*given))
    assert resolve(layout, prompt, positions="compact").text == plain


def test_values_that_imitate_the_program_are_arguments() -> None:
    @prompt_program
    def ask(one: Callable[[], str], two: Callable[[], str]) -> Iterator[str]:
        yield f"Q: {one()}\nA: {two()}"

    segments = ask.segments(lambda: "x\nA: y", lambda: "z")
    assert [(s.text, s.kind) for s in segments] == [
        ("Q: ", "literal"),
        ("x\nA: y\nA: z", "argument"),
    ]


def test_known_variables_settle_what_the_text_leaves_open() -> None:
    @prompt_program
    def ask(one: str, two: str) -> Iterator[str]:
        yield f"Q: {one}\nA: {two}"

    segments = ask.segments("x\nA: y", "z")
    assert [(s.text, s.name) for s in segments if s.kind == "argument"] == [
        ("x\nA: y", "one"),
        ("z", "two"),
    ]


def test_text_behind_a_way_out_is_a_module_of_its_own() -> None:
    @prompt_program
    def short(stop: bool) -> Iterator[str]:
        yield "one "
        if stop:
            return
        yield "two"

    assert short.schema.children == (N("text-1", (Text("one "),)), N("text-2", (Text("two"),)))
    layout = place(parse_schema(short.pml), lambda text: [0])
    prompt = parse_prompt(short.prompt_pml(stop=True))
    assert resolve(layout, prompt, positions="compact").text == "one "


def test_every_place_of_a_yield_is_found() -> None:
    @prompt_program
    def many(n: int) -> Iterator[str]:
        yield "a"; yield "b"  # noqa: E702  # fmt: skip
        got = yield ("c")
        with memoryview(b""):
            yield "d"
        while n:
            n -= 1
            yield "looped"
        else:
            yield "e"
        yield """
multi
    line"""
        yield "f" if got else "g"

    assert "".join(many(2)) == "abcdloopedloopede\nmulti\n    lineg"
    assert many.schema.children == (
        N("text-1", (Text("a"), Text("b"), Text("c"), Text("d"))),
        Slot("while-n"),
        N("while-n-text-1", (Text("looped"),)),
        N("else", (Text("e"),)),
        N("text-2", (Text("\nmulti\n    line"), Param("f-if-got-else-g"))),
    )
    assert [s.kind for s in many.segments(2)] == ["literal"] * 4 + ["argument"]


def test_programs_are_found_through_modules_and_closures_and_may_recurse() -> None:
    library = ModuleType("library")
    library.greeting = greeting  # type: ignore[attr-defined]

    @prompt_program
    def nest(depth: int) -> Iterator[str]:
        yield from library.greeting("Ann")
        yield f"{depth} "
        if depth:
            yield from nest(depth - 1)

    assert nest.schema.children == (
        N("call-greeting", (Text("Dear "), Param("name"), Text(",\n"))),
        N("text-1", (Param("depth"), Text(" "))),
        N("if-depth", (Slot("from-nest-depth-1"),)),
    )
    assert nest.render(1).text == "Dear Ann,\n1 Dear Ann,\n0 "
    assert {s.kind for s in nest.segments(1)} == {"literal", "argument"}


def test_programs_that_call_without_end_are_refused(tmp_path: Path) -> None:
    source = "from pcache_templates import prompt_program\n" + "".join(
        f"@prompt_program\ndef p{i}():\n    yield from p{i + 1}()\n    yield from p{i + 1}()\n"
        for i in range(40)
    )
    (tmp_path / "chain.py").write_text(source + "@prompt_program\ndef p40():\n    yield 'x'\n")
    namespace: dict[str, object] = {}
    exec(
        compile((tmp_path / "chain.py").read_text(), str(tmp_path / "chain.py"), "exec"), namespace
    )
    with pytest.raises(TemplateError, match="over 20,000 parts"):
        assert namespace["p0"].schema  # type: ignore[attr-defined]


def test_a_yield_in_a_statement_that_pml_lacks_is_refused_with_its_line_and_still_runs() -> None:
    @prompt_program
    def guarded(x: str) -> Iterator[str]:
        try:
            yield f"a {x}"
        finally:
            pass

    with pytest.raises(TemplateError, match=r"guarded, line \d+: a yield inside of 'try'"):
        assert guarded.schema
    assert [(s.text, s.kind) for s in guarded.segments("x")] == [
        ("a ", "literal"),
        ("x", "argument"),
    ]


def test_without_source_a_program_still_runs() -> None:
    namespace: dict[str, object] = {"prompt_program": prompt_program}
    exec("@prompt_program\ndef p(x):\n    yield f'a {x}'\n", namespace)
    program = namespace["p"]
    with pytest.raises(TemplateError, match="source can't be read.*define it in a file"):
        assert program.schema  # type: ignore[attr-defined]
    segments = program.segments("x")  # type: ignore[attr-defined]
    assert [(s.text, s.kind) for s in segments] == [("a x", "text")]


def test_only_generator_functions_that_yield_text_are_programs() -> None:
    with pytest.raises(TemplateError, match="takes a generator function"):
        prompt_program(lambda: iter(["a"]))

    @prompt_program
    def number() -> Iterator[str]:
        yield 1  # type: ignore[misc]

    with pytest.raises(TemplateError, match=r"number, line \d+: yields int; yield str"):
        number.render()

    @prompt_program
    def nothing() -> Iterator[str]:
        yield from ()

    with pytest.raises(PromptError, match="empty"):
        nothing.render()


def test_a_program_keeps_its_name_and_errors_of_its_own() -> None:
    @prompt_program
    def fails() -> Iterator[str]:
        """About it."""
        yield "a"
        raise KeyError("own")

    assert (fails.__name__, fails.__doc__) == ("fails", "About it.")
    with pytest.raises(KeyError, match="own"):
        fails.render()


def test_pml_is_the_same_in_another_process(tmp_path: Path) -> None:
    source = (
        "from pcache_templates import JinjaTemplate, prompt_program\n"
        "@prompt_program\n"
        "def p(a, b):\n"
        "    yield f'x {a}'\n"
        "    if a and b: yield 'y'\n"
        "t = JinjaTemplate('{% if a and b %}x{% else %}y{% endif %}{{ d|upper }} w')\n"
        "if __name__ == '__main__': print(p.pml + t.pml)\n"
    )
    path = tmp_path / "in_a_file.py"
    here = _run(path, source)
    elsewhere = subprocess.run(
        [sys.executable, str(path)],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert elsewhere == here["p"].pml + here["t"].pml + "\n"


def _run(path: Path, source: str) -> dict[str, Any]:
    """What a file defines. Its source can be read, as that of a module can."""
    path.write_text(source)
    namespace: dict[str, Any] = {"__name__": path.stem}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace
