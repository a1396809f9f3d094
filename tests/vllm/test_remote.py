"""The client's side without a server of vLLM's: what it asks for, and of whom."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pcache_core import CausalLM, ContextLengthError, Prompt, SamplingParams, Segment
from pcache_core.errors import DeadlineExceededError, OptionError
from pcache_core.key import KeySpace
from pcache_core.plan import tokenise
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from pcache_integrations.remote import Address, RemoteEngine
from pcache_integrations.remote.modules import PromptModules, join_separators

SPACE = KeySpace("model", "torch.float32", "default")
FACTS = [
    "Ann Ostenfurt was born in Nadbridge in 1931 and worked there as a glazier.",
    "Berth Krickward sells umbrellas in Stommarch, and has done so since 1950.",
    "Cedar Works makes bricks and bowls, and is older than the town around it.",
]


class _PlainServer(ThreadingHTTPServer):
    """An OpenAI-compatible server that knows nothing of prompt caches; answers with one word."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.waits_s = 0.0
        self.bodies: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _PlainServer

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "builtin:tiny-rag", "max_model_len": 64}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        time.sleep(self.server.waits_s)
        choice = {"index": 0, "text": "word", "finish_reason": "stop", "token_ids": [5]}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
        if not body.get("stream"):
            self._send(json.dumps({"choices": [choice], "usage": usage}))
            return
        events = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send("".join([*lines, "data: [DONE]\n\n"]))

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def plain() -> Iterator[_PlainServer]:
    with _PlainServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def rag_prompt(order: tuple[int, ...], separator: str = "\n\n", kind: str = "text") -> Prompt:
    segments = [Segment("Read this.\n\n", "literal")]
    for index in order:
        segments += [Segment(FACTS[index], "document"), Segment(separator, kind)]  # type: ignore[arg-type]
    segments[-1] = Segment(separator + "Question: Who sells umbrellas?", "argument")
    return Prompt(segments)


def test_a_server_without_the_connector_gets_plain_prompts(plain: _PlainServer) -> None:
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}/v1"), "builtin:tiny-rag")
    answer = engine.generate(rag_prompt((0,)), SamplingParams(max_tokens=4))
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("word", "stop", (5,))
    assert answer.report.reuse == "exact"
    assert "no prompt cache connector" in str(answer.report.fallback_reason)
    asked = plain.bodies[-1]
    assert asked["prompt"] == list(engine.tokenise(rag_prompt((0,))).token_ids)
    assert not {"cache_salt", "kv_transfer_params"} & set(asked)
    report = engine.encode(FACTS, progress=False)
    assert (report.kept, "no prompt cache connector" in str(report.reason)) == (0, True)


def test_a_shared_engine_brings_its_server(plain: _PlainServer) -> None:
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    for model in (LangChainLLM(engine=engine), LlamaIndexLLM(engine=engine)):
        assert model.engine is engine
        assert (model.model, model.base_url) == ("builtin:tiny-rag", engine.address.base_url)
    with pytest.raises(OptionError, match="brings its own base_url"):
        LangChainLLM(engine=engine, base_url="http://localhost:1")


async def test_an_answer_that_takes_too_long_is_given_up(plain: _PlainServer) -> None:
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    prompt, in_time = Prompt.from_text("Who?"), SamplingParams(max_tokens=4, timeout_s=5.0)
    assert engine.generate(prompt, in_time).text == "word"
    plain.waits_s = 1.0
    late = SamplingParams(max_tokens=4, timeout_s=0.2)
    with pytest.raises(DeadlineExceededError, match=r"timeout_s=0\.2"):
        engine.generate(prompt, late)
    with pytest.raises(DeadlineExceededError, match=r"timeout_s=0\.2"):
        await engine.agenerate(prompt, late)


def test_an_answer_never_asks_for_more_than_the_context_holds(plain: _PlainServer) -> None:
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    engine.generate(rag_prompt((0,)), SamplingParams(max_tokens=500))
    asked = plain.bodies[-1]
    assert asked["max_tokens"] == 64 - len(asked["prompt"])
    with pytest.raises(ContextLengthError, match="holds 64"):
        engine.generate(rag_prompt((0, 1, 2)), SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("separator", "kind", "is_joined"),
    [
        ("\n\n", "text", True),
        ("\n---\n", "argument", True),
        ("\nNext:\n", "literal", True),
        ("\n[2] ", "argument", False),
        ("\n" * 40, "literal", False),
        ("<eos>", "literal", False),
    ],
)
def test_what_separates_documents_belongs_to_the_one_before(
    tiny: CausalLM, separator: str, kind: str, *, is_joined: bool
) -> None:
    prompt = rag_prompt((0, 1), separator, kind)
    joined = join_separators(prompt, tiny.text.holds_special)
    assert joined.prompt.text == prompt.text
    documents = [s.text for s in joined.prompt.segments if s.kind == "document"]
    assert documents == [FACTS[0] + (separator if is_joined else ""), FACTS[1]]


def test_a_documents_state_is_the_same_wherever_it_stands(tiny: CausalLM) -> None:
    """In the middle it is asked for whole, at the end without the separator."""

    def keys(order: tuple[int, ...]) -> tuple[set[str], set[str], int]:
        joined = join_separators(rag_prompt(order), tiny.text.holds_special)
        tokens = tokenise(joined.prompt, tiny.text.ids, tiny.text.bos_ids)
        modules = PromptModules(joined, tokens, tiny.text.ids, 8)
        made = {SPACE.key(m.anchor_ids, m.token_ids, None).digest for m in modules.modules()}
        runs = modules.runs(SPACE)
        for run in runs:
            assert run.module_key(tokens.token_ids, SPACE).digest == run.key
        question = tokens.pieces[-1].start
        return made, {run.key for run in runs}, max(run.end for run in runs) - question

    made, _, _ = keys((0, 1, 2))
    _, asked, behind = keys((2, 0, 1))
    assert made <= asked
    assert behind >= -1  # at most the last token before the question is read otherwise


def test_documents_encoded_behind_no_opening_are_asked_for_too(tiny: CausalLM) -> None:
    joined = join_separators(rag_prompt((0, 1)), tiny.text.holds_special)
    tokens = tokenise(joined.prompt, tiny.text.ids, tiny.text.bos_ids)
    runs = PromptModules(joined, tokens, tiny.text.ids, 8).runs(SPACE)
    alone = tiny.text.ids(Segment(FACTS[0], "document"))
    assert SPACE.key(tiny.text.bos_ids, alone, None).digest in {run.key for run in runs}
