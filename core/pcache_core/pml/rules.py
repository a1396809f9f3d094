"""What each element may hold, read out of a RelaxNG grammar: the words of its error messages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lxml import etree

ANY = "*"
"""Stands for every name that is not listed."""

_RNG = "{http://relaxng.org/ns/structure/1.0}"
_POSITIVE = re.compile(r"\s*\+?0*[1-9][0-9]*\s*")


@dataclass(frozen=True, slots=True)
class Attribute:
    """values: the ones allowed, if they are listed. pattern, kind: of others, kind in words."""

    values: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """What an element may hold. required: groups of attributes, of each of which one is there."""

    attributes: dict[str, Attribute] = field(default_factory=dict)
    required: list[tuple[str, ...]] = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    texts: list[etree._Element] = field(default_factory=list)


class Rules:
    """Of every element of a grammar file; those with any name are under `ANY`."""

    def __init__(self, grammar: etree._Element) -> None:
        self._defines = {
            str(define.get("name")): define for define in grammar.iter(f"{_RNG}define")
        }
        pattern = str(self._defines["name"].findtext(f".//{_RNG}param"))
        self.name_pattern: re.Pattern[str] = re.compile(pattern)
        self._rules: dict[str, Rule] = {}
        for element in grammar.iter(f"{_RNG}element"):
            rule = self._rules[_name(element)] = Rule()
            self._read(element, rule, required=rule.required)

    def __getitem__(self, tag: str) -> Rule:
        return self._rules[self.name_of(tag)]

    @property
    def tags(self) -> list[str]:
        """Names of all elements."""
        return list(self._rules)

    def name_of(self, tag: str) -> str:
        """The name under which an element's rule stands."""
        return tag if tag in self._rules else ANY

    def _read(self, node: etree._Element, rule: Rule, *, required: list[tuple[str, ...]]) -> None:
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
                    rule.texts.append(child)
                case "ref":
                    self._read(self._defines[str(child.get("name"))], rule, required=required)
                case "choice" if child[0].tag == f"{_RNG}attribute":
                    required.append(tuple(_name(option) for option in child))
                    self._read(child, rule, required=optional)
                case "optional" | "zeroOrMore" | "oneOrMore" | "choice":
                    self._read(child, rule, required=optional)

    def _attribute(self, node: etree._Element) -> Attribute:
        if node.find(f"{_RNG}data[@type='positiveInteger']") is not None:
            return Attribute((), _POSITIVE, "a whole number above 0")
        if node.find(f"{_RNG}ref[@name='name']") is not None:
            return Attribute(
                (),
                self.name_pattern,
                "a name: a letter or '_', then up to 127 letters, digits, '.', '_' or '-'",
            )
        return Attribute(tuple(str(value.text) for value in node.iter(f"{_RNG}value")))


def _name(node: etree._Element) -> str:
    return node.get("name") or ANY
