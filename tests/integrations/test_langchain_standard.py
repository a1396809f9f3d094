"""LangChain's own conformance tests for chat models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from corpus import DOCUMENTS
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache

PARAMS = {"model": "builtin:tiny-rag"}


@pytest.fixture(scope="module", autouse=True)
def _weights_stay_loaded() -> Iterator[None]:
    lm = load_lm("builtin:tiny-rag")
    yield
    del lm


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatPromptCache

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return PARAMS


class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatPromptCache

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return PARAMS

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        details = ["cache_read_input", "cache_creation_input"]
        return {"invoke": details, "stream": details}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = self.chat_model_class(**PARAMS)
        model.cache_documents(DOCUMENTS, progress=False)
        message = _ask(model, stream=stream)
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        message = _ask(self.chat_model_class(**PARAMS), stream=stream)
        assert message.usage_metadata["input_token_details"]["cache_creation"] > 0
        return message


def _ask(model: BaseChatModel, *, stream: bool) -> AIMessage:
    text = f"Answer the question from the documents.\n\n{DOCUMENTS[4]}\n\nQuestion: Who?"
    if not stream:
        return model.invoke(text)
    first, *rest = model.stream(text)
    for chunk in rest:
        first += chunk
    return first
