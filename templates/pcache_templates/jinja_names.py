"""What to call an expression of a Jinja2 template."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes

from pcache_templates.names import xml_name


def expression_name(node: nodes.Node) -> str:
    """`user.name` for itself, `date-strftime` for `date | strftime`, `not-premium` for a test."""
    return xml_name(_words(node))


def _words(node: nodes.Node) -> Iterator[str]:
    match node:
        case nodes.Name():
            yield node.name
        case nodes.Getattr() | nodes.Getitem() if (dotted := _dotted(node)) is not None:
            yield dotted
        case nodes.Const():
            yield str(node.value)
        case nodes.Not():
            yield "not"
            yield from _words(node.node)
        case nodes.And() | nodes.Or():
            yield from _words(node.left)
            yield type(node).__name__.lower()
            yield from _words(node.right)
        case nodes.Operand():
            yield node.op
            yield from _words(node.expr)
        case _:
            for child in node.iter_child_nodes():
                yield from _words(child)
            if isinstance(node, nodes.Filter | nodes.Test):
                yield node.name


def _dotted(node: nodes.Node) -> str | None:
    """`a.b.c`, or None for anything but names and constant keys."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        inner, key = _dotted(node.node), node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        inner, key = _dotted(node.node), str(node.arg.value)
    else:
        return None
    return None if inner is None else f"{inner}.{key}"


def names_in(node: nodes.Node) -> set[str]:
    """The variables an expression reads."""
    found = {node.name} if isinstance(node, nodes.Name) else set()
    return found | {name.name for name in node.find_all(nodes.Name)}
