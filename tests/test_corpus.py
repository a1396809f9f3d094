"""The corpora: each question has its answer in its document and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcache_core import CausalLM, OptionError
from pcache_core.evaluation.metrics import contains
from pcache_integrations.demo.corpus import Corpus, Question, shipped

_SHORTEST_VALUE = 3  # letters: a shorter one would stand in many an answer by chance


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(shipped("corpus"))


def test_it_is_large_and_some_chunks_continue_others(corpus: Corpus) -> None:
    assert len(list(shipped("corpus").glob("*.txt"))) >= 40
    assert len(corpus.questions) >= 60
    assert len({question.text for question in corpus.questions}) == len(corpus.questions)
    continued = [chunk for chunk in corpus.documents if chunk.before is not None]
    assert len(continued) >= 8
    assert {chunk.text.split()[0] for chunk in continued} <= {"It", "She", "He"}
    answered = {question.document for question in corpus.questions}
    assert sum(chunk.name in answered for chunk in continued) >= 8


def test_every_value_stands_in_its_document_and_in_no_other(corpus: Corpus) -> None:
    for question in corpus.questions:
        assert question.answers
        assert min(map(len, question.answers)) >= _SHORTEST_VALUE
        holding = {d.name for d in corpus.documents if contains(d.text, question.answers)}
        assert holding == {question.document}, question
        assert not contains(question.text, question.answers), question


def test_a_question_names_its_subject_as_its_first_chunk_does(corpus: Corpus) -> None:
    """Words with a capital letter, the first and the value's aside."""
    texts = {chunk.name: chunk for chunk in corpus.documents}
    for question in corpus.questions:
        chunk = texts[question.document or ""]
        first = chunk if chunk.before is None else texts[chunk.before]
        names = [word.strip("?,.").removesuffix("'s") for word in question.text.split()[1:]]
        names = [name for name in names if name[:1].isupper()]
        subject = [name for name in names if name in first.text]
        assert subject or not names, question
        if chunk.before is not None:
            assert subject
            assert not all(name in chunk.text for name in subject), question


def test_prompts_are_as_long_as_promised(corpus: Corpus, real_lm: CausalLM) -> None:
    tokens = {chunk.name: real_lm.count_tokens(chunk.text) for chunk in corpus.documents}
    assert 60 <= min(tokens.values()) <= max(tokens.values()) <= 110
    for question in corpus.questions:
        found = corpus.search(question.text, 12)
        assert len({chunk.name for chunk in found}) == 12
        assert sum(tokens[chunk.name] for chunk in found) >= 900


def test_the_first_questions_find_their_document_by_words(corpus: Corpus) -> None:
    for question in corpus.questions[:12]:
        assert question.document in {chunk.name for chunk in corpus.search(question.text, 12)}


def test_a_question_set_has_the_answer_and_what_it_refers_to_in_order(corpus: Corpus) -> None:
    chunks = {chunk.name: chunk for chunk in corpus.documents}
    questions = corpus.question_set(5)
    assert questions == Corpus(shipped("corpus")).question_set(5)
    places = set()
    for question, item in zip(corpus.questions, questions.items, strict=True):
        assert (item.question, item.answers) == (question.text, question.answers)
        assert len(set(item.contexts)) == len(item.contexts) == 5
        gold = chunks[question.document or ""]
        place = item.contexts.index(gold.text)
        places.add(place)
        if gold.before is not None:
            assert item.contexts.index(chunks[gold.before].text) < place
    assert places == {0, 1, 2, 3, 4}
    assert corpus.question_set(5, 3).items == questions.items[:3]


@pytest.mark.parametrize("documents", [0, 1, 1000])
def test_a_question_set_of_too_few_or_too_many_documents_is_refused(
    corpus: Corpus, documents: int
) -> None:
    with pytest.raises(OptionError, match=f"documents={documents} is out of range"):
        corpus.question_set(documents)


def test_a_folder_without_questions_or_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not a folder"):
        Corpus(tmp_path / "missing")
    with pytest.raises(OptionError, match=r"no \.txt file"):
        Corpus(tmp_path)
    (tmp_path / "a.txt").write_text("A document.\n\nIt goes on.\n")
    with pytest.raises(OptionError, match=r"questions\.tsv"):
        Corpus(tmp_path)
    file = tmp_path / "questions.tsv"
    file.write_text("answer\nx\n")
    with pytest.raises(OptionError, match="column 'question'"):
        Corpus(tmp_path)
    file.write_text("question\tanswer\tdocument\nWhat?\tx\ta\n")
    with pytest.raises(OptionError, match="names the document 'a'"):
        Corpus(tmp_path)
    file.write_text('question\tanswer\tdocument\n"What?" ?\tx | y\ta-2\nWho?\n')
    corpus = Corpus(tmp_path)
    assert corpus.questions == [Question('"What?" ?', ("x", "y"), "a-2"), Question("Who?")]
    assert [(chunk.name, chunk.before) for chunk in corpus.documents] == [
        ("a-1", None), ("a-2", "a-1"),
    ]  # fmt: skip
    with pytest.raises(OptionError, match=r"'Who\?' has no answer or no document"):
        corpus.question_set(2)
