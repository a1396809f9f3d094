"""Jinja2 environments whose templates write traced text, and the tag that marks a chat's turns.

Jinja's own compiler is used; only the statements that write output are changed, to attach the place
in the template to what they write. So a traced template renders what a plain one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jinja2 import Environment, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context

from pcache_core.pml.nodes import ROLES
from pcache_templates import trace
from pcache_templates.trace import Traced

# The variable that turns are collected in; no template can spell its name.
TURNS = "turns of the chat"


class Turn(NamedTuple):
    """A turn that a template has written."""

    role: str
    text: Traced


class ChatTag(Extension):
    """Collects what is written between the tags as a turn, and writes it.

    White space around it is not part of the turn.
    """

    tags: set[str] = {"chat"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the tag and what is in it."""
        line = next(parser.stream).lineno
        if parser.stream.expect("name").value != "role":
            parser.fail('chat takes a role, as in {% chat role="user" %}', line)
        parser.stream.expect("assign")
        role = parser.stream.expect("string").value
        if role not in ROLES:
            parser.fail(f"unknown role {role!r}; use one of {', '.join(ROLES)}", line)
        body = parser.parse_statements(("name:endchat",), drop_needle=True)
        call = self.call_method("_collect", [nodes.ContextReference(), nodes.Const(role)])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _collect(self, context: Context, role: str, caller: Callable[[], str]) -> str:
        text = trace.strip(trace.concat([caller()]))
        turns = context.resolve_or_missing(TURNS)
        if isinstance(turns, list):
            turns.append(Turn(role, text))
        return text


def role_of(node: nodes.CallBlock) -> str | None:
    """Return the role, if the node is a chat tag; None for a call block."""
    callee = node.call.node
    if isinstance(callee, nodes.ExtensionAttribute) and callee.identifier == ChatTag.identifier:
        role = node.call.args[1]
        assert isinstance(role, nodes.Const)
        return str(role.value)
    return None


def traced_environment(environment: Environment) -> Environment:
    """Return an environment with the settings, filters, globals and loader of `environment`.

    Its templates render `Traced` text. Extensions come along; `environment` stays as it is.
    """
    # Code compiled for tracing must not meet the plain code of the same template in a cache.
    traced = environment.overlay(cache_size=400, enable_async=False, bytecode_cache=None)
    vars(traced).update(
        code_generator_class=TracingCodeGenerator,
        concat=trace.concat,
        trace_literal=trace.literal,
        trace_value=_trace_value,
        trace_output=_trace_output,
    )
    return traced


def numbers(template: nodes.Template) -> dict[int, int]:
    """Return a number for every node of a parsed template, by the node's `id()`.

    Parsing the same source again gives the same numbers.
    """
    return {id(node): number for number, node in enumerate(_preorder(template))}


def _preorder(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _preorder(child)


def _trace_value(path: tuple[Any, ...], convert: Callable[[Any], str], value: Any) -> str:
    """Return what `{{ value }}` writes. Escaping changes the text, so its places are lost."""
    if isinstance(value, trace.Traced) and convert is str:
        return trace.value(path, value)
    return trace.value(path, str(convert(value)))


def _trace_output(path: tuple[Any, ...], output: Any) -> Any:
    """Return what a tag writes as it is. Anything but a string fails when it is joined, as ever."""
    return trace.value(path, output) if isinstance(output, str) else output


class TracingCodeGenerator(CodeGenerator):
    """Writes every part of the output by itself, together with its place."""

    _numbers: dict[int, int]
    # The node whose output is being written.
    _writing: nodes.Node | None = None
    # The include tag around what is being written, if its output passes through.
    _including: nodes.Include | None = None
    _is_wrapped = False

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """Number the nodes first."""
        self._numbers = numbers(node)
        super().visit_Template(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        """Write each child apart from its neighbours."""
        for child in node.nodes:
            self._writing = child
            super().visit_Output(nodes.Output([child], lineno=node.lineno), frame)

    def visit_Include(self, node: nodes.Include, frame: Frame) -> None:
        """Attach the include tag to what the included template writes."""
        self._including = node
        super().visit_Include(node, frame)
        self._including = None

    def start_write(self, frame: Frame, node: nodes.Node | None = None) -> None:
        """Begin a statement that writes what a tag such as `call` or `filter` returns."""
        super().start_write(frame, node)
        writer = node or self._including
        self._is_wrapped = writer is not None
        if writer is not None:
            self.write(f"environment.trace_output({self._path(writer)}, ")

    def end_write(self, frame: Frame) -> None:
        """End such a statement."""
        if self._is_wrapped:
            self.write(")")
        super().end_write(frame)

    def _output_const_repr(self, group: Any) -> str:
        text = super()._output_const_repr(group)
        return f"environment.trace_literal({self._path(self._writing)}, {text})"

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        path = self._path(self._writing)
        if isinstance(node, nodes.TemplateData):
            self.write(f"environment.trace_literal({path}, str(")
            return
        convert = "escape" if frame.eval_ctx.autoescape else "str"
        if frame.eval_ctx.volatile:
            convert = "(escape if context.eval_ctx.autoescape else str)"
        self.write(f"environment.trace_value({path}, {convert}, ")
        if finalize.src is not None:
            self.write(finalize.src)

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if isinstance(node, nodes.TemplateData):
            self.write("))")
        else:
            super()._output_child_post(node, frame, finalize)

    def _path(self, node: nodes.Node | None) -> str:
        assert node is not None
        return repr(((self.name, self._numbers[id(node)]),))
