"""A folder of text files, questions about them, and a BM25 index over them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import bm25s

from pcache_core.errors import OptionError

QUESTIONS_FILE = "questions.tsv"


@dataclass(frozen=True, slots=True)
class TextFile:
    """One document: its file's name without the ending, and its text without outer whitespace."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the answer that the corpus gives; empty if nobody wrote it down."""

    text: str
    answer: str


class Corpus:
    """Documents and questions of a folder, with a retriever that needs no download.

    The folder holds `*.txt` documents and `questions.tsv` with columns `question` and `answer`.
    Raises: OptionError: no such folder, no documents or no questions in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise OptionError(f"corpus {str(folder)!r} is not a folder; give one of .txt files")
        files = sorted(folder.glob("*.txt"))
        texts = [TextFile(file.stem, _read(file).strip()) for file in files]
        self.documents: list[TextFile] = [document for document in texts if document.text]
        if not self.documents:
            raise OptionError(f"corpus {str(folder)!r} holds no .txt file with text in it")
        self.questions: list[Question] = _read_questions(folder / QUESTIONS_FILE)
        self._index = bm25s.BM25()
        self._index.index(
            _tokens([document.text for document in self.documents]), show_progress=False
        )

    def search(self, question: str, top_k: int) -> list[TextFile]:
        """The documents that match best, best first."""
        k = min(top_k, len(self.documents))
        found, _ = self._index.retrieve(_tokens([question]), k=k, show_progress=False)
        return [self.documents[index] for index in found[0]]


def default_folder() -> Path:
    """The corpus that comes with the project: in an installed package, or in a checkout."""
    here = Path(__file__).parent.parent
    installed = here / "corpus"
    return installed if installed.is_dir() else here.parent / "examples" / "corpus"


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{str(file)!r} is not UTF-8 text ({error}); save it as UTF-8") from None


def _read_questions(file: Path) -> list[Question]:
    if not file.is_file():
        raise OptionError(f"{str(file)!r} is missing; write a line 'question<TAB>answer' for each")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    questions = [
        Question(row["question"].strip(), (row.get("answer") or "").strip())
        for row in rows
        if (row.get("question") or "").strip()
    ]
    if not questions:
        raise OptionError(f"{str(file)!r} has no column 'question' with a question in it")
    return questions


def _tokens(texts: list[str]) -> object:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)
