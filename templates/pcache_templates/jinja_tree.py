"""A Jinja2 template's syntax tree made a template tree.

What is conditional becomes a module, what excludes each other a union, a loop a slot, an expression
a parameter. Macros, blocks and other templates are followed wherever the template says by name
which one it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from jinja2 import nodes

from pcache_core.errors import TemplateError
from pcache_templates.chat_tag import role_of
from pcache_templates.jinja_source import BlockChain, Definition, Scope, Source
from pcache_templates.tree import (
    MAX_NODES,
    Node,
    Path,
    ValueKind,
    are_too_many,
    stripped,
    turns_only,
    walk,
    xml_name,
)


def template_tree(source: Source) -> list[Node]:
    """Make the tree of a template.

    Raises: TemplateError: it has a tag, or uses one, in a way that no schema can express.
    """
    tree = _root(source, Scope(source))
    if any(part.kind == "role" for part in walk(tree)):
        return turns_only(tree)  # what is written around turns is in none of them
    return tree


def _root(source: Source, scope: Scope) -> list[Node]:
    """A whole template, with the one that it extends."""
    if (source.name,) in scope.stack:
        raise source.error(source.tree, "the template includes or extends itself")
    blocks = dict(scope.blocks)
    for block in source.tree.find_all(nodes.Block):
        blocks[block.name] = (*blocks.get(block.name, ()), Definition(block, source))
    scope = replace(
        scope,
        source=source,
        macros={**scope.macros, **source.macros},
        blocks=blocks,
        stack=scope.stack | {(source.name,)},
    )
    extends = list(source.tree.find_all(nodes.Extends))
    if not extends:
        return _visit_all(source.tree.body, scope)
    tag = extends[0]
    if len(extends) > 1 or tag not in source.tree.body:
        raise source.error(tag, "extends stands in a condition; a schema has one parent template")
    before = source.tree.body[: source.tree.body.index(tag)]
    parent = source.load(_constant_name(tag.template, tag, scope), tag)
    return [*_visit_all(before, scope), *_root(parent, scope)]


def _visit_all(body: Iterable[nodes.Node], scope: Scope) -> list[Node]:
    return [made for node in body for made in _visit(node, scope)]


def _visit(node: nodes.Node, scope: Scope) -> list[Node]:
    for kind, make in _MAKERS.items():
        if isinstance(node, kind):
            return make(node, scope)
    tag = type(node).__name__
    raise scope.source.error(node, f"the tag {tag!r} of an extension has no counterpart in PML")


def _constant_name(template: nodes.Expr, tag: nodes.Node, scope: Scope) -> str:
    if isinstance(template, nodes.Const) and isinstance(template.value, str):
        return template.value
    word = type(tag).__name__.lower()
    raise scope.source.error(tag, f"{word} computes the template's name; write the name out")


def _output(node: nodes.Output, scope: Scope) -> list[Node]:
    return [made for child in node.nodes for made in _expression(child, scope)]


def _expression(node: nodes.Expr, scope: Scope) -> list[Node]:
    path = scope.path_of(node)
    if (text := _constant(node, scope)) is not None:
        return [Node("text", text, origin=path)]
    if isinstance(node, nodes.Call) and (called := _call(node, path, scope)) is not None:
        return called
    kind: ValueKind = "document" if names_in(node) & scope.items else "argument"
    return [Node("param", expression_name(node), (), path, kind)]


def _constant(node: nodes.Expr, scope: Scope) -> str | None:
    """What the node always writes; None if that is known only at run time."""
    if isinstance(node, nodes.TemplateData):
        return node.data
    environment = scope.source.environment
    if environment.finalize is not None or scope.escapes:
        return None
    try:
        return str(node.as_const(nodes.EvalContext(environment)))
    except Exception:  # as the compiler does, which tries the same
        return None


def _call(node: nodes.Call, path: Path, scope: Scope) -> list[Node] | None:
    """What a call of a macro, of `caller` or of `super` writes; None for any other call."""
    if scope.escapes:
        return None
    name = expression_name(node.node)
    if name == "caller" and scope.caller is not None:
        block, outer = scope.caller
        inner = replace(outer, path=path, stack=scope.stack)
        return [_expanded("caller", node, _visit_all(block.body, inner), scope)]
    if name == "super" and scope.parents:
        body = _block_body(scope.parents, replace(scope, path=path))
        return [_expanded(f"super-{scope.parents[0].node.name}", node, body, scope)]
    return _macro(node, path, scope, None)


def _macro(
    call: nodes.Call, path: Path, scope: Scope, caller: nodes.CallBlock | None
) -> list[Node] | None:
    definition = scope.macros.get(expression_name(call.node))
    if definition is None:
        return None
    macro = definition.node
    key = (definition.source.name, macro.name)
    if key in scope.stack:
        return None
    same_template = definition.source is scope.source
    inner = Scope(
        definition.source,
        path,
        macros=scope.macros if same_template else definition.source.macros,
        blocks=scope.blocks,
        caller=(caller, scope) if caller is not None else None,
        items=_passed_items(call, macro, scope.items),
        stack=scope.stack | {key},
    )
    return [_expanded(f"call-{macro.name}", call, _visit_all(macro.body, inner), scope)]


def _expanded(name: str, node: nodes.Node, body: list[Node], scope: Scope) -> Node:
    """A module of what `node` calls or includes."""
    if are_too_many(body):
        raise scope.source.error(node, f"{name!r} has over {MAX_NODES:,} parts; call less in it")
    return Node("module", name, tuple(body))


def _passed_items(call: nodes.Call, macro: nodes.Macro, items: frozenset[str]) -> frozenset[str]:
    """The macro's parameters that get one of the caller's items."""
    given = dict(zip((parameter.name for parameter in macro.args), call.args, strict=False))
    given |= {keyword.key: keyword.value for keyword in call.kwargs}
    return frozenset(name for name, argument in given.items() if names_in(argument) & items)


def _call_block(node: nodes.CallBlock, scope: Scope) -> list[Node]:
    if (role := role_of(node)) is not None:
        return [Node("role", role, stripped(_visit_all(node.body, scope)))]
    callee = node.call.node
    if isinstance(callee, nodes.ExtensionAttribute):
        tag = callee.identifier.rsplit(".", 1)[-1]
        raise scope.source.error(node, f"the tag of {tag} has no counterpart in PML")
    path = scope.path_of(node)
    called = None if scope.escapes else _macro(node.call, path, scope, node)
    return called or [Node("param", xml_name(["call", expression_name(callee)]), origin=path)]


def _filter_block(node: nodes.FilterBlock, scope: Scope) -> list[Node]:
    return [Node("param", f"filter-{node.filter.name}", origin=scope.path_of(node))]


def _if(node: nodes.If, scope: Scope) -> list[Node]:
    branches = [
        _module(f"if-{expression_name(branch.test)}", branch.body, scope)
        for branch in (node, *node.elif_)
    ]
    if node.else_:
        branches.append(_module("else", node.else_, scope))
    return [Node("union", parts=tuple(branches))]


def _module(name: str, body: Iterable[nodes.Node], scope: Scope) -> Node:
    return Node("module", name, tuple(_visit_all(body, scope)))


def _for(node: nodes.For, scope: Scope) -> list[Node]:
    targets = [node.target, *node.target.find_all(nodes.Name)]
    items = frozenset(target.name for target in targets if isinstance(target, nodes.Name))
    body = _visit_all(node.body, replace(scope, items=scope.items | items))
    made: list[Node] = []
    if body:
        name = f"for-{expression_name(node.target)}"
        made.append(Node("slot", name, tuple(body), scope.path_of(node)))
    if node.else_:
        made.append(_module("else", node.else_, scope))
    return made


def _include(node: nodes.Include, scope: Scope) -> list[Node]:
    source = _included(node, scope)
    if source is None:
        return []
    path = scope.path_of(node)
    inner = Scope(source, path, items=scope.items, stack=scope.stack)
    if node.with_context:
        inner = replace(inner, macros=scope.macros)
    else:
        inner = replace(inner, path=scope.path, items=frozenset())
    assert source.name is not None
    return [_expanded(f"include-{source.name}", node, _root(source, inner), scope)]


def _included(node: nodes.Include, scope: Scope) -> Source | None:
    """The included template, the first that exists of several; None where it may be missing."""
    template = node.template
    choices = template.items if isinstance(template, nodes.List | nodes.Tuple) else [template]
    for choice in choices:
        name = _constant_name(choice, node, scope)
        try:
            return scope.source.load(name, node)
        except TemplateError:
            if not node.ignore_missing and choice is choices[-1]:
                raise
    return None


def _block(node: nodes.Block, scope: Scope) -> list[Node]:
    body = _block_body(scope.blocks[node.name], scope)
    return [Node("module", f"block-{node.name}", tuple(body))]


def _block_body(chain: BlockChain, scope: Scope) -> list[Node]:
    definition, *parents = chain
    inner = replace(scope, source=definition.source, parents=tuple(parents))
    return _visit_all(definition.node.body, inner)


def _body(node: Any, scope: Scope) -> list[Node]:
    return _visit_all(node.body, scope)


def _autoescape(node: nodes.ScopedEvalContextModifier, scope: Scope) -> list[Node]:
    return _visit_all(node.body, replace(scope, in_autoescape=True))


def _nothing(node: nodes.Node, scope: Scope) -> list[Node]:
    return []


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


# What is made of each kind of statement.
_MAKERS: dict[Any, Callable[[Any, Scope], list[Node]]] = {
    nodes.Output: _output,
    nodes.If: _if,
    nodes.For: _for,
    nodes.CallBlock: _call_block,
    nodes.FilterBlock: _filter_block,
    nodes.Include: _include,
    nodes.Block: _block,
    nodes.With: _body,
    nodes.Scope: _body,
    nodes.ScopedEvalContextModifier: _autoescape,
    # These write nothing.
    (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.Import, nodes.FromImport): _nothing,
    (nodes.ExprStmt, nodes.Break, nodes.Continue, nodes.EvalContextModifier): _nothing,
}
