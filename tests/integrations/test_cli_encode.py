"""`pcache encode`: what it puts into a store is what language models find there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import SimpleDirectoryReader
from typer.testing import CliRunner

import tiny_models
from command import MAIN, environment, pcache
from corpus import DOCUMENTS, TEMPLATE
from pcache_core import CausalLM, DiskStore, Prompt, PromptCacheEngine, Segment
from pcache_core.kv.key import ModuleKey
from pcache_core.store.inspect import StoredState, stored_states
from pcache_integrations._stores import build_store
from pcache_integrations.cli import app
from pcache_integrations.cli.texts import read_texts
from redis_server import Server

ROOT = Path(__file__).parents[1]
TINY = ("--model", "builtin:tiny-rag")

ASK = """
import json, sys
import torch
torch.set_num_threads(1)
from corpus import DOCUMENTS, TEMPLATE

integration, store = sys.argv[1:]
options = dict(model="builtin:tiny-rag", store=store, reuse="fast", max_tokens=8)
chosen, question = [DOCUMENTS[6], DOCUMENTS[4], DOCUMENTS[5]], "Where was Jerome Fertden born?"
if integration == "langchain":
    from langchain_core.documents import Document
    from langchain_core.prompts import PromptTemplate
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnablePassthrough
    from pcache_integrations.langchain import PromptCacheLLM

    class Retriever(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return [Document(text) for text in chosen]

    def joined(documents):
        return "\\n\\n".join(document.page_content for document in documents)

    llm = PromptCacheLLM(**options)
    context = {"context": Retriever() | joined, "question": RunnablePassthrough()}
    answer = (context | PromptTemplate.from_template(TEMPLATE) | llm).invoke(question)
else:
    from llama_index.core import PromptTemplate
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode
    from pcache_integrations.llama_index import PromptCacheLLM

    class Retriever(BaseRetriever):
        def _retrieve(self, query_bundle):
            return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in chosen]

    llm = PromptCacheLLM(**options)
    template = TEMPLATE.replace("{context}", "{context_str}").replace("{question}", "{query_str}")
    asked = RetrieverQueryEngine.from_args(
        Retriever(), llm=llm, text_qa_template=PromptTemplate(template)
    )
    answer = str(asked.query(question))
(report,) = llm.engine.reports
print(json.dumps({
    "answer": answer,
    "encoded_tokens": report.encoded_tokens,
    "opening": report.segments[0].source,
    "sources": [s.source for s in report.segments if s.kind == "document"],
}))
"""


def ask(integration: str, store: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ask here; what is in the store was encoded by another process."""
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["ask", integration, store])
    with contextlib.redirect_stdout(printed):
        exec(compile(ASK, "ask", "exec"), {"__name__": "ask"})
    result: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return result


def encode(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    """The report, as JSON, of a command in this process."""
    done = CliRunner().invoke(app, ["encode", *TINY, *map(str, arguments), "--json"])
    if not isinstance(done.exception, SystemExit | None):
        raise done.exception
    assert done.exit_code == status, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the documents in files of every kind, and files of others."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "deep").mkdir()
    (folder / "deep" / "0.md").write_text(f"\n{DOCUMENTS[0]}\n\n")
    (folder / "1.txt").write_text(DOCUMENTS[1])
    records = [{"text": DOCUMENTS[2]}, {"page_content": DOCUMENTS[3]}, {"content": DOCUMENTS[4]}]
    lines = [json.dumps(record) for record in (*records, *DOCUMENTS[5:])]
    (folder / "rest.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": " "})]))
    (folder / ".hidden.txt").write_text("A hidden file of eight words or even more.")
    (folder / "table.csv").write_text("a,b\n")
    return folder


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = Server(tmp_path)
    yield server.url
    server.kill()


