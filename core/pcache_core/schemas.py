"""Schemas of an engine, and prompts of theirs: from PML to segments with positions and units."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pcache_core.chat.marks import marks_of, template_marks
from pcache_core.errors import PMLError, PromptError
from pcache_core.lm import CausalLM
from pcache_core.pml import (
    Marks,
    ModulePath,
    ModuleUse,
    PlacedItem,
    PlacedModule,
    PlacedParam,
    PlacedText,
    Positions,
    PromptTree,
    Resolution,
    RoleName,
    Schema,
    SchemaLayout,
    TokenRun,
    no_marks,
    parse_prompt,
    parse_schema,
    place,
    resolve,
)
from pcache_core.pml.source import error_at, hint, quoted
from pcache_core.prompt import Passage, Placement, Prompt, Segment, SegmentKind, Unit

_KINDS: dict[str, SegmentKind] = {
    "module": "literal",
    "anonymous": "literal",
    "mark": "literal",
    "argument": "argument",
    "document": "document",
    "text": "text",
}


class SchemaShelf:
    """The schemas of one engine, laid out with its model's tokens."""

    def __init__(self, lm: CausalLM) -> None:
        self._lm = lm
        self._layouts: dict[str, SchemaLayout] = {}

    def add(
        self, schema: str | os.PathLike[str] | Schema, src_root: str | os.PathLike[str] | None
    ) -> str:
        """See `PromptCacheEngine.add_schema`."""
        if not isinstance(schema, Schema):
            pml, file = _read(schema)
            schema = parse_schema(pml, file=file, src_root=src_root)
        text = self._lm.text
        marks: Marks = no_marks
        if self._lm.tokenizer.chat_template:
            marks = template_marks(text.apply_chat_template, self._mark_ids)
        self._layouts[schema.name] = place(
            schema, self._text_ids, marks=marks, first_position=len(text.bos_ids)
        )
        return schema.name

    def prompt(self, pml: str | os.PathLike[str] | PromptTree, positions: Positions) -> Prompt:
        """See `PromptCacheEngine.prompt_from_pml`."""
        if not isinstance(pml, PromptTree):
            text, file = _read(pml)
            pml = parse_prompt(text, file=file)
        layout = self._layouts.get(pml.schema)
        if layout is None:
            raise error_at(pml.source, pml.line, self._unknown(pml.schema))
        return self._prompt(layout, pml, positions)

    def every_module(self, name: str) -> list[Prompt]:
        """Prompts that use each module and each scaffold of a schema, without arguments.

        Raises: PMLError: unknown name.
        """
        layout = self._layouts.get(name)
        if layout is None:
            raise PMLError(self._unknown(name))
        wanted = [(module.path,) for module in layout.modules()]
        trees = [_tree(layout, paths) for paths in [(), *wanted, *layout.scaffolds]]
        return [prompt for tree in trees if (prompt := self._possible(layout, tree)) is not None]

    def _possible(self, layout: SchemaLayout, tree: PromptTree) -> Prompt | None:
        """None for a prompt that holds nothing, or that the chat template can't begin or end so."""
        try:
            return self._prompt(layout, tree, "schema")
        except PMLError:
            return None

    def _prompt(self, layout: SchemaLayout, tree: PromptTree, positions: Positions) -> Prompt:
        support = self._lm.support
        reason = None
        if positions == "schema" and not support.takes_positions:
            positions = "compact"
            reason = f"{self._lm.name} takes positions from rows, so they are compact"
        resolution = resolve(layout, tree, positions=positions)
        self._check_marks(resolution, tree)
        opening = _opening(layout, resolution)
        if positions == "compact" and support.kind == "fixed-positions":
            reason = (
                "states of this model can't be moved, as compact positions ask for; "
                "modules are computed"
            )
            units: tuple[Unit, ...] = ()
        else:
            units = tuple(_units(layout, resolution, opening, has_gaps=support.takes_positions))
        return Prompt(
            [_segment(run) for run in resolution.runs],
            Placement(
                token_ids=tuple(run.token_ids for run in resolution.runs),
                starts=tuple(run.start for run in resolution.runs),
                opening=opening,
                units=units,
                model=self._lm.fingerprint,
            ),
            reason,
        )

    def _text_ids(self, text: str) -> Sequence[int]:
        return self._lm.text.ids(Segment(text, "argument"))

    def _mark_ids(self, text: str) -> Sequence[int]:
        return self._lm.text.ids(Segment(text, "literal"))

    def _check_marks(self, resolution: Resolution, tree: PromptTree) -> None:
        """Raises: PMLError: the chat template writes this conversation in another way."""
        runs = resolution.runs
        written = "".join(run.text for run in runs if run.kind == "mark")
        if not written:
            return
        roles = _roles(runs)
        found = marks_of(self._lm.text.apply_chat_template, roles)
        if found is None or "".join(found) != written:
            raise error_at(
                tree.source,
                tree.line,
                f"the model's chat template can't write messages of {', '.join(roles)} one after "
                "the other; put them in another order",
            )

    def _unknown(self, name: str) -> str:
        return f"there is no schema {quoted(name)}; {hint(name, self._layouts)}"


