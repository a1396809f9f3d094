"""`store=PATH`: what one process encoded serves the next, through both integrations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_index.core.schema import TextNode

from corpus import DOCUMENTS, OPENING
from pcache_integrations import langchain, llama_index

TESTS = Path(__file__).parents[1]
WAYS = (("langchain", "auto"), ("llama_index", "int8"))
SCRIPT = "import json, sys, test_fresh_process as t; print(json.dumps(t.served(sys.argv[1])))"


def served(folder: str) -> list[dict[str, Any]]:
    """What both integrations answer from stores in a folder, and where the states came from."""
    return [_served(f"{folder}/{name}", name, dtype) for name, dtype in WAYS]


def _served(path: str, integration: str, storage_dtype: str) -> dict[str, Any]:
    options: dict[str, Any] = {"model": "builtin:tiny-rag", "reuse": "fast", "max_tokens": 8}
    options |= {"store": path, "storage_dtype": storage_dtype}
    llm: Any
    if integration == "langchain":
        llm = langchain.PromptCacheLLM(**options)
        report, ask = llm.cache_documents(list(DOCUMENTS)), llm.invoke
    else:
        llm = llama_index.PromptCacheLLM(**options)
        report = llm.cache_documents([TextNode(text=text) for text in DOCUMENTS])
        ask = llm.complete
    answers, sources = [], []
    for pair, asked in (((6, 5), "Where was Jerome Fertden born?"), ((3, 2), "Who is the mayor?")):
        documents = "\n\n".join(DOCUMENTS[index] for index in pair)
        answers.append(str(ask(f"{OPENING}{documents}\n\nQuestion: {asked}\nAnswer:")))
        request = llm.engine.reports[-1]
        sources += [s.source for s in request.segments if s.kind == "document"]
    llm.engine.store.flush()
    stats = llm.engine.stats()
    return {
        "encoded_ahead": report.encoded, "already_stored": report.already_stored,
        "encoded_tokens": stats.encoded_tokens, "damaged": stats.damaged,
        "answers": answers, "sources": sources,
    }  # fmt: skip


def test_a_corpus_encoded_in_one_process_is_served_from_disk_in_the_next(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(TESTS), str(Path(__file__).parent), *filter(None, sys.path)])
    here = served(str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    for first, second in zip(here, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert (first["encoded_ahead"], first["already_stored"]) == (8, 0)
        assert (second["encoded_ahead"], second["already_stored"]) == (0, 8)
        assert (second["encoded_tokens"], second["damaged"]) == (0, 0)
        assert second["sources"] == ["disk"] * 4
        assert second["answers"] == first["answers"]
        assert first["answers"][0].strip()
