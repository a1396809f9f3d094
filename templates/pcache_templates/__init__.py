"""Templates that describe families of prompts, their schemas, and prompts that fit these."""

from pcache_core.pml.nodes import Module, Param, Role, Schema, Slot, Text, Union
from pcache_templates.base import ChatTemplate, GivenTurns, PromptTemplate, TurnTemplate
from pcache_templates.flat import BraceTemplate, FormatTemplate
from pcache_templates.jinja import ChatTurn, JinjaTemplate, sandbox
from pcache_templates.jinja_trace import ChatTag
from pcache_templates.mustache import MustacheTemplate
from pcache_templates.pml import to_pml
from pcache_templates.program import PromptProgram, prompt_program

__all__ = [
    "BraceTemplate",
    "ChatTag",
    "ChatTemplate",
    "ChatTurn",
    "FormatTemplate",
    "GivenTurns",
    "JinjaTemplate",
    "Module",
    "MustacheTemplate",
    "Param",
    "PromptProgram",
    "PromptTemplate",
    "Role",
    "Schema",
    "Slot",
    "Text",
    "TurnTemplate",
    "Union",
    "prompt_program",
    "sandbox",
    "to_pml",
]
