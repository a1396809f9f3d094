"""A Jinja2 template's syntax tree made a template tree.

What is conditional becomes a module, what excludes each other a union, a loop a slot, an expression
a parameter. Macros, blocks and other templates are followed wherever the template says by name
which one it means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from jinja2 import nodes

from pcache_core.errors import TemplateError
from pcache_templates.jinja_source import BlockChain, Definition, Scope, Source
from pcache_templates.jinja_trace import role_of
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

_WRITES_NOTHING = (
    *(nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.Import, nodes.FromImport),
    *(nodes.ExprStmt, nodes.Break, nodes.Continue, nodes.EvalContextModifier),
)


def template_tree(source: Source) -> list[Node]:
    """Make the tree of a template.

    Raises: TemplateError: it has a tag, or uses one, in a way that no schema can express.
    """
    tree = _root(source, Scope(source))
    if any(node.kind == "role" for node in walk(tree)):
        return turns_only(tree)  # what is written around turns is in none of them
    return tree


def _root(source: Source, scope: Scope) -> list[Node]:
    """Make the tree of a whole template, with the one that it extends."""
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


def _visit(node: nodes.Node, scope: Scope) -> Iterable[Node]:  # noqa: C901 (one case a statement)
    match node:
        case nodes.Output():
            return (made for child in node.nodes for made in _expression(child, scope))
        case nodes.If():
            return [_if(node, scope)]
        case nodes.For():
            return _for(node, scope)
        case nodes.CallBlock():
            return _call_block(node, scope)
        case nodes.FilterBlock():
            return [Node("param", f"filter-{node.filter.name}", origin=scope.path_of(node))]
        case nodes.Include():
            return _include(node, scope)
        case nodes.Block():
            body = _block_body(scope.blocks[node.name], scope)
            return [Node("module", f"block-{node.name}", tuple(body))]
        case nodes.ScopedEvalContextModifier():
            return _visit_all(node.body, replace(scope, in_autoescape=True))
        case nodes.With() | nodes.Scope():
            return _visit_all(node.body, scope)
    if isinstance(node, _WRITES_NOTHING):
        return []
    tag = type(node).__name__
    raise scope.source.error(node, f"the tag {tag!r} of an extension has no counterpart in PML")


def _module(name: str, body: Iterable[nodes.Node], scope: Scope) -> Node:
    return Node("module", name, tuple(_visit_all(body, scope)))


def _constant_name(template: nodes.Expr, tag: nodes.Node, scope: Scope) -> str:
    if isinstance(template, nodes.Const) and isinstance(template.value, str):
        return template.value
    word = type(tag).__name__.lower()
    raise scope.source.error(tag, f"{word} computes the template's name; write the name out")


def _expression(node: nodes.Expr, scope: Scope) -> list[Node]:
    path = scope.path_of(node)
    if (text := _constant(node, scope)) is not None:
        return [Node("text", text, origin=path)]
    if isinstance(node, nodes.Call) and (called := _call(node, path, scope)) is not None:
        return [called]
    kind: ValueKind = "document" if _names_in(node) & scope.items else "argument"
    return [Node("param", _name_of(node), (), path, kind)]


def _constant(node: nodes.Expr, scope: Scope) -> str | None:
    """Return what the node always writes; None if that is known only at run time."""
    if isinstance(node, nodes.TemplateData):
        return node.data
    environment = scope.source.environment
    if environment.finalize is not None or scope.escapes:
        return None
    try:
        return str(node.as_const(nodes.EvalContext(environment)))
    except Exception:  # as the compiler does, which tries the same
        return None


def _call(
    node: nodes.Call, path: Path, scope: Scope, block: nodes.CallBlock | None = None
) -> Node | None:
    """Make what a call of a macro, of `caller` or of `super` writes; None for any other call.

    block: the tag that makes the call, if one does.
    """
    if scope.escapes:
        return None
    name = _name_of(node.node)
    if name == "caller" and scope.caller is not None:
        body, outer = scope.caller
        inner = replace(outer, path=path, stack=scope.stack)
        return _expanded("caller", node, _visit_all(body.body, inner), scope)
    if name == "super" and scope.parents:
        written = _block_body(scope.parents, replace(scope, path=path))
        return _expanded(f"super-{scope.parents[0].node.name}", node, written, scope)
    definition = scope.macros.get(name)
    if definition is None:
        return None
    macro, source = definition.node, definition.source
    key = (source.name, macro.name)
    if key in scope.stack:
        return None
    inner = Scope(
        source,
        path,
        macros=scope.macros if source is scope.source else source.macros,
        blocks=scope.blocks,
        caller=(block, scope) if block is not None else None,
        items=_passed_items(node, macro, scope.items),
        stack=scope.stack | {key},
    )
    return _expanded(f"call-{macro.name}", node, _visit_all(macro.body, inner), scope)


def _expanded(name: str, node: nodes.Node, body: list[Node], scope: Scope) -> Node:
    """Make a module of what `node` calls or includes."""
    if are_too_many(body):
        raise scope.source.error(node, f"{name!r} has over {MAX_NODES:,} parts; call less in it")
    return Node("module", name, tuple(body))


def _passed_items(call: nodes.Call, macro: nodes.Macro, items: frozenset[str]) -> frozenset[str]:
    """Return the macro's parameters that get one of the caller's items."""
    given = dict(zip((parameter.name for parameter in macro.args), call.args, strict=False))
    given |= {keyword.key: keyword.value for keyword in call.kwargs}
    return frozenset(name for name, argument in given.items() if _names_in(argument) & items)


def _call_block(node: nodes.CallBlock, scope: Scope) -> list[Node]:
    if (role := role_of(node)) is not None:
        return [Node("role", role, stripped(_visit_all(node.body, scope)))]
    callee = node.call.node
    if isinstance(callee, nodes.ExtensionAttribute):
        tag = callee.identifier.rsplit(".", 1)[-1]
        raise scope.source.error(node, f"the tag of {tag} has no counterpart in PML")
    path = scope.path_of(node)
    called = _call(node.call, path, scope, node)
    return [called or Node("param", xml_name(["call", _name_of(callee)]), origin=path)]


def _if(node: nodes.If, scope: Scope) -> Node:
    branches = [
        _module(f"if-{_name_of(branch.test)}", branch.body, scope) for branch in (node, *node.elif_)
    ]
    if node.else_:
        branches.append(_module("else", node.else_, scope))
    return Node("union", parts=tuple(branches))


def _for(node: nodes.For, scope: Scope) -> Iterator[Node]:
    items = scope.items | _names_in(node.target)
    body = tuple(_visit_all(node.body, replace(scope, items=items)))
    if body:
        yield Node("slot", f"for-{_name_of(node.target)}", body, scope.path_of(node))
    if node.else_:
        yield _module("else", node.else_, scope)


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
    """Load the included template, the first there is of several; None where it may be missing."""
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


def _block_body(chain: BlockChain, scope: Scope) -> list[Node]:
    definition, *parents = chain
    inner = replace(scope, source=definition.source, parents=tuple(parents))
    return _visit_all(definition.node.body, inner)


def _name_of(node: nodes.Node) -> str:
    """Name an expression: `user.name`, `date-strftime` for `date | strftime`, `not-premium`."""
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
    """Write `a.b.c` out; None for anything but names and constant keys."""
    match node:
        case nodes.Name():
            return node.name
        case nodes.Getattr():
            inner, key = node.node, node.attr
        case nodes.Getitem(arg=nodes.Const(value=value)):
            inner, key = node.node, str(value)
        case _:
            return None
    before = _dotted(inner)
    return None if before is None else f"{before}.{key}"


def _names_in(node: nodes.Node) -> frozenset[str]:
    """Return the variables that an expression names."""
    found = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return frozenset(name.name for name in found)
