"""Random schemas and prompts: what is written is what is read, and positions add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from pcache_core.pml import (
    Module,
    Param,
    PlacedModule,
    PlacedParam,
    PlacedSlot,
    PlacedText,
    PMLError,
    PromptTree,
    Role,
    Schema,
    SchemaLayout,
    Slot,
    Text,
    Union,
    parse_prompt,
    parse_schema,
    place,
    resolve,
)
from pml_documents import prompts, schemas, to_xml
from pml_words import tokens


@settings(max_examples=150, deadline=None)
@given(schemas())
def test_a_schema_is_read_as_it_is_written(schema: Schema) -> None:
    assert parse_schema(to_xml(schema)) == schema


@settings(max_examples=150, deadline=None)
@given(schemas().flatmap(prompts))
def test_a_prompt_is_read_as_it_is_written(prompt: PromptTree) -> None:
    assert parse_prompt(to_xml(prompt)) == prompt


def extent(node: object) -> int:
    """How many positions a node takes, from the definition alone; messages have no marks here."""
    match node:
        case Text(text):
            return len(tokens(text))
        case Param(_, length):
            return length
        case Slot(_, max_tokens):
            return max_tokens or 0
        case Union(members):
            return max(extent(member) for member in members)
        case Module() | Role() | Schema():
            return sum(extent(child) for child in node.children)
    return 0


def expected(children: Iterable[object], start: int, path: tuple[str, ...]) -> Iterator[tuple]:
    """Start, end and owner of everything, from the definition alone."""
    for node in children:
        end = start + extent(node)
        match node:
            case Text() | Param() | Slot():
                yield (path, start, end, getattr(node, "name", node))
            case Module(name):
                yield (path, start, end, name)
                yield from expected(node.children, start, (*path, name))
            case Union(members):
                for member in members:
                    yield from expected([member], start, path)
            case Role():
                yield from expected(node.children, start, path)
        start = end


def placed(module: PlacedModule) -> Iterator[tuple]:
    for item in module.items:
        what = Text(item.text) if isinstance(item, PlacedText) else item.name
        yield (item.owner, item.start, item.stop, what)
        if isinstance(item, PlacedModule):
            yield from placed(item)


@settings(max_examples=150, deadline=None)
@given(schemas(), st.integers(0, 3))
def test_positions_are_those_of_the_definition(schema: Schema, first: int) -> None:
    layout = place(schema, tokens, first_position=first)
    assert list(placed(layout.root)) == list(expected(schema.children, first, ()))
    assert layout.stop - layout.start == extent(schema)


def resolved(layout: SchemaLayout, prompt: PromptTree) -> tuple | None:
    try:
        return tuple(resolve(layout, prompt, positions=p) for p in ("schema", "compact"))
    except PMLError as error:
        if "the prompt is empty" not in str(error):
            raise
        return None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_both_position_modes_run_the_same_text_without_overlap(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    prompt = data.draw(prompts(schema))
    layout = place(schema, tokens, first_position=1)
    both = resolved(layout, prompt)
    if both is None:
        return
    absolute, compact = both
    assert compact.position_ids == tuple(range(1, 1 + len(compact.token_ids)))
    assert len(set(absolute.position_ids)) == len(absolute.position_ids)
    assert sorted(run.text for run in absolute.runs) == sorted(run.text for run in compact.runs)
    for run in absolute.runs:
        assert list(run.token_ids) == tokens(run.text)
        assert run.home in (None, run.start)
    homes = [run.home for run in absolute.runs if run.home is not None]
    assert homes == sorted(homes)
    inside = {item: item.stop for item in _leaves(layout.root)}
    for run in absolute.runs:
        if run.home is not None:
            assert any(i.start == run.start and run.stop <= stop for i, stop in inside.items())


def _leaves(module: PlacedModule) -> Iterator[PlacedText | PlacedParam | PlacedSlot]:
    for item in module.items:
        if isinstance(item, PlacedModule):
            yield from _leaves(item)
        else:
            yield item