@pytest.fixture(scope="module")
def states(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a process of its own has filled; it prints its report and nothing else."""
    folder = tmp_path_factory.mktemp("store") / "states"
    done = pcache("encode", *TINY, texts, "--store", folder)
    assert done.returncode == 0
    assert done.stderr == (
        "warning: 1 file of another kind is left out (.csv); "
        "name them one by one if they are text\n"
    )
    assert done.stdout.startswith("8 of 8 texts encoded (")
    assert done.stdout.count("\n") == 1
    return folder


@pytest.mark.parametrize("integration", ["langchain", "llama_index"])
def test_a_language_model_in_another_process_finds_every_document(
    integration: str, states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(states, tmp_path / "states")  # models of one folder share an engine
    asked = ask(integration, str(own), monkeypatch)
    assert asked["sources"] == ["disk"] * 3
    assert "Gluvmouth." in asked["answer"]


@pytest.mark.parametrize("kind", ["folder", "server"])
def test_an_engine_over_the_same_store_finds_every_document(
    kind: str, texts: Path, request: pytest.FixtureRequest
) -> None:
    store = str(request.getfixturevalue("states" if kind == "folder" else "redis_url"))
    encoded = encode(texts, "--store", store)
    assert encoded["kept"] == encoded["encoded"] == (0 if kind == "folder" else 8)
    engine = PromptCacheEngine(CausalLM.from_pretrained("builtin:tiny-rag"), build_store(store))
    opening, _, rest = TEMPLATE.partition("{context}")
    documents = [Segment(text, "document") for text in DOCUMENTS]
    prompt = Prompt([Segment(opening, "literal"), *documents, Segment(rest)])
    report = engine.prefill(prompt, "fast").report
    sources = [segment.source for segment in report.segments if segment.kind == "document"]
    assert sources == ["disk" if kind == "folder" else "remote"] * 8
    again = encode(texts, "--store", store)
    assert (again["encoded"], again["already_stored"]) == (0, 8)


def test_documents_are_encoded_after_the_preamble_of_a_file(texts: Path, tmp_path: Path) -> None:
    """One state where a document comes first, after the opening alone; one for later places."""
    chosen = {"opening": "Look here.\n", "company": ["The bells were cast in a field."]}
    (tmp_path / "preamble.json").write_text(json.dumps(chosen))
    given = ("--store", tmp_path / "s", "--preamble", tmp_path / "preamble.json")
    assert encode(texts, *given)["encoded"] == 8
    assert encode(texts, *given)["already_stored"] == 8
    assert encode(texts, "--store", tmp_path / "s")["encoded"] == 8
    text = CausalLM.from_pretrained("builtin:tiny-rag").text
    opening = text.bos_ids + text.ids(Segment(chosen["opening"], "literal"))
    company = text.ids(Segment(chosen["company"][0], "document"))
    stored = [state.record for state in stored_states(tmp_path / "s") if state.record]
    first = [record for record in stored if record.preamble_ids == opening]
    later = [record for record in stored if record.preamble_ids[: len(opening)] == opening]
    assert len(first) == 8
    assert len(later) == 16
    assert (
        sum(record.preamble_ids[len(opening) :][: len(company)] == company for record in later) == 8
    )


@pytest.mark.parametrize("before", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_file_of_windows_is_found_as_each_framework_reads_it(before: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(f"{before}{DOCUMENTS[0]}\r\n{DOCUMENTS[1]}\r\n".encode())
    encode(file, "--store", tmp_path / "states")
    (node,) = SimpleDirectoryReader(input_files=[file]).load_data()
    with open(file) as opened:  # as LangChain's TextLoader does
        contents = [node.text, opened.read()]
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    engine = PromptCacheEngine(lm, build_store(str(tmp_path / "states")))
    for content in contents:
        assert engine.encode([content.strip()], progress=False).already_stored == 1


def test_a_text_with_half_a_character_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('"Whole."\n"Half \\ud800."\n')
    texts, [trouble] = read_texts([file])
    assert [each.text for each in texts] == ["Whole."]
    assert re.search(r"a\.jsonl:2: the text holds half of a surrogate pair", str(trouble))


def test_what_cannot_be_read_is_listed_and_the_rest_is_encoded(texts: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(texts, bad)
    (bad / "0.txt").write_bytes(b"abc\xff")
    (bad / "lines.jsonl").write_text(f'{{"text": \n"{DOCUMENTS[0]} Again."\n{{"foo": 1}}\n')
    figures = encode(bad, tmp_path / "none.txt", "--store", tmp_path / "s", status=1)
    assert figures["texts"] == len(DOCUMENTS) + 1
    assert figures["encoded"] == figures["texts"]
    expected = ("0.txt is not UTF-8", "lines.jsonl:1 is not JSON", "lines.jsonl:3: exp", "none.txt")
    assert len(figures["unread"]) == len(expected)
    assert all(part in found for part, found in zip(expected, figures["unread"], strict=True))


def test_a_separator_is_encoded_with_the_document_before_it(texts: Path, tmp_path: Path) -> None:
    encode(texts, "--store", tmp_path, "--separator", "\n\n")
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    question = Segment("Question: Who?\nAnswer:")
    for after, source in (("\n\n", "disk"), ("\n", "encoded")):
        engine = PromptCacheEngine(lm, DiskStore(tmp_path), "fast")
        report = engine.prefill(
            Prompt([Segment(DOCUMENTS[0] + after, "document"), question])
        ).report
        assert report.segments[0].source == source


def test_options_that_make_other_states_are_part_of_their_keys(
    texts: Path, states: Path, tmp_path: Path
) -> None:
    for option in (("--namespace", "tenant"), ("--dtype", "bfloat16"), ("--storage-dtype", "int8")):
        assert encode(texts / "1.txt", "--store", states, *option)["encoded"] == 1
        assert encode(texts / "1.txt", "--store", states, *option)["already_stored"] == 1


def test_a_text_too_long_is_named_and_left_out(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 3000)
    arguments = (tmp_path / "long.txt", texts / "1.txt", "--store", tmp_path / "s")
    figures = encode(*arguments, status=1)
    assert figures["left_out"] == [str(tmp_path / "long.txt")]
    assert figures["encoded"] == 1
    again = CliRunner().invoke(app, ["encode", *TINY, *map(str, arguments)])
    assert f"for the model (2,048 tokens): {tmp_path / 'long.txt'}; split" in again.stderr


def test_a_model_that_has_no_states_ahead_of_time_is_no_success(
    texts: Path, tmp_path: Path
) -> None:
    """Learned positions are part of the states, so documents can't be encoded before a prompt."""
    tiny_models.build("gpt2", seed=0).save_pretrained(tmp_path / "gpt2")
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    given = ("--model", tmp_path / "gpt2", "--store", tmp_path / "s")
    figures = encode(texts, *given, status=1)
    assert (figures["encoded"], figures["texts"]) == (0, 8)
    assert "no rotation moves the states" in figures["reason"]


def test_a_bar_shows_progress_on_a_terminal_and_none_elsewhere(texts: Path, tmp_path: Path) -> None:
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    command = ["encode", *TINY, str(texts), "--store", str(tmp_path / "s"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=200,
        check=True,
    )
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while piece := os.read(terminal, 10_000):
            shown += piece
    os.close(terminal)
    assert re.search(rb"encoding: 100%.*tok/s", shown)
    assert json.loads(done.stdout)["encoded"] == 8  # the bar is not among the results


# --- interrupted --------------------------------------------------------------------------------

MANY = 200
STATES = 2 * MANY  # of each text one for where it comes first, and one for later places


def whole(folder: Path) -> list[StoredState]:
    """The documents' states in a folder, each of which opens; no other file is there."""
    store = DiskStore(folder)
    found = list(stored_states(folder))
    for state in found:
        assert state.record is not None, state.path
        hit = store.get(ModuleKey(state.record.digest, state.record.token_ids))
        assert hit is not None
        assert hit.state.token_ids == state.record.token_ids
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors"}
    return [state for state in found if state.record and len(state.record.token_ids) > 12]


def test_ctrl_c_leaves_whole_states_and_the_next_run_encodes_only_what_is_missing(
    tmp_path: Path,
) -> None:
    (tmp_path / "many.jsonl").write_text(
        "\n".join(json.dumps(f"File {n}. " + " ".join(DOCUMENTS)) for n in range(MANY))
    )
    folder = tmp_path / "states"
    command = ["encode", *TINY, str(tmp_path / "many.jsonl"), "--store", str(folder)]
    done_before = 0
    for more in (3, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *command],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 120
        while len(list(folder.glob("*/*.safetensors"))) < done_before + more:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert output == ""
        assert errors == (
            f"interrupted; what was encoded is in {folder}, the same command goes on from there\n"
        )
        assert done_before < len(whole(folder)) < STATES
        done_before = len(whole(folder))
    before = {state.path: state.path.stat().st_ino for state in whole(folder)}
    last = encode(*command[1:])
    assert last["kept"] == last["encoded"] == MANY - last["already_stored"]
    after = {state.path: state.path.stat().st_ino for state in whole(folder)}
    assert len(after) == STATES
    assert before.items() <= after.items()
