"""What modules are encoded after: a generic opening, then company in the module's own language.

A document that is encoded right after an opening believes that it is the first one. With a few
neutral documents before it, it does not, and it no longer matters whose opening that was.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcache_core.errors import ChatTemplateError, OptionError
from pcache_core.prompt import Segment

if TYPE_CHECKING:
    from pcache_core.lm.tokenizer import SegmentTokenizer

_INSTRUCTION = "Use the following documents to answer the question."
_SEPARATOR = "\n\n"
# Capitals show a template that changes case. No text holds private-use characters by chance.
_MARK = "\ue0f0Next Document\ue0f1"
# Jinja's two sources of chance: a filter, which `map` takes by name, and a function.
_CHANCE = re.compile(r"\|\s*random\b|[\"']random[\"']|\blipsum\b")
_ALL = "all"
_LARGEST_SHARE = 8
"""A preamble takes at most one of so many parts of the model's context."""


@dataclass(frozen=True, slots=True)
class Preamble:
    """What modules are encoded after: a generic opening, then company.

    opening: text, in which special tokens count as such; None for the model's chat template
        around a generic instruction. The beginning-of-sequence token comes before it by itself.
    company: short documents, for all modules alike; None for four in the module's own language.

    Raises: OptionError: an opening that is not a text; a company that is not a list of texts.
    """

    opening: str | None = None
    company: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.opening is not None:
            _check_text("opening", self.opening)
        if self.company is None:
            return
        if isinstance(self.company, str) or not isinstance(self.company, Iterable):
            raise OptionError(
                f"company must be a list of texts, got {self.company!r:.80}; "
                "for a single document use company=[text]"
            )
        company = tuple(self.company)
        for text in company:
            _check_text("each text in company", text)
            if not text.strip():
                raise OptionError(
                    "each text in company must say something, got an empty one; leave it out"
                )
        object.__setattr__(self, "company", company)

    @classmethod
    def none(cls) -> Preamble:
        """Return the paper's way: the beginning-of-sequence token alone."""
        return cls(opening="", company=())

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> Preamble:
        """What a model's folder says in `preamble.json`; the default one where it says nothing.

        The file holds an object with the fields of this class.
        Raises: OptionError: the file is something else.
        """
        path = Path(folder) / "preamble.json"
        return cls.of_file(path) if os.fspath(folder) and path.is_file() else cls()

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Preamble:
        """Return what a JSON file says: an object with the fields of this class.

        Raises: OptionError: the file is something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text("utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise OptionError(
                f"{os.fspath(path)} holds no preamble: {error}; write "
                '{"opening": "...", "company": ["...", ...]}, or remove the file'
            ) from error


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise OptionError(f"{name} must be a text, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{name} holds half a surrogate pair at character {error.start}; "
            "decode its source with errors='replace'"
        ) from None


class PreambleIds:
    """The token ids of a preamble, for one model; made when they are first asked for.

    context_length: the model's most positions, None without a limit. A preamble takes an eighth
        of them at most: company texts are dropped from the end; where not even the opening fits,
        the beginning-of-sequence token alone is left.
    preamble: None for what the tokenizer's folder says.
    """

    def __init__(
        self,
        text: SegmentTokenizer,
        context_length: int | None,
        preamble: Preamble | None = None,
    ) -> None:
        self.preamble = Preamble.of_folder(text.folder) if preamble is None else preamble
        self._text = text
        self._limit = None if context_length is None else context_length // _LARGEST_SHARE
        self._by_name: dict[str, tuple[int, ...]] = {}

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The opening's ids, without company."""
        opening = self.preamble.opening
        if opening is None:
            opening = default_opening(self._text)
        bos, ids = self._text.bos_ids, self._text.ids(Segment(opening, "literal"))
        if ids[: len(bos)] != bos:
            ids = bos + ids
        return ids if self._fits(ids) else bos

    def ids_for(self, text: str) -> tuple[int, ...]:
        """Return the ids that a module of this text is encoded after."""
        return self._named(self.name_for(text))

    def name_for(self, text: str) -> str:
        """Which of `by_name` a module of this text is encoded after: its language, or `all`."""
        return language_of(text) if self.preamble.company is None else _ALL

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Return every preamble: the `opening` alone, and with company, by language or of `all`."""
        names = _companies() if self.preamble.company is None else [_ALL]
        return {"opening": self.opening, **{name: self._named(name) for name in names}}

    def _named(self, name: str) -> tuple[int, ...]:
        ids = self._by_name.get(name)
        if ids is None:
            company = self.preamble.company
            ids = self._with_company(_companies()[name] if company is None else company)
            self._by_name[name] = ids
        return ids

    def _with_company(self, company: Iterable[str]) -> tuple[int, ...]:
        ids = self.opening
        for text in company:
            more = self._text.ids(Segment(text, "document"))
            more = ids + more + self._text.ids(Segment(_SEPARATOR, "literal"))
            if not self._fits(more):
                break
            ids = more
        return ids

    def _fits(self, ids: tuple[int, ...]) -> bool:
        return self._limit is None or len(ids) <= self._limit


def default_opening(text: SegmentTokenizer) -> str:
    """The model's chat template around a generic instruction, up to where a document would stand.

    The same at all times: a template that writes today's date gets a fixed one. The instruction
    alone where there is no template, where it refuses the message, does not keep it as it is, or
    leaves something to chance.
    """
    plain = _INSTRUCTION + _SEPARATOR
    if _CHANCE.search(text.chat_template):
        return plain
    try:
        chat = text.apply_chat_template([{"role": "user", "content": plain + _MARK}], undated=True)
    except ChatTemplateError:
        return plain
    opening, *rest = chat.split(_MARK)
    return opening if len(rest) == 1 and opening.endswith(plain) else plain


# Languages by their letters: the letters that tell, and what one of them counts. One of the
# characters that stand for a syllable or a word counts as three letters.
_KANA = re.compile("[\u3041-\u30ff]")
_UKRAINIAN, _RUSSIAN = re.compile("[іїєґІЇЄҐ]"), re.compile("[ыэъёЫЭЪЁ]")
_SCRIPTS = {
    "latin": (re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"), 1),
    "cyrillic": (re.compile("[\u0400-\u04ff]"), 1),
    "chinese": (re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"), 3),
    "ko": (re.compile("[\uac00-\ud7a3]"), 3),
    "ar": (re.compile("[\u0600-\u06ff]"), 1),
    "hi": (re.compile("[\u0900-\u097f]"), 1),
    "other": (re.compile("[\u0370-\u03ff\u0530-\u05ff\u0700-\u08ff\u0980-\u10ff]"), 1),
}
_LATIN_WORD = re.compile("[a-z\u00df-\u024f\u1e00-\u1eff]+")
_READ = 2000
"""Characters that a language is told from."""
_SMALLEST_SHARE = 0.15
"""How large a share of a text's words must be frequent in a language or hold letters of its own."""


