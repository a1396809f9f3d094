"""What a prompt of a schema must give: one masked forward, from the schema and the prompt alone.

Rows are those of `oracle.py`. In the prompt's order:

- A text of the schema that may be reused belongs to a unit: the texts of its own module, or of all
  modules of a scaffold that the prompt uses whole. Its tokens see those before them in the text,
  and copies of what the unit was encoded after, as far away as it was then: its preamble, the
  unit's texts before it, and what stands in for arguments.
- A document is a unit of its own.
- Arguments, text of the prompt, chat marks and texts that may not be reused see every row before
  them, but no copies. So do units that are too short, and those that hold the prompt's last token.

Nothing here shares code with the engine; positions come from the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import oracle
from oracle import Row, Rows
from pcache_core.pml import (
    PlacedParam,
    PlacedText,
    Positions,
    Resolution,
    SchemaLayout,
    TokenRun,
    parse_prompt,
    parse_schema,
    place,
    resolve,
)

Encoded = Literal["after the preamble", "in place", "without gaps"]
"""Where units were encoded: directly after the preamble, gaps kept; where the schema has them; or
directly after the preamble and themselves, for models that don't take positions."""


@dataclass(frozen=True)
class Token:
    """A token of a unit as it was encoded; `run` is the prompt's run that it is kept for."""

    token_id: int
    position: int
    run: int | None


@dataclass(frozen=True)
class SchemaOracle:
    """A schema and a tokenizer."""

    schema: str
    tokenizer: PreTrainedTokenizerBase
    encoded: Encoded = "after the preamble"
    preamble: tuple[str, Sequence[str]] = ("", ())
    min_module_tokens: int = 8
    src_root: Path | None = None

    @property
    def bos(self) -> list[int]:
        return list(self.tokenizer("").input_ids)

    def layout(self) -> SchemaLayout:
        schema = parse_schema(self.schema, src_root=self.src_root)
        return place(schema, self._ids, first_position=len(self.bos))

    def resolve(self, prompt: str, positions: Positions = "schema") -> Resolution:
        return resolve(self.layout(), parse_prompt(prompt), positions=positions)

    def rows(self, prompt: str, positions: Positions = "schema") -> Rows:
        """The rows of a prompt."""
        layout, runs = self.layout(), self.resolve(prompt, positions).runs
        opening = _opening(layout, runs)
        rows = [Row(t, i, i, "computed", 0) for i, t in enumerate(self.bos)]
        units = self._units(layout, runs, opening)
        for index, run in enumerate(runs):
            unit = next((unit for unit in units if any(t.run == index for t in unit)), None)
            if unit is None:
                rows += _rows(run.token_ids, run.start, "computed", 0)
            else:
                rows += self._unit_rows(unit, index, run)
        return oracle.moved_up(rows)

    def plain(self, prompt: str, positions: Positions = "schema") -> Rows:
        """The same ids and positions, computed as one causal text."""
        rows = [Row(t, i, i, "computed", 0) for i, t in enumerate(self.bos)]
        for run in self.resolve(prompt, positions).runs:
            rows += _rows(run.token_ids, run.start, "computed", 0)
        return tuple(rows)

    def _ids(self, text: str) -> list[int]:
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )

    def _unit_rows(self, tokens: list[Token], index: int, run: TokenRun) -> list[Row]:
        """Copies of what the run was encoded after, then the run."""
        first = next(i for i, token in enumerate(tokens) if token.run == index)
        moved = 0 if self.encoded == "in place" else run.start - tokens[first].position
        copies = [
            Row(token.token_id, token.position + moved, token.position + moved, "copy", index + 1)
            for token in tokens[:first]
        ]
        return [*copies, *_rows(run.token_ids, run.start, "module", index + 1)]

    def _units(
        self, layout: SchemaLayout, runs: Sequence[TokenRun], opening: int
    ) -> list[list[Token]]:
        """The tokens of each unit of the prompt and its preamble, in the order of encoding."""
        before, later = oracle.preamble_ids(self.tokenizer, *self.preamble)
        together = {path: paths for paths in self._scaffolds(layout, runs) for path in paths}
        groups: dict[object, list[int]] = {}
        for index, run in enumerate(runs[opening:], opening):
            if run.is_reusable:
                is_document = run.kind == "document"
                name = index if is_document else together.get(run.owner, run.owner)
                groups.setdefault(name, []).append(index)
        units = []
        for members in groups.values():
            kept = sum(len(runs[index].token_ids) for index in members)
            if kept >= self.min_module_tokens and len(runs) - 1 not in members:
                units.append(self._encoded(layout, runs, members, before))
                before = later
        return units

    def _scaffolds(
        self, layout: SchemaLayout, runs: Sequence[TokenRun]
    ) -> list[tuple[tuple[str, ...], ...]]:
        used = {run.owner for run in runs if run.kind == "module" and run.is_reusable}
        return [paths for paths in layout.scaffolds if used.issuperset(paths)]

    def _encoded(
        self,
        layout: SchemaLayout,
        runs: Sequence[TokenRun],
        members: Sequence[int],
        before: list[int],
    ) -> list[Token]:
        """Texts and stand-ins by their place in the schema, then moved to after the preamble."""
        tokens = []
        for index in members:
            run = runs[index]
            home = run.start if run.home is None else run.home  # a document has none
            tokens += [Token(t, home + i, index) for i, t in enumerate(run.token_ids)]
        if runs[members[0]].kind != "document":
            end = max(token.position for token in tokens)
            for owner in {runs[index].owner for index in members}:
                for param in layout.module(owner).items:
                    if isinstance(param, PlacedParam) and param.start < end:
                        ids = param.scaffold_ids
                        tokens += [Token(t, param.start + i, None) for i, t in enumerate(ids)]
        tokens.sort(key=lambda token: token.position)
        first = tokens[0].position
        if self.encoded == "in place":
            before = before[:first]
        preamble = [Token(token_id, i, None) for i, token_id in enumerate(before)]
        if self.encoded == "in place":
            return [*preamble, *tokens]
        if self.encoded == "without gaps":
            moved = [Token(t.token_id, len(before) + i, t.run) for i, t in enumerate(tokens)]
        else:
            back = first - len(before)
            moved = [Token(t.token_id, t.position - back, t.run) for t in tokens]
        return [*preamble, *moved]


