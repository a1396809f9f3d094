"""Parsed Jinja2 templates: what they are called, which macros and blocks they define."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateNotFound, TemplateSyntaxError

from pcache_core.errors import TemplateError
from pcache_templates.jinja_trace import numbers


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
        """Another template, as this one's `tag` names it. Raises: TemplateError: it isn't there."""
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
        """An error that says where in the template it is."""
        return TemplateError(f"{self.label}:{node.lineno}: {message}")


@dataclass(frozen=True)
class MacroDefinition:
    """A macro and the template it is in."""

    node: nodes.Macro
    source: Source


@dataclass(frozen=True)
class BlockDefinition:
    """A `block` tag and the template it is in."""

    node: nodes.Block
    source: Source


# The one that counts first, those that `super()` reaches after it.
BlockChain = tuple[BlockDefinition, ...]


def macros_of(source: Source) -> dict[str, MacroDefinition]:
    """The macros that a template can call by a name that means nothing else in it."""
    found: dict[str, MacroDefinition] = {}
    bound: Counter[str] = Counter()
    for name, definition in _bindings(source):
        bound[name] += 1
        if definition is not None:
            found[name] = definition
    return {name: definition for name, definition in found.items() if bound[name] == 1}


def _bindings(source: Source) -> Iterator[tuple[str, MacroDefinition | None]]:
    """Every name that the template gives a meaning, and the macro it means, if any."""
    for name in source.tree.find_all(nodes.Name):
        if name.ctx in ("store", "param"):
            yield name.name, None
    for macro in source.tree.find_all(nodes.Macro):
        yield macro.name, MacroDefinition(macro, source)
    for tag in source.tree.find_all(nodes.Import):
        yield from _imported(source, tag)
    for named in source.tree.find_all(nodes.FromImport):
        yield from _imported(source, named)


def _imported(
    source: Source, tag: nodes.Import | nodes.FromImport
) -> Iterator[tuple[str, MacroDefinition | None]]:
    exported = {}
    if isinstance(tag.template, nodes.Const) and isinstance(tag.template.value, str):
        library = source.load(tag.template.value, tag)
        exported = {
            node.name: MacroDefinition(node, library) for node in library.tree.find_all(nodes.Macro)
        }
    if isinstance(tag, nodes.Import):
        yield tag.target, None
        for name, definition in exported.items():
            yield f"{tag.target}.{name}", definition
        return
    for imported in tag.names:
        name, alias = imported if isinstance(imported, tuple) else (imported, imported)
        yield alias, exported.get(name)
