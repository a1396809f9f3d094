"""`store=PATH`: what one process encoded serves the next, through both integrations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from corpus import DOCUMENTS, OPENING

path, storage_dtype, integration = sys.argv[1:]
options = dict(
    model="builtin:tiny-rag", store=path, storage_dtype=storage_dtype, reuse="fast", max_tokens=8,
)
if integration == "langchain":
    from pcache_integrations.langchain import PromptCacheLLM
    llm = PromptCacheLLM(**options)
    report = llm.cache_documents(list(DOCUMENTS))
    ask = llm.invoke
else:
    from llama_index.core.schema import TextNode
    from pcache_integrations.llama_index import PromptCacheLLM
    llm = PromptCacheLLM(**options)
    report = llm.cache_documents([TextNode(text=text) for text in DOCUMENTS])
    ask = lambda prompt: llm.complete(prompt).text
answers, sources = [], []
for pair, question in (((6, 5), "Where was Jerome Fertden born?"), ((3, 2), "Who is the mayor?")):
    documents = "\\n\\n".join(DOCUMENTS[index] for index in pair)
    answers.append(ask(f"{OPENING}{documents}\\n\\nQuestion: {question}\\nAnswer:"))
    request = llm.engine.reports[-1]
    sources += [s.source for s in request.segments if s.kind == "document"]
llm.engine.store.flush()
stats = llm.engine.stats()
print(json.dumps({
    "encoded_ahead": report.encoded, "already_stored": report.already_stored,
    "encoded_tokens": stats.encoded_tokens, "damaged": stats.damaged,
    "answers": answers, "sources": sources,
}))
"""


def run(path: Path, storage_dtype: str, integration: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), storage_dtype, integration],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("integration", "storage_dtype"), [("langchain", "auto"), ("llama_index", "int8")]
)
def test_a_corpus_encoded_in_one_process_is_served_from_disk_in_the_next(
    tmp_path: Path, integration: str, storage_dtype: str
) -> None:
    first = run(tmp_path, storage_dtype, integration)
    assert (first["encoded_ahead"], first["already_stored"]) == (8, 0)
    second = run(tmp_path, storage_dtype, integration)
    assert (second["encoded_ahead"], second["already_stored"]) == (0, 8)
    assert (second["encoded_tokens"], second["damaged"]) == (0, 0)
    assert second["sources"] == ["disk"] * 4
    assert second["answers"] == first["answers"]
    assert first["answers"][0].strip()
