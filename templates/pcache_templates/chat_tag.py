"""The tag `{% chat role="system" %} … {% endchat %}`: a chat turn in a Jinja2 template."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jinja2 import nodes
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
