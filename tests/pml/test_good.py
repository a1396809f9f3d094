"""Schemas and prompts of every shape that the reference project's examples have, and ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcache_core.pml import SchemaLayout, no_marks, parse_prompt, parse_schema, place, resolve
from pml_words import chat, tokens

GOOD = Path(__file__).parent / "good"
NAMES = sorted(path.stem for path in GOOD.glob("*.txt"))


def layout_of(name: str) -> SchemaLayout:
    schema = parse_schema((GOOD / f"{name}.xml").read_bytes(), file=name)
    marks = chat if name != "everything" else lenient
    return place(schema, tokens, marks=marks)


def lenient(before: str | None, after: str | None) -> object:
    """As `chat`, with a system message anywhere."""
    mark = chat(before, "user" if after == "system" else after)
    text = mark.text.replace("<user>", "<system>") if after == "system" else mark.text
    return type(mark)(text, tuple(tokens(text)))


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_reads_as_its_author_would_expect(name: str) -> None:
    prompt = parse_prompt((GOOD / f"{name}.prompt.xml").read_bytes(), file=name)
    expected = (GOOD / f"{name}.txt").read_text("utf-8")
    for positions in ("schema", "compact"):
        assert resolve(layout_of(name), prompt, positions=positions).text.rstrip("\n") == (
            expected.rstrip("\n")
        )


def test_there_is_a_file_of_each_shape() -> None:
    assert NAMES == ["character", "code", "everything", "letters", "trip"]


def test_modules_of_code_are_not_reused_where_the_schema_says_so() -> None:
    layout = layout_of("code")
    assert [layout.module([name]).cached for name in ("unit.py", "map.py")] == [True, False]
    prompt = parse_prompt((GOOD / "code.prompt.xml").read_bytes())
    reusable = {run.owner: run.is_reusable for run in resolve(layout, prompt).runs if run.owner}
    assert reusable == {("unit.py",): True, ("map.py",): False}


def test_a_scaffold_is_in_force_when_all_its_modules_are_used() -> None:
    layout = layout_of("everything")
    assert layout.scaffolds == ((("preface", "nested"), ("task", "drive")),)
    prompt = (GOOD / "everything.prompt.xml").read_text("utf-8")
    assert resolve(layout, parse_prompt(prompt)).scaffolds == layout.scaffolds
    without = parse_prompt(prompt.replace("<nested/>", ""))
    assert resolve(layout, without).scaffolds == ()


def test_without_a_chat_template_messages_follow_each_other_bare() -> None:
    schema = parse_schema((GOOD / "letters.xml").read_bytes())
    prompt = parse_prompt((GOOD / "letters.prompt.xml").read_bytes())
    runs = resolve(place(schema, tokens, marks=no_marks), prompt).runs
    assert "".join(run.text for run in runs) == (
        "Short answers.This person is: I (reserved) F (feeling)"
    )
    assert [run.role for run in runs] == ["system", "user", "user", "user", "user"]
