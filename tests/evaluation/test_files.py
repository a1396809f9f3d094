"""Question sets from files of every shape, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pcache_core import OptionError
from pcache_core.evaluation.data import Item
from pcache_core.evaluation.files import read_questions, split_passages

PLAIN = {"question": "Who?", "contexts": ["One.", "Two."], "answers": ["Ann", "Anna"]}
LONGBENCH = {
    "input": "Who?",
    "context": "Passage 1:\nOne\nOne.\n\nPassage 2:\nTwo\nTwo.",
    "answers": ["Ann"],
    "length": 12,
    "all_classes": None,
    "_id": "7",
}
MUSIQUE = {
    "id": "2hop__1",
    "question": "Who?",
    "paragraphs": [
        {"idx": 0, "title": "First", "paragraph_text": "One.", "is_supporting": True},
        {"idx": 1, "title": "Second", "paragraph_text": "Two.", "is_supporting": False},
    ],
    "answer": "Ann",
    "answer_aliases": ["Anna"],
}
HOTPOT = {
    "question": "Who?",
    "context": [["First", ["One.", " And one."]], ["Second", ["Two."]]],
    "answer": "Ann",
    "supporting_facts": [["First", 0]],
}
HOTPOT_OF_THE_HUB = HOTPOT | {
    "context": {"title": ["First", "Second"], "sentences": [["One.", " And one."], ["Two."]]}
}


def read(folder: Path, *records: Any) -> tuple[Item, ...]:
    file = folder / "questions"
    file.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return read_questions(file).items


@pytest.mark.parametrize(
    ("record", "contexts", "answers"),
    [
        (PLAIN, ("One.", "Two."), ("Ann", "Anna")),
        (LONGBENCH, ("Passage 1:\nOne\nOne.", "Passage 2:\nTwo\nTwo."), ("Ann",)),
        (MUSIQUE, ("First\nOne.", "Second\nTwo."), ("Ann", "Anna")),
        (HOTPOT, ("First\nOne. And one.", "Second\nTwo."), ("Ann",)),
        (HOTPOT_OF_THE_HUB, ("First\nOne. And one.", "Second\nTwo."), ("Ann",)),
        (PLAIN | {"answers": "Ann"}, ("One.", "Two."), ("Ann",)),
        (PLAIN | {"contexts": ["One.", " ", "Two.\n"]}, ("One.", "Two."), ("Ann", "Anna")),
    ],
)
def test_every_shape_is_told_by_its_fields(
    tmp_path: Path, record: dict[str, Any], contexts: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    assert read(tmp_path, record) == (Item("Who?", contexts, answers),)


def test_shapes_may_mix_and_a_list_reads_as_lines_do(tmp_path: Path) -> None:
    records = [PLAIN, LONGBENCH, MUSIQUE, HOTPOT]
    file = tmp_path / "list.json"
    file.write_text("\ufeff" + json.dumps(records, indent=1), "utf-8")
    listed = read_questions(file)
    assert listed.items == read(tmp_path, *records)
    assert (listed.match, listed.guesser, listed.description) == ("normalised", None, "list.json")
    assert read_questions(file, 2).items == listed.items[:2]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    records = [PLAIN | {"contexts": ["One\u2028line\u0085 more"]}, PLAIN]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_bytes("\r\n\r\n".join(lines).encode())
    assert [item.contexts for item in read_questions(file).items] == [
        ("One\u2028line\u0085 more",),
        ("One.", "Two."),
    ]


def test_a_longbench_summary_asks_for_one(tmp_path: Path) -> None:
    (item,) = read(tmp_path, LONGBENCH | {"input": ""})
    assert item.question.endswith("?")
    assert item.answers == ("Ann",)


def test_a_text_without_marks_is_cut_between_lines_and_nothing_is_lost() -> None:
    paragraphs = [f"Paragraph {n} " + "word " * (40 * n) + "end." for n in range(1, 30)]
    text = "\n\n".join(paragraphs) + "\n\n" + "x" * 9000
    parts = split_passages(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= 4000 for part in parts)
    assert sum(part.startswith("Paragraph") for part in parts) > len(parts) / 2


def test_text_before_the_first_mark_is_kept_and_a_mark_inside_a_line_is_none() -> None:
    text = "Intro.\nParagraph 1: one, see Passage 9: there\nParagraph 2: two"
    assert split_passages(text) == [
        "Intro.",
        "Paragraph 1: one, see Passage 9: there",
        "Paragraph 2: two",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "expected an object .* found list"),
        ({}, "expected 'contexts', 'context' or 'paragraphs', found no fields"),
        ({"question": "Who?", "text": "x"}, "found the fields 'question', 'text'"),
        (PLAIN | {"contexts": "One."}, "expected 'contexts' to be a list of texts, found str"),
        (PLAIN | {"contexts": ["One.", 2]}, r"expected 'contexts\[1\]' to be a text, found int 2"),
        (PLAIN | {"contexts": ["", " "]}, "at least one document with text in it, found none"),
        (PLAIN | {"question": None}, "expected 'question' to be a text, found NoneType"),
        (PLAIN | {"answers": []}, r"expected at least one answer with text in it, found list \[\]"),
        (PLAIN | {"answers": {"text": ["Ann"]}}, "'answers' to be a list of texts, found dict"),
        ({"question": "Who?", "contexts": ["x"]}, "expected 'answers' or 'answer', found the"),
        ({"contexts": ["x"], "answers": ["x"]}, "expected 'question' or 'input', found the"),
        (PLAIN | {"question": "\ud800"}, "found half a surrogate pair at character 0"),
        (MUSIQUE | {"paragraphs": "x"}, "expected 'paragraphs' to be a list, found str"),
        (MUSIQUE | {"paragraphs": [{"title": "x"}]}, r"paragraphs\[0\] to be an object with"),
        (MUSIQUE | {"answer": 3}, "expected 'answer' to be a text, found int 3"),
        (HOTPOT | {"context": [["First"]]}, r"context\[0\] to be a pair of title and sentences"),
        (HOTPOT | {"context": [["First", "One."]]}, r"'context\[0\] sentences' to be a list"),
        (HOTPOT | {"context": 3}, "expected 'context' to be a text or pairs .* found int 3"),
        (
            HOTPOT | {"context": {"title": ["a"], "sentences": []}},
            "expected as many titles as lists of sentences in 'context', found 1 and 0",
        ),
    ],
)
def test_a_record_of_another_shape_is_named_with_what_was_expected(
    tmp_path: Path, record: Any, message: str
) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps([PLAIN, record]))
    with pytest.raises(OptionError, match=rf"q\.json\[1\]: .*{message}"):
        read_questions(file)
    if isinstance(record, dict):
        file.write_text(f"{json.dumps(PLAIN)}\n\n{json.dumps(record)}\n")
        with pytest.raises(OptionError, match=rf"q\.json:3: .*{message}"):
            read_questions(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no questions"),
        (b"[]", "holds no questions"),
        (b'{"question": "Who?",\n', r"q\.json:1 is not JSON"),
        (b"[\n{},\n{,]", r"q\.json is not JSON .*line 3, column 2"),
        (b"[" * 100_000, "can't be read as JSON|is not JSON"),
        (b'["\xff"]', "is not UTF-8"),
        (b"question,answer\nWho?,Ann\n", r"q\.json:1 is not JSON"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "q.json"
    file.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_questions(file)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(OptionError, match="can't be read"):
            read_questions(file)
    with pytest.raises(OptionError, match="questions=0"):
        read_questions(tmp_path / "none.json", 0)
