"""A folder of text files, questions about them, and a BM25 index over them."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bm25s

from pcache_core.errors import OptionError
from pcache_core.evaluation.data import Item, QuestionSet

QUESTIONS_FILE = "questions.tsv"
Shipped = Literal["corpus", "corpus_toy"]
"""What comes with the project: a corpus for real models, one in the tiny model's language."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A paragraph of a file.

    name: the file's without the ending; with the paragraph's number (`mirela-kost-2`) where the
    file has several. before: the name of the paragraph before it.
    """

    name: str
    text: str
    before: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and what the corpus says.

    answers: any of them is right; none if nobody wrote it down. document: the name of the chunk
    that answers it, None if nobody wrote it down.
    """

    text: str
    answers: tuple[str, ...] = ()
    document: str | None = None


class Corpus:
    """Documents and questions of a folder, with a retriever that needs no download.

    The folder holds `*.txt` documents, whose paragraphs are chunks of their own, and
    `questions.tsv` with columns `question`, `answer` (several right ones with `|` between) and, for
    `question_set`, `document`: the chunk that answers it.
    Raises: OptionError: no such folder, no documents or no questions in it, or a question whose
        document isn't there.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise OptionError(f"corpus {str(folder)!r} is not a folder; give one of .txt files")
        self._folder = folder
        self.documents = [chunk for file in sorted(folder.glob("*.txt")) for chunk in _chunks(file)]
        if not self.documents:
            raise OptionError(f"corpus {str(folder)!r} holds no .txt file with text in it")
        self._by_name = {chunk.name: chunk for chunk in self.documents}
        self.questions = _read_questions(folder / QUESTIONS_FILE)
        for question in self.questions:
            if question.document is not None and question.document not in self._by_name:
                raise OptionError(
                    f"{str(folder / QUESTIONS_FILE)!r} names the document {question.document!r} "
                    f"for {question.text!r}, but no .txt file has it; names are "
                    f"{self.documents[0].name!r} and alike"
                )
        self._index = bm25s.BM25()
        self._index.index(
            _tokens([document.text for document in self.documents]), show_progress=False
        )

    def search(self, question: str, top_k: int) -> list[Chunk]:
        """Return the chunks that match best, best first."""
        k = min(top_k, len(self.documents))
        found, _ = self._index.retrieve(_tokens([question]), k=k, show_progress=False)
        return [self.documents[index] for index in found[0]]

    def question_set(self, documents: int, count: int | None = None) -> QuestionSet:
        """Return the first `count` questions, or all, each over that many documents.

        They are the chunk that answers it and, if there is one, the chunk before that; then those
        that BM25 finds. Their order is random, the same in every run, but a chunk never stands
        before the one that it continues.

        Raises: OptionError: more documents than there are, or less than 2; a question without
            answer or document.
        """
        if not 2 <= documents <= len(self.documents):
            raise OptionError(
                f"documents={documents} is out of range; a question of {self._folder.name} takes "
                f"2 to {len(self.documents)}"
            )
        items = tuple(self._item(question, documents) for question in self.questions[:count])
        return QuestionSet(f"{self._folder.name}, {documents} documents", items, "normalised")

    def _item(self, question: Question, documents: int) -> Item:
        if question.document is None or not question.answers:
            raise OptionError(
                f"{question.text!r} has no answer or no document; write both into "
                f"{str(self._folder / QUESTIONS_FILE)!r}"
            )
        gold = self._by_name[question.document]
        needed = [gold] if gold.before is None else [self._by_name[gold.before], gold]
        others = [chunk for chunk in self.search(question.text, documents) if chunk not in needed]
        chosen = [*needed, *others][:documents]
        random.Random(question.text).shuffle(chosen)
        places = sorted(chosen.index(chunk) for chunk in needed)
        for place, chunk in zip(places, needed, strict=True):
            chosen[place] = chunk
        return Item(question.text, tuple(chunk.text for chunk in chosen), question.answers)


def shipped(name: Shipped) -> Path:
    """Return the folder of a corpus that comes with the project, installed or in a checkout."""
    here = Path(__file__).parent.parent
    installed = here / name
    return installed if installed.is_dir() else here.parent / "examples" / name


def _chunks(file: Path) -> Iterator[Chunk]:
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{str(file)!r} is not UTF-8 text ({error}); save it as UTF-8") from None
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) == 1:
        yield Chunk(file.stem, paragraphs[0])
        return
    for number, paragraph in enumerate(paragraphs, 1):
        before = f"{file.stem}-{number - 1}" if number > 1 else None
        yield Chunk(f"{file.stem}-{number}", paragraph, before)


def _read_questions(file: Path) -> list[Question]:
    if not file.is_file():
        raise OptionError(f"{str(file)!r} is missing; write a line 'question<TAB>answer' for each")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    questions = [
        Question(
            row["question"].strip(),
            tuple(part.strip() for part in (row.get("answer") or "").split("|") if part.strip()),
            (row.get("document") or "").strip() or None,
        )
        for row in rows
        if (row.get("question") or "").strip()
    ]
    if not questions:
        raise OptionError(f"{str(file)!r} has no column 'question' with a question in it")
    return questions


def _tokens(texts: list[str]) -> object:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)
