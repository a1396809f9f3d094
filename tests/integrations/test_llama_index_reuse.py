"""Every way to use an LLM through LlamaIndex reuses what it did when this table was made.

Each use is asked about the same nodes twice: another question, with the nodes in another order.
The documents of the first one's prompts are then encoded for every place, so that the second one
finds all that it may reuse; the table has how many cached tokens that was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.embeddings import MockEmbedding
from pydantic import PrivateAttr

from llama_index_parts import chat_lm, documents_of, text_of
from llama_index_shapes import (
    CHAT_USES,
    FOUND,
    MODE_USES,
    QUESTION,
    SHAPES,
    Case,
    Prompted,
    Use,
)
from pcache_core import CausalLM, PromptCacheEngine, Segment
from pcache_integrations._engines import load_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step"),
]

TABLE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "llama_index_reuse.json").read_text()
)
USES: dict[str, Use] = {**MODE_USES, **CHAT_USES, **SHAPES}
BEFORE, NOW = Case("Where does Clara Nandham work?", FOUND[::-1]), Case(QUESTION, FOUND)


@pytest.fixture(scope="module")
def lms() -> dict[str, CausalLM]:
    return {"completion": load_lm("builtin:tiny-rag"), "chat": chat_lm()}


class InTurn(Prompted):
    """Asks what is asked at once in the order of asking: what is reused hangs on the order."""

    _turns: asyncio.Lock = PrivateAttr(default_factory=asyncio.Lock)

    async def acomplete(self, *args: Any, **kwargs: Any) -> CompletionResponse:
        async with self._turns:
            return await super().acomplete(*args, **kwargs)

    async def achat(self, *args: Any, **kwargs: Any) -> ChatResponse:
        async with self._turns:
            return await super().achat(*args, **kwargs)


async def measured(lm: CausalLM, use: Use) -> dict[str, Any]:
    """What the second round of a use reused, and what it read."""
    engine = PromptCacheEngine(lm, reuse="fast")
    # An answer that engines can read in any place, so that prompts don't hang on the model.
    options = {"max_tokens": 24, "stop": ["\n"], "otherwise": '{"mayor": "Nobody knows."}'}
    await use(InTurn(engine=engine, **options), BEFORE)
    parts = [part for report in engine.reports for part in report.segments]
    engine.encode([part.text for part in parts if part.kind == "document"], progress=False)
    engine.reports.clear()
    await use(InTurn(engine=engine, **options), NOW)
    reports = sorted(engine.reports, key=text_of)  # some engines ask several things at once
    ids = [
        token
        for report in reports
        for part in report.segments
        for token in lm.text.ids(Segment(part.text, cast(Any, part.kind)))
    ]
    return {
        "prompt_tokens": sum(report.prompt_tokens for report in reports),
        "reused": sum(report.cached_tokens for report in reports),
        "documents": sum(len(documents_of(report)) for report in reports),
        "text": digest(text_of(report) for report in reports),
        "ids": digest(map(str, ids)),
    }


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("name", USES)
async def test_each_use_reuses_what_it_did(
    lms: dict[str, CausalLM], kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Engines ask the settings for a model even where they need none.
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(embed_dim=2))
    key = f"{kind}: {name}"
    before, now = TABLE[key], await measured(lms[kind], USES[name])
    assert now["reused"] >= before["reused"]
    assert {**now, "reused": None} == {**before, "reused": None}
