"""Question sets from files: JSON or JSON lines, in the shapes that data sets come in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pcache_core.errors import OptionError
from pcache_core.evaluation.data import Item, QuestionSet, check_count

_PASSAGE = re.compile(r"^(?=(?:Passage|Paragraph|Document) \d+:)", re.MULTILINE)
_MOST_CHARACTERS = 4000  # of a document that is cut from a longer text, about 1,000 tokens
_SUMMARISE = "What do the documents say, in one paragraph?"  # LongBench's summaries ask nothing


def read_questions(file: Path, count: int | None = None) -> QuestionSet:
    """Read the first `count` questions of a file, or all of them.

    The file is a JSON list, or JSON lines, of objects in any of these shapes, told apart by their
    fields:

    - `question`, `contexts` (list of texts), `answers`
    - LongBench: `input`, `context` (one text), `answers`. The context is split at its "Passage 1:"
      marks where it has them, and what is longer than 4,000 characters between lines.
    - MuSiQue: `question`, `paragraphs` (`title`, `paragraph_text`), `answer`, `answer_aliases`
    - HotpotQA and 2WikiMQA: `question`, `context` (pairs of title and sentences, or lists `title`
      and `sentences`), `answer`

    Raises: OptionError: it can't be read, is of another shape, or holds no questions; the message
        says at which line or index.
    """
    if count is not None:
        check_count(count)
    items = tuple(_Record(record, place).item() for place, record in islice(_records(file), count))
    if not items:
        raise OptionError(f"{file} holds no questions; expected a JSON list or JSON lines of them")
    return QuestionSet(file.name, items, "normalised")


def _records(file: Path) -> Iterator[tuple[str, object]]:
    """Yield each record and where it stands. JSON text may hold any line end but a line feed."""
    text = _read(file)
    if text.lstrip().startswith("["):
        records = _parse(text, str(file))
        assert isinstance(records, list)
        yield from ((f"{file}[{index}]", record) for index, record in enumerate(records))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", _parse(line, f"{file}:{number}")


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise OptionError(
            f"{file} can't be read ({error.strerror}); give a .json or .jsonl file of questions"
        ) from None


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise OptionError(
            f"{place} is not JSON ({error.msg}: {where}); expected a JSON list, or one JSON object "
            "a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{place} can't be read as JSON: {error}") from None


class _Record:
    """One record of a file, converted with errors that say where it stands."""

    def __init__(self, record: object, place: str) -> None:
        self._place = place
        if not isinstance(record, dict):
            raise self._unlike("an object with 'question', 'contexts' and 'answers'", record)
        self._fields: dict[str, Any] = record

    def item(self) -> Item:
        """Return the question in our own shape. Raises: OptionError: it has another shape."""
        contexts = tuple(text.strip() for text in self._contexts() if text.strip())
        if not contexts:
            raise self._error("at least one document with text in it", "none")
        return Item(self._question(), contexts, self._answers())

    def _question(self) -> str:
        if "question" in self._fields:
            return self._text("question", self._fields["question"])
        if "input" not in self._fields:
            raise self._error("'question' or 'input'", self._known())
        return self._text("input", self._fields["input"]) or _SUMMARISE

    def _contexts(self) -> list[str]:
        if "contexts" in self._fields:
            return self._texts("contexts", self._fields["contexts"])
        if "paragraphs" in self._fields:
            return self._paragraphs(self._fields["paragraphs"])
        if "context" not in self._fields:
            raise self._error("'contexts', 'context' or 'paragraphs'", self._known())
        context = self._fields["context"]
        if isinstance(context, str):
            return split_passages(self._text("context", context))
        return self._titled(context)

    def _paragraphs(self, paragraphs: object) -> list[str]:
        if not isinstance(paragraphs, list):
            raise self._unlike("'paragraphs' to be a list", paragraphs)
        texts = []
        for index, paragraph in enumerate(paragraphs):
            name = f"paragraphs[{index}]"
            if not isinstance(paragraph, dict) or "paragraph_text" not in paragraph:
                raise self._unlike(f"{name} to be an object with 'paragraph_text'", paragraph)
            title = self._text(f"{name}.title", paragraph.get("title", ""))
            text = self._text(f"{name}.paragraph_text", paragraph["paragraph_text"])
            texts.append(_under_title(title, text))
        return texts

    def _titled(self, context: object) -> list[str]:
        """Titles with their sentences, as pairs or as two lists."""
        if isinstance(context, dict) and {"title", "sentences"} <= context.keys():
            titles, sentences = context["title"], context["sentences"]
            if not (isinstance(titles, list) and isinstance(sentences, list)):
                raise self._unlike("'context' to hold lists 'title' and 'sentences'", context)
            if len(titles) != len(sentences):
                found = f"{len(titles)} and {len(sentences)}"
                raise self._error("as many titles as lists of sentences in 'context'", found)
            context = [list(pair) for pair in zip(titles, sentences, strict=True)]
        if not isinstance(context, list):
            raise self._unlike("'context' to be a text or pairs of title and sentences", context)
        texts = []
        for index, pair in enumerate(context):
            name = f"context[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise self._unlike(f"{name} to be a pair of title and sentences", pair)
            title, sentences = self._text(f"{name} title", pair[0]), pair[1]
            parts = [part.strip() for part in self._texts(f"{name} sentences", sentences)]
            texts.append(_under_title(title, " ".join(parts)))
        return texts

    def _answers(self) -> tuple[str, ...]:
        if "answers" in self._fields:
            given = self._fields["answers"]
            answers = self._texts("answers", [given] if isinstance(given, str) else given)
        elif "answer" in self._fields:
            aliases = self._texts("answer_aliases", self._fields.get("answer_aliases") or [])
            answers = [self._text("answer", self._fields["answer"]), *aliases]
        else:
            raise self._error("'answers' or 'answer'", self._known())
        kept = tuple(answer for answer in answers if answer.strip())
        if not kept:
            raise self._unlike("at least one answer with text in it", answers)
        return kept

    def _texts(self, name: str, value: object) -> list[str]:
        if not isinstance(value, list):
            raise self._unlike(f"'{name}' to be a list of texts", value)
        return [self._text(f"{name}[{index}]", text) for index, text in enumerate(value)]

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._unlike(f"'{name}' to be a text", value)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair at character {error.start}"
            raise self._error(f"'{name}' to be a text", found) from None
        return value

    def _known(self) -> str:
        return f"the fields {', '.join(map(repr, self._fields))}" if self._fields else "no fields"

    def _unlike(self, expected: str, value: object) -> OptionError:
        return self._error(expected, f"{type(value).__name__} {_short(value)}")

    def _error(self, expected: str, found: str) -> OptionError:
        return OptionError(f"{self._place}: expected {expected}, found {found}")


def split_passages(text: str) -> list[str]:
    """Split a text at "Passage 1:" marks, and what is still long between lines or words.

    Nothing but whitespace at the cuts is lost.
    """
    return [part for passage in _PASSAGE.split(text) for part in _cut(passage.strip())]


def _cut(text: str) -> Iterator[str]:
    while len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        ends = (text.rfind(mark, half, _MOST_CHARACTERS) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > 0), _MOST_CHARACTERS)
        yield text[:end].rstrip()
        text = text[end:].lstrip()
    yield text


def _under_title(title: str, text: str) -> str:
    return f"{title}\n{text}" if title else text


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