def _read(given: str | os.PathLike[str]) -> tuple[str | bytes, str | None]:
    """PML as it is given: text, which has a tag in it, or the path of a file; and the file's name.

    Raises: PMLError: the file can't be read. PromptError: neither text nor a path.
    """
    if isinstance(given, str) and ("<" in given or "\n" in given or not given.strip()):
        return given, None
    if not isinstance(given, str | os.PathLike):
        raise PromptError(
            f"PML is given as text, or as the path of a file, got {type(given).__name__}"
        )
    try:
        return Path(given).read_bytes(), os.fspath(given)
    except (OSError, ValueError) as error:
        raise PMLError(f"can't read {os.fspath(given)!r}: {error}; give PML or a file") from None


def _segment(run: TokenRun) -> Segment:
    path = "/".join(run.owner)
    name = run.name if run.kind in ("argument", "document") else path or None
    return Segment(run.text, _KINDS[run.kind], name)


def _opening(layout: SchemaLayout, resolution: Resolution) -> int:
    """Return how many runs open every prompt of the schema, one after the other.

    Its own text before everything that a prompt chooses, with the marks before that.
    """
    texts = _leading_texts(layout)
    count = 0
    end = layout.start
    for index, run in enumerate(resolution.runs):
        if run.home != end or run.kind not in ("mark", "anonymous"):
            break
        end += len(run.token_ids)
        if run.kind == "anonymous":
            if texts == 0:
                break
            texts -= 1
            count = index + 1
    return count


def _leading_texts(layout: SchemaLayout) -> int:
    """Texts with tokens before the schema's first module, parameter or slot."""
    count = 0
    for item in layout.root.items:
        if not isinstance(item, PlacedText):
            break
        count += bool(item.token_ids)
    return count


def _units(
    layout: SchemaLayout, resolution: Resolution, opening: int, *, has_gaps: bool
) -> Iterator[Unit]:
    """Yield the modules' own texts, each module by itself, or with those that it is encoded with.

    opening: how many runs open every prompt, which belong to no unit.
    has_gaps: whether parameters and inner modules leave their room; else texts follow each other.
    """
    texts: dict[ModulePath, dict[int | None, int]] = {}
    for index, run in enumerate(resolution.runs):
        if run.kind in ("module", "anonymous") and run.is_reusable and index >= opening:
            texts.setdefault(run.owner, {})[run.home] = index
    groups = [group for group in resolution.scaffolds if all(path in texts for path in group)]
    together = {path for group in groups for path in group}
    alone = [(path,) for path in texts if path not in together]
    for paths in [*groups, *alone]:
        places = {home: index for path in paths for home, index in texts[path].items()}
        items = [item for path in paths for item in layout.module(path).items]
        yield _unit(items, places, has_gaps=has_gaps)


def _unit(items: Sequence[PlacedItem], places: dict[int | None, int], *, has_gaps: bool) -> Unit:
    """One unit of texts, which `places` has by their position, and of what stands in between."""
    texts = [
        item
        for item in items
        if isinstance(item, PlacedText) and item.token_ids and item.start in places
    ]
    end = max(text.stop for text in texts)
    # Nothing could see what stands in for an argument after the last text.
    params = [item for item in items if isinstance(item, PlacedParam) and item.stop <= end]
    parts: list[PlacedText | PlacedParam] = sorted([*texts, *params], key=lambda item: item.start)
    token_ids: list[int] = []
    positions: list[int] = []
    stand_ins: list[int] = []
    for part in parts:
        ids = part.token_ids if isinstance(part, PlacedText) else part.scaffold_ids
        if isinstance(part, PlacedParam):
            stand_ins.extend(range(len(token_ids), len(token_ids) + len(ids)))
        token_ids.extend(ids)
        positions.extend(range(part.start, part.start + len(ids)))
    first = positions[0]
    offsets = tuple(position - first for position in positions)
    if not has_gaps or offsets == tuple(range(len(offsets))):
        offsets = ()
    segments = tuple(places[part.start] for part in parts if isinstance(part, PlacedText))
    return Unit(segments, Passage(tuple(token_ids), offsets, tuple(stand_ins)), first)


def _roles(runs: Sequence[TokenRun]) -> list[RoleName]:
    """Of the messages, in order."""
    roles: list[RoleName] = []
    for run in runs:
        opens = run.kind == "mark" or not roles or run.role != roles[-1]
        if run.role is not None and opens:
            roles.append(run.role)
    return roles


def _tree(layout: SchemaLayout, paths: Sequence[ModulePath]) -> PromptTree:
    """Return a prompt that uses these modules and those around them, every argument empty."""

    def uses(scope: PlacedModule, wanted: Sequence[ModulePath]) -> tuple[ModuleUse, ...]:
        depth = len(scope.path)
        names = dict.fromkeys(path[depth] for path in wanted if len(path) > depth)
        return tuple(use(scope, name, wanted) for name in names)

    def use(scope: PlacedModule, name: str, wanted: Sequence[ModulePath]) -> ModuleUse:
        path = (*scope.path, name)
        module = layout.module(path)
        inside = [other for other in wanted if other[: len(path)] == path]
        return ModuleUse(name, _empty_arguments(module), uses(module, inside))

    return PromptTree(layout.schema.name, uses(layout.root, paths), _empty_arguments(layout.root))


def _empty_arguments(module: PlacedModule) -> dict[str, str]:
    return {item.name: "" for item in module.items if isinstance(item, PlacedParam)}
