"""Parsed Jinja2 templates, and what names mean at a place in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateNotFound, TemplateSyntaxError

from pcache_core.errors import TemplateError
from pcache_templates.jinja_trace import numbers
from pcache_templates.tree import Path

_Tag = TypeVar("_Tag", nodes.Macro, nodes.Block)


@dataclass(frozen=True, eq=False)
class Source:
    """A template's tree. name: as its loader knows it; None for a template without a loader."""

    environment: Environment
    tree: nodes.Template
    name: str | None
    label: str
    numbers: Mapping[int, int] = field(repr=False)

    @classmethod
    def parse(cls, environment: Environment, text: str, name: str | None, label: str) -> Source:
        """Parse a template. Raises: TemplateError: with its place, if it can't be."""
        try:
            tree = environment.parse(text, name)
        except TemplateSyntaxError as error:
            raise TemplateError(f"{label}:{error.lineno}: {error.message}") from error
        except RecursionError:
            raise TemplateError(f"{label} nests too deeply to be read") from None
        return cls(environment, tree, name, label, numbers(tree))

    def load(self, name: str, tag: nodes.Node) -> Source:
        """Load the template that `tag` names. Raises: TemplateError: it isn't there."""
        environment = self.environment
        name = environment.join_path(name, self.name or "")
        try:
            if environment.loader is None:
                raise TemplateNotFound(name)
            text, _, _ = environment.loader.get_source(environment, name)
        except TemplateNotFound:
            raise self.error(tag, f"there is no template {name!r}") from None
        except JinjaError as error:
            raise self.error(tag, f"template {name!r} can't be loaded: {error}") from error
        return self.parse(environment, text, name, name)

    def error(self, node: nodes.Node, message: str) -> TemplateError:
        """Make an error that says where in the template it is."""
        return TemplateError(f"{self.label}:{node.lineno}: {message}")

    @cached_property
    def macros(self) -> Mapping[str, Definition[nodes.Macro]]:
        """The macros that the template can call by a name that means nothing else in it."""
        found: dict[str, Definition[nodes.Macro]] = {}
        bound: Counter[str] = Counter()
        for name, definition in _bindings(self):
            bound[name] += 1
            if definition is not None:
                found[name] = definition
        return {name: definition for name, definition in found.items() if bound[name] == 1}


@dataclass(frozen=True)
class Definition(Generic[_Tag]):
    """A macro or a block, and the template it is in."""

    node: _Tag
    source: Source


# The one that counts first, those that `super()` reaches after it.
BlockChain = tuple[Definition[nodes.Block], ...]


@dataclass(frozen=True)
class Scope:
    """A place of the walk through a template. path: of the calls and includes that led here."""

    source: Source
    path: Path = ()
    macros: Mapping[str, Definition[nodes.Macro]] = field(default_factory=dict)
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
        """Return the place of a node in what is being walked."""
        return (*self.path, (self.source.name, self.source.numbers[id(node)]))


def _bindings(source: Source) -> Iterator[tuple[str, Definition[nodes.Macro] | None]]:
    """Yield every name that the template gives a meaning, and the macro it means, if any."""
    for name in source.tree.find_all(nodes.Name):
        if name.ctx in ("store", "param"):
            yield name.name, None
    for macro in source.tree.find_all(nodes.Macro):
        yield macro.name, Definition(macro, source)
    for tag in source.tree.find_all(nodes.Import):
        yield from _imported(source, tag)
    for named in source.tree.find_all(nodes.FromImport):
        yield from _imported(source, named)


def _imported(
    source: Source, tag: nodes.Import | nodes.FromImport
) -> Iterator[tuple[str, Definition[nodes.Macro] | None]]:
    exported = {}
    if isinstance(tag.template, nodes.Const) and isinstance(tag.template.value, str):
        library = source.load(tag.template.value, tag)
        exported = {
            node.name: Definition(node, library) for node in library.tree.find_all(nodes.Macro)
        }
    if isinstance(tag, nodes.Import):
        yield tag.target, None
        for name, definition in exported.items():
            yield f"{tag.target}.{name}", definition
        return
    for imported in tag.names:
        name, alias = imported if isinstance(imported, tuple) else (imported, imported)
        yield alias, exported.get(name)
