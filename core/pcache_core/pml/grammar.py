"""The RelaxNG grammars: they decide what is PML, and say what was expected where it is not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from lxml import etree

from pcache_core.errors import PMLError
from pcache_core.pml.markup import Chars, Element, Markup
from pcache_core.pml.rules import ANY, Rule, Rules
from pcache_core.pml.source import hint, quoted, shortened

GrammarName = Literal["schema", "prompt"]


class Grammar:
    """One of the shipped grammars. root: the name of the outermost element."""

    def __init__(self, root: GrammarName) -> None:
        file = etree.parse(str(Path(__file__).with_name(f"{root}.rng")))
        self.root = root
        self.rules: Rules = Rules(file.getroot())
        self._validator = etree.RelaxNG(file)

    def check(self, markup: Markup) -> None:
        """Refuse a document that the grammar refuses.

        Raises: PMLError: with the line and what was expected there.
        """
        if self._validator.validate(markup.tree):
            return
        root = markup.root
        if root.tag != self.root:
            raise markup.source.error(
                f"expected <{self.root} …>, got <{shortened(root.tag)}>", root.line
            )
        error = self._first_error(markup, root)
        if error is None:
            last = self._validator.error_log.last_error
            error = markup.source.error(f"not PML: {last.message}", last.line)
        raise error

    def _first_error(self, markup: Markup, element: Element) -> PMLError | None:
        rule = self.rules[element.tag]
        message = _wrong_attribute(element, rule)
        if message is not None:
            return markup.source.error(message, element.line)
        for part in element.parts:
            if isinstance(part, Chars):
                if part.text.strip(" \t\n") and not rule.texts:
                    return markup.source.error(_wrong_text(element, rule), part.line)
                continue
            if self.rules.name_of(part.tag) not in rule.children:
                return markup.source.error(_wrong_child(element, part, rule), part.line)
            error = self._first_error(markup, part)
            if error is not None:
                return error
        if element.tag == "union" and all(isinstance(part, Chars) for part in element.parts):
            return markup.source.error("<union> is empty; expected <module>", element.line)
        return None


@functools.cache
def grammar(name: GrammarName) -> Grammar:
    """The grammar of schemas or that of prompts, read once."""
    return Grammar(name)


def is_name(text: str) -> bool:
    """Whether a text may name a module, parameter, slot or schema."""
    return grammar("schema").rules.name_pattern.fullmatch(text) is not None


def _wrong_attribute(element: Element, rule: Rule) -> str | None:
    tag = element.tag
    for name, value in element.attributes.items():
        known = rule.attributes.get(name) or rule.attributes.get(ANY)
        if known is None or (name.startswith("xml:") and name not in rule.attributes):
            names = [other for other in rule.attributes if other != ANY]
            return f"<{shortened(tag)}> has no attribute {quoted(name)}; {hint(name, names)}"
        if known.values and value not in known.values:
            return f"{name}={quoted(value)} is none of: {', '.join(known.values)}"
        if known.pattern is not None and not known.pattern.fullmatch(value):
            return f"{name}={quoted(value)} is not {known.kind}"
    for group in rule.required:
        given = [name for name in group if name in element.attributes]
        if not given:
            return f"<{tag}> needs the attribute {' or '.join(group)}"
        if len(given) > 1:
            return f"<{tag}> has {' and '.join(given)}, which mean the same; keep one"
    return None


def _wrong_text(element: Element, rule: Rule) -> str:
    return f"<{element.tag}> holds no text; expected {_listed(rule.children)}"


def _wrong_child(element: Element, child: Element, rule: Rule) -> str:
    names = [name for name in rule.children if name != ANY]
    inside = f"<{shortened(child.tag)}> can't stand in <{shortened(element.tag)}>"
    if not rule.children and rule.texts:
        return f"{inside}, which holds only text; write &lt; for a literal '<', or use CDATA"
    return f"{inside}; {hint(child.tag, names) if names else f'expected {_listed(names)}'}"


def _listed(names: list[str]) -> str:
    listed = [f"<{name}>" for name in names if name != ANY]
    return " or ".join(listed) or "nothing"
