"""The RelaxNG grammars: they decide what is PML, and say what was expected where it is not."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lxml import etree

from pcache_core.errors import PMLError
from pcache_core.pml.markup import Chars, Element, Markup
from pcache_core.pml.source import hint, quoted, shortened

GrammarName = Literal["schema", "prompt"]
ANY = "*"
"""Stands for every name that is not listed."""

_RNG = "{http://relaxng.org/ns/structure/1.0}"
_POSITIVE = re.compile(r"\s*\+?0*[1-9][0-9]*\s*")


@dataclass(frozen=True, slots=True)
class AttributeRule:
    """values: the ones allowed, if they are listed. pattern, kind: of others, kind in words."""

    values: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    kind: str = ""


@dataclass(slots=True)
class ElementRule:
    """What an element may hold. required: groups of attributes, of each of which one is there."""

    attributes: dict[str, AttributeRule] = field(default_factory=dict)
    required: list[tuple[str, ...]] = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    holds_text: bool = False


class RelaxNG:
    """One of the shipped grammars.

    root: the name of the outermost element. rules: of every element; of those with any name, under
    `ANY`. name_pattern: of names of modules, parameters, slots and schemas.
    """

    def __init__(self, root: GrammarName) -> None:
        file = etree.parse(str(Path(__file__).with_name(f"{root}.rng")))
        self._validator = etree.RelaxNG(file)
        self._defines = {str(define.get("name")): define for define in file.iter(f"{_RNG}define")}
        pattern = str(self._defines["name"].findtext(f".//{_RNG}param"))
        self.root = root
        self.name_pattern: re.Pattern[str] = re.compile(pattern)
        self.rules: dict[str, ElementRule] = {}
        for element in file.iter(f"{_RNG}element"):
            rule = self.rules[_name(element)] = ElementRule()
            self._read(element, rule, required=rule.required)

    def rule(self, tag: str) -> ElementRule:
        """Return the rule of an element."""
        return self.rules.get(tag) or self.rules[ANY]

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
        rule = self.rule(element.tag)
        message = _wrong_attribute(element, rule)
        if message is not None:
            return markup.source.error(message, element.line)
        for part in element.parts:
            if isinstance(part, Chars):
                if part.text.strip(" \t\n") and not rule.holds_text:
                    return markup.source.error(_wrong_text(element, rule), part.line)
                continue
            name = part.tag if part.tag in self.rules else ANY
            if name not in rule.children:
                return markup.source.error(_wrong_child(element, part, rule), part.line)
            error = self._first_error(markup, part)
            if error is not None:
                return error
        if element.tag == "union" and all(isinstance(part, Chars) for part in element.parts):
            return markup.source.error("<union> is empty; expected <module>", element.line)
        return None

    def _read(
        self, node: etree._Element, rule: ElementRule, *, required: list[tuple[str, ...]]
    ) -> None:
        """Gather what a pattern holds. required: gets attributes that must be there."""
        optional: list[tuple[str, ...]] = []
        for child in node.iterchildren(f"{_RNG}*"):
            match etree.QName(child).localname:
                case "attribute":
                    rule.attributes[_name(child)] = self._attribute(child)
                    required.append((_name(child),))
                case "element":
                    rule.children.append(_name(child))
                case "text":
                    rule.holds_text = True
                case "ref":
                    self._read(self._defines[str(child.get("name"))], rule, required=required)
                case "choice" if child[0].tag == f"{_RNG}attribute":
                    required.append(tuple(_name(option) for option in child))
                    self._read(child, rule, required=optional)
                case "optional" | "zeroOrMore" | "oneOrMore" | "choice":
                    self._read(child, rule, required=optional)

    def _attribute(self, node: etree._Element) -> AttributeRule:
        if node.find(f"{_RNG}data[@type='positiveInteger']") is not None:
            return AttributeRule((), _POSITIVE, "a whole number above 0")
        if node.find(f"{_RNG}ref[@name='name']") is not None:
            kind = "a name: a letter or '_', then up to 127 letters, digits, '.', '_' or '-'"
            return AttributeRule((), self.name_pattern, kind)
        return AttributeRule(tuple(str(value.text) for value in node.iter(f"{_RNG}value")))


@functools.cache
def grammar(name: GrammarName) -> RelaxNG:
    """Return the grammar of schemas or that of prompts, read once."""
    return RelaxNG(name)


def is_name(text: str) -> bool:
    """Tell whether a text may name a module, parameter, slot or schema."""
    return grammar("schema").name_pattern.fullmatch(text) is not None


def _name(node: etree._Element) -> str:
    return node.get("name") or ANY


def _wrong_attribute(element: Element, rule: ElementRule) -> str | None:
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


def _wrong_text(element: Element, rule: ElementRule) -> str:
    return f"<{element.tag}> holds no text; expected {_listed(rule.children)}"


def _wrong_child(element: Element, child: Element, rule: ElementRule) -> str:
    names = [name for name in rule.children if name != ANY]
    inside = f"<{shortened(child.tag)}> can't stand in <{shortened(element.tag)}>"
    if not rule.children and rule.holds_text:
        return f"{inside}, which holds only text; write &lt; for a literal '<', or use CDATA"
    return f"{inside}; {hint(child.tag, names) if names else f'expected {_listed(names)}'}"


def _listed(names: list[str]) -> str:
    listed = [f"<{name}>" for name in names if name != ANY]
    return " or ".join(listed) or "nothing"
