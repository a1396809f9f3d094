"""Whatever engine asks, a call that can't be done is heard of."""

from __future__ import annotations

from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.query_engine import SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from pydantic import BaseModel

from llama_index_parts import chat_lm
from llama_index_shapes import (
    ABOUT_THE_MAYOR,
    CHAT_USES,
    FOUND,
    MODE_USES,
    SHAPES,
    SUB_QUESTIONS,
    Case,
    Prompted,
    Use,
    knowing,
    query_engine,
)
from pcache_core import PromptCacheEngine
from pcache_core.errors import ContextLengthError, OptionError
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import CallRefusedError, PromptCacheLLM

pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step"),
]

USES: dict[str, Use] = {**MODE_USES, **CHAT_USES, **SHAPES}
del USES["evaluation"]  # asks nothing about the question
TOO_LONG = Case("Who is the " + "very " * 3000 + "mayor of Trudabad?", FOUND)


@pytest.fixture(scope="module")
def engines() -> dict[str, PromptCacheEngine]:
    return {
        "completion": PromptCacheEngine(load_lm("builtin:tiny-rag")),
        "chat": PromptCacheEngine(chat_lm()),
    }


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("name", USES)
async def test_a_prompt_beyond_the_context_is_heard_of(
    engines: dict[str, PromptCacheEngine],
    kind: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(embed_dim=2))
    # LlamaIndex is told of so long a context that it does not cut the prompt itself.
    llm = Prompted(engine=engines[kind], max_tokens=4, context_window=100_000)
    with pytest.raises(CallRefusedError, match=r"holds 2048.*set_global_tokenizer") as caught:
        await USES[name](llm, TOO_LONG)
    assert isinstance(caught.value.__cause__, ContextLengthError)
    assert "holds 2048" in caplog.text


class Tags(BaseModel):
    """What no grammar can promise: that items differ."""

    tags: set[str]


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate"])
def test_a_schema_that_can_not_be_followed_is_heard_of(
    engines: dict[str, PromptCacheEngine], mode: str
) -> None:
    llm = PromptCacheLLM(engine=engines["completion"], max_tokens=4)
    with pytest.raises(CallRefusedError, match="uniqueItems") as caught:
        query_engine(llm, ABOUT_THE_MAYOR, mode, output_cls=Tags).query("Which?")
    assert isinstance(caught.value.__cause__, OptionError)


def test_what_no_tokenizer_reads_is_heard_of(engines: dict[str, PromptCacheEngine]) -> None:
    llm = PromptCacheLLM(engine=engines["completion"], max_tokens=4)
    with pytest.raises(CallRefusedError):
        query_engine(llm, ABOUT_THE_MAYOR, "compact").query("Who is \ud800?")


async def test_a_sub_question_that_is_left_out_is_in_the_log(
    engines: dict[str, PromptCacheEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """LlamaIndex goes on without it, whatever it raises."""
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(embed_dim=2))
    asking = Prompted(engine=engines["completion"], max_tokens=4, answers=[SUB_QUESTIONS])
    long = Case("", [FOUND[0].model_copy(update={"text": "very " * 3000})])
    answering = PromptCacheLLM(engine=engines["completion"], context_window=100_000)
    engine: Any = SubQuestionQueryEngine.from_defaults(
        [knowing(answering, long, name) for name in ("register", "atlas")],
        llm=asking,
        question_gen=LLMQuestionGenerator.from_defaults(llm=asking),
        use_async=False,
        verbose=False,
    )
    engine.query("Who works and was born there?")
    assert caplog.text.count("a call was refused: the prompt has") == 2


def test_who_counts_as_the_model_does_is_not_told_to(
    engines: dict[str, PromptCacheEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = PromptCacheLLM(engine=engines["completion"], max_tokens=4)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    llm.set_global_tokenizer()
    with pytest.raises(CallRefusedError) as caught:
        llm.complete("very " * 3000)
    assert "holds 2048" in str(caught.value)
    assert "set_global_tokenizer" not in str(caught.value)
