"""Every broken file is a PMLError that names the file, the line in its name and the source line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcache_core.pml import PMLError, SchemaLayout, parse_prompt, parse_schema, place, resolve
from pml_words import chat, tokens

FOLDER = Path(__file__).parent / "broken"
GOOD = Path(__file__).parent / "good"
SCHEMAS = sorted((FOLDER / "schemas").iterdir())
PROMPTS = sorted((FOLDER / "prompts").iterdir())
OF_TRIP = sorted((FOLDER / "trip").iterdir())
SAYS = {
    "wrong-root": "expected <schema …>, got <shema>",
    "no-name": "<schema> needs the attribute name",
    "reserved-module-name": "'user' is a tag of prompts",
    "misspelt-element": "did you mean 'module'?",
    "misspelt-attribute": "did you mean 'name'?",
    "same-module-twice": r"'a' already \(line 2\)",
    "text-in-union": "<union> holds no text; expected <module>",
    "param-in-union": "<param> can't stand in <union>; expected one of: module",
    "empty-union": "<union> is empty; expected <module>",
    "blank-union": "<union> is empty; expected <module>",
    "union-scaffold-unknown": "did you mean 'sea-side'?",
    "param-without-length": "needs the attribute len or length",
    "param-with-both-lengths": "len and length, which mean the same",
    "param-length-zero": "'0' is not a whole number above 0",
    "param-length-huge": "over a billion tokens",
    "cache-maybe": "cache='no' is none of: true, false",
    "slot-underscore": "did you mean 'max-tokens'?",
    "scaffold-unknown-module": "did you mean 'beta'?",
    "scaffold-within-union": "'a' and 'b' are of one union",
    "role-in-role": "messages don't nest",
    "src-not-allowed": r"src_root=",
    "unclosed-module": "close each element",
    "less-than-in-code": "&lt;",
    "bare-ampersand": "&amp;",
    "unknown-entity": "'nbsp' not defined",
    "doctype": "a document type is not allowed",
    "xinclude": "'include' is in a namespace",
    "declared-latin-1": "'ISO-8859-1'; PML is read as UTF-8",
    "latin-1": "save it as UTF-8",
    "markup-in-document": "holds only text",
    "unknown-module": "did you mean|expected one of",
    "child-without-parent": "write <plan><overseas><tokyo/></overseas></plan>",
    "child-in-wrong-parent": "'tokyo' is in module 'plan/overseas', not in module 'plan/domestic'",
    "module-twice": r"used already \(line 2\)",
    "two-of-one-union": "'overseas' and 'domestic' are of one union",
    "argument-missing": "needs an argument for 'duration'",
    "argument-unknown": "did you mean 'duration'?",
    "argument-of-none": "there are none",
    "argument-too-long": "'duration' has 9 tokens, the parameter holds 5",
    "slot-overfull": "gets 17 tokens, it holds 16",
    "documents-in-module": "only in a slot",
}


def _checked(caught: pytest.ExceptionInfo[PMLError], path: Path) -> None:
    error = caught.value
    name, line, _ = path.name.split(".")
    assert (error.file, error.line) == (str(path), int(line)), error
    assert str(error).startswith(f"{path}:{line}: ")
    shown = path.read_bytes().decode("utf-8", "replace").split("\n")[int(line) - 1].strip()
    if error.source_line is not None and "\0" not in shown:
        assert shown.startswith(error.source_line[:100])
    assert caught.match(SAYS.get(name, ""))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_a_broken_schema_is_an_error_at_its_line(path: Path) -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema(path.read_bytes(), file=str(path))
    _checked(caught, path)


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_a_broken_prompt_is_an_error_at_its_line(path: Path) -> None:
    with pytest.raises(PMLError) as caught:
        parse_prompt(path.read_bytes(), file=str(path))
    _checked(caught, path)


@pytest.fixture(scope="module")
def trip() -> SchemaLayout:
    return place(parse_schema((GOOD / "trip.xml").read_bytes()), tokens, marks=chat)


@pytest.mark.parametrize("positions", ["schema", "compact"])
@pytest.mark.parametrize("path", OF_TRIP, ids=lambda path: path.stem)
def test_a_prompt_that_does_not_fit_its_schema_is_an_error_at_its_line(
    trip: SchemaLayout, path: Path, positions: str
) -> None:
    prompt = parse_prompt(path.read_bytes(), file=str(path))
    with pytest.raises(PMLError) as caught:
        resolve(trip, prompt, positions=positions)  # type: ignore[arg-type]
    _checked(caught, path)


def test_the_corpus_is_large_and_every_expectation_is_of_a_file() -> None:
    names = {path.name.split(".")[0] for path in (*SCHEMAS, *PROMPTS, *OF_TRIP)}
    assert len(SCHEMAS) + len(PROMPTS) + len(OF_TRIP) >= 40
    assert set(SAYS) <= names