def language_of(text: str) -> str:
    """Return the language that a text's company is to be in, as its two letters.

    Told by script, then by frequent words. `en` where nothing tells, or where there is no company
    in the language. Depends on the text alone: same on every machine.
    """
    return _language(text[:_READ])


@lru_cache(4096)
def _language(head: str) -> str:
    head = unicodedata.normalize("NFC", head)
    counts = {name: weight * len(s.findall(head)) for name, (s, weight) in _SCRIPTS.items()}
    script = max(counts, key=counts.__getitem__)
    if script == "latin":
        return _latin_language(head)
    if script == "cyrillic":
        return "uk" if len(_UKRAINIAN.findall(head)) > len(_RUSSIAN.findall(head)) else "ru"
    if script == "chinese":
        return "ja" if 30 * len(_KANA.findall(head)) > counts["chinese"] else "zh"
    return "en" if script == "other" else script


def _latin_language(text: str) -> str:
    words = _LATIN_WORD.findall(text.lower())
    found = {
        name: [word for word in words if word in frequent or not letters.isdisjoint(word)]
        for name, frequent, letters in _latin_languages()
    }
    language = max(found, key=lambda name: len(found[name]))
    telling = found[language]
    # In source code, names of one letter come again and again.
    enough = len(set(telling)) > 1 and len(telling) >= _SMALLEST_SHARE * len(words)
    return language if enough else "en"


@cache
def _data() -> dict[str, Any]:
    """Of each language: its company; in Latin script, also frequent words and own letters."""
    read: dict[str, Any] = json.loads(Path(__file__).with_name("company.json").read_text("utf-8"))
    return read


@cache
def _companies() -> dict[str, tuple[str, ...]]:
    return {name: tuple(entry["company"]) for name, entry in _data().items()}


@cache
def _latin_languages() -> list[tuple[str, frozenset[str], frozenset[str]]]:
    return [
        (name, frozenset(entry["words"].split()), frozenset(entry.get("letters", "")))
        for name, entry in _data().items()
        if "words" in entry
    ]
