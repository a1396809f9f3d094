"""The language reference says what is so: its examples are read as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pcache_core.pml
from pcache_core.pml import Limits, parse_prompt, parse_schema, place, resolve
from pcache_core.pml.grammar import grammar
from pml_words import chat, tokens

FOLDER = Path(pcache_core.pml.__file__).parent
README = (FOLDER / "README.md").read_text("utf-8")
XML = re.findall(r"^```xml\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
(TEXT,) = re.findall(r"^```text\n(.*?)\n```", README, flags=re.DOTALL | re.MULTILINE)


def test_every_example_is_a_schema_or_a_prompt_of_the_one_before() -> None:
    layouts = []
    for example in XML:
        if example.startswith("<schema"):
            layouts.append(place(parse_schema(example), tokens, marks=chat))
        else:
            resolve(layouts[-1], parse_prompt(example))
    assert (len(XML), len(layouts)) == (5, 3)


def test_the_first_prompt_reads_as_shown() -> None:
    layout = place(parse_schema(XML[0]), tokens)
    for positions in ("schema", "compact"):
        assert resolve(layout, parse_prompt(XML[1]), positions=positions).text == TEXT


def test_the_second_prompt_puts_documents_and_question_into_one_message() -> None:
    layout = place(parse_schema(XML[2]), tokens, marks=chat)
    runs = resolve(layout, parse_prompt(XML[3])).runs
    assert [(run.kind, run.role) for run in runs] == [
        *(("mark", "system"), ("anonymous", "system"), ("mark", "user"), ("module", "user")),
        *(("document", "user"), ("document", "user"), ("mark", "user"), ("text", "user")),
        ("mark", None),
    ]
    assert [run.name for run in runs if run.kind == "document"] == ["oslo.txt", None]


def test_the_limits_are_those_in_the_text() -> None:
    assert Limits() == Limits(4 * 2**20, 64, 20_000, 256)
    assert (
        "`Limits(max_bytes=4 MiB, max_depth=64, max_elements=20,000, max_attributes=256)`" in README
    )


def test_the_reference_names_every_element_and_attribute_of_the_grammars() -> None:
    for name in ("schema", "prompt"):
        rules = grammar(name).rules
        for tag in rules:
            assert tag == "*" or f"<{tag}" in README
            for attribute in rules[tag].attributes:
                assert attribute == "*" or attribute in README


def test_both_grammars_know_the_same_names() -> None:
    patterns = [grammar(name).name_pattern for name in ("schema", "prompt")]
    assert patterns[0] == patterns[1]
