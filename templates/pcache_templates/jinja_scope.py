"""Where the walk through a Jinja2 template is, and what names mean there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jinja2 import nodes

from pcache_templates.jinja_source import BlockChain, MacroDefinition, Source
from pcache_templates.schema import Path


@dataclass(frozen=True)
class Scope:
    """A place of the walk. path: of the calls and includes that led here."""

    source: Source
    path: Path = ()
    macros: Mapping[str, MacroDefinition] = field(default_factory=dict)
    blocks: Mapping[str, BlockChain] = field(default_factory=dict)
    # What `super()` writes, and what `caller()` does and where that was written.
    parents: BlockChain = ()
    caller: tuple[nodes.CallBlock, Scope] | None = None
    # Variables that hold one of the things that a loop goes through.
    items: frozenset[str] = frozenset()
    # Whether an `autoescape` tag may be in force.
    in_autoescape: bool = False
    # The templates and macros that are being expanded, so that recursion ends.
    stack: frozenset[tuple[str | None, ...]] = frozenset()

    @property
    def escapes(self) -> bool:
        """Whether values may be escaped; what macros write is then no longer traced."""
        context = nodes.EvalContext(self.source.environment, self.source.name)
        return self.in_autoescape or context.autoescape

    def path_of(self, node: nodes.Node) -> Path:
        """The place of a node in what is being walked."""
        return (*self.path, (self.source.name, self.source.numbers[id(node)]))