def followed_by(rows: Rows, token_id: int) -> Rows:
    """The rows with one generated token more, behind every position in use."""
    place, position = (max(row.place for row in rows), max(row.position for row in rows))
    return (*rows, Row(token_id, place + 1, position + 1, "computed", 0))


def greedy(model: PreTrainedModel, rows: Rows, num_tokens: int) -> list[int]:
    """Likeliest tokens one by one, all rows recomputed for each."""
    generated: list[int] = []
    for _ in range(num_tokens):
        generated.append(int(oracle.next_logits(model, rows).argmax()))
        rows = followed_by(rows, generated[-1])
    return generated


def next_logits(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Logits of the token after the last row, [vocab]."""
    return oracle.next_logits(model, rows)


def _rows(
    token_ids: Sequence[int], start: int, role: Literal["computed", "module"], group: int
) -> list[Row]:
    return [Row(t, start + i, start + i, role, group) for i, t in enumerate(token_ids)]


def _opening(layout: SchemaLayout, runs: Sequence[TokenRun]) -> int:
    """Runs that are the schema's text before its first module, parameter or slot."""
    items = layout.root.items
    leading = next((i for i, item in enumerate(items) if not isinstance(item, PlacedText)), None)
    texts = [item for item in items[:leading] if isinstance(item, PlacedText) and item.token_ids]
    assert [run.kind for run in runs[: len(texts)]] == ["anonymous"] * len(texts)
    return len(texts)
