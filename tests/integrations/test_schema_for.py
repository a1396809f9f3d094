"""Both language models say which schema a prompt template is."""

from __future__ import annotations

from langchain_core.prompts import PromptTemplate as LangChainTemplate
from llama_index.core import PromptTemplate as LlamaIndexTemplate

from pcache_core.pml import parse_schema
from pcache_integrations.langchain import ChatPromptCache
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM

TEXT = "Answer <briefly>.\n\n{context}\n\nQuestion: {question}\nAnswer:"


def words(pml: str) -> tuple[str, list[str]]:
    schema = parse_schema(pml)
    nodes = [node for module in schema.children for node in getattr(module, "children", ())]
    text = "".join(node.text for node in nodes if hasattr(node, "text"))
    return text, [node.name for node in nodes if hasattr(node, "length")]


def test_the_schema_of_a_template_parses_and_has_its_text_and_variables() -> None:
    pmls = [
        model.schema_for(LangChainTemplate.from_template(TEXT), lengths={"context": 900})
        for model in (LangChainLLM(), ChatPromptCache())
    ]
    pmls.append(LlamaIndexLLM().schema_for(LlamaIndexTemplate(TEXT), lengths={"context": 900}))
    for pml in pmls:
        text, names = words(pml)
        assert names == ["context", "question"]
        assert text == TEXT.replace("{context}", "").replace("{question}", "")
        assert 'len="900"' in pml
