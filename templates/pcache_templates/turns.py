"""What of a template's tree is in its chat turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pcache_templates.schema import Module, Node, Role, Text, Union, walk


def turns_only(tree: Iterable[Node]) -> list[Node]:
    """The tree without what is written outside of its roles."""
    kept: list[Node] = []
    for node in tree:
        if not any(isinstance(below, Role) for below in walk([node])):
            continue
        match node:
            case Module():
                kept.append(replace(node, children=tuple(turns_only(node.children))))
            case Union():
                members = [m for m in turns_only(node.members) if isinstance(m, Module)]
                kept.append(Union(tuple(members)))
            case _:
                kept.append(node)
    return kept


def stripped(turn: list[Node]) -> list[Node]:
    """A turn without white space around it."""
    while turn and isinstance(turn[0], Text):
        turn[0] = replace(turn[0], text=turn[0].text.lstrip())
        if turn[0].text:
            break
        del turn[0]
    while turn and isinstance(turn[-1], Text):
        turn[-1] = replace(turn[-1], text=turn[-1].text.rstrip())
        if turn[-1].text:
            break
        del turn[-1]
    return turn
