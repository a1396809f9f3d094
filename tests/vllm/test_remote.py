"""The client's side without a server of vLLM's: what it asks for, and of whom."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest

from pcache_core import (
    CausalLM,
    ContextLengthError,
    DiskStore,
    Preamble,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.errors import (
    DeadlineExceededError,
    ModelError,
    OptionError,
    PromptCacheError,
    PromptError,
)
from pcache_core.kv.key import KeySpace
from pcache_core.library.preamble import PreambleIds
from pcache_core.lm import TextModel
from pcache_core.params import ReuseMode
from pcache_core.prompt import tokenise
from pcache_core.store.inspect import stored_states
from pcache_integrations._engines import engine_options
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from pcache_integrations.vllm.client import Address, RemoteEngine
from pcache_integrations.vllm.client_modules import ModuleMaker, PromptModules, join_separators
from pcache_integrations.vllm.protocol import (
    LOAD,
    SAVE,
    Description,
    Preambles,
    named_preambles,
    parse_runs,
    preambles_digest,
)

GERMAN = "Das Haus in der Gasse ist nicht groß, und es steht seit dem Jahr 1931 auf dem Hügel."
FACTS = [
    "Ann Ostenfurt was born in Nadbridge in 1931 and worked there as a glazier.",
    "Berth Krickward sells umbrellas in Stommarch, and has done so since 1950.",
    "Cedar Works makes bricks and bowls, and is older than the town around it.",
]


class _PlainServer(ThreadingHTTPServer):
    """An OpenAI-compatible server; answers with one word.

    says: the parameters of its answers; None for a server that knows nothing of prompt caches.
    cached: how many of a prompt's tokens it says it had. streams: in place of its events.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.waits_s = 0.0
        self.most = 64
        self.cached = 0
        self.streams: str | None = None
        self.says: dict[str, Any] | None = None
        self.bodies: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _PlainServer

    def do_GET(self) -> None:
        self._send(
            json.dumps({"data": [{"id": "builtin:tiny-rag", "max_model_len": self.server.most}]})
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        time.sleep(self.server.waits_s)
        choice = {"index": 0, "text": "word", "finish_reason": "stop", "token_ids": [5]}
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": self.server.cached},
        }
        if not body.get("stream"):
            answer = {"choices": [choice], "usage": usage, "kv_transfer_params": self.server.says}
            self._send(json.dumps(answer))
            return
        events = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send(self.server.streams or "".join([*lines, "data: [DONE]\n\n"]))

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
    segments = [Segment("Read the two or three documents.\n\n", "literal")]
    texts = [*FACTS, GERMAN]
    for index in order:
        segments += [Segment(texts[index], "document"), Segment(separator, kind)]  # type: ignore[arg-type]
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
    address = Address(f"http://127.0.0.1:{plain.server_port}", "key", 5.0, max_retries=1)
    engine = RemoteEngine(address, "builtin:tiny-rag")
    for kind in (LangChainLLM, LlamaIndexLLM):
        model = kind(engine=engine)
        assert model.engine is engine
        assert model.model == "builtin:tiny-rag"
        assert engine_options(model).server == address
        assert model.preamble == engine.preamble
        given = {"base_url": "http://localhost:1", "api_key": "x", "timeout": 9, "max_retries": 3}
        for name, value in given.items():
            with pytest.raises(OptionError, match=f"brings its own {name}; leave it out"):
                kind(engine=engine, **{name: value})


def test_a_language_model_gives_its_preamble_to_the_engine(plain: _PlainServer) -> None:
    url, mine = f"http://127.0.0.1:{plain.server_port}", Preamble("Look here.\n", [FACTS[2]])
    for kind in (LangChainLLM, LlamaIndexLLM):
        assert kind(model="builtin:tiny-rag", base_url=url, preamble=mine).engine.preamble == mine


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


@pytest.mark.parametrize("event", ['{"choices": [', "[1, 2]", "null"])
def test_what_is_no_event_is_said(plain: _PlainServer, event: str) -> None:
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    plain.streams = f"data: {event}\n\n"
    with pytest.raises(ModelError, match=re.escape(f"sent {event!r} in mid-answer")):
        engine.generate(Prompt.from_text("Who?"))


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
    joined, _ = join_separators(prompt, tiny.text.holds_special)
    assert joined.text == prompt.text
    documents = [s.text for s in joined.segments if s.kind == "document"]
    assert documents == [FACTS[0] + (separator if is_joined else ""), FACTS[1]]


def modules_of(lm: CausalLM, prompt: Prompt, preamble: Preamble | None = None) -> PromptModules:
    served = TextModel.without_weights("builtin:tiny-rag", lm.context_length)
    joined, separators = join_separators(prompt, lm.text.holds_special)
    tokens = tokenise(joined, lm.text.ids, lm.text.bos_ids)
    maker = ModuleMaker(served, preamble or Preamble(), lm.context_length)
    return PromptModules(tokens, separators, maker)


def space_of(lm: CausalLM) -> KeySpace:
    return KeySpace(lm.fingerprint, str(lm.dtype), "default")


def digests(folder: Path) -> set[str]:
    return {state.record.digest for state in stored_states(folder) if state.record}


@pytest.mark.parametrize(
    "preamble", [None, Preamble("Look here.\n", [FACTS[2]]), Preamble.none()], ids=repr
)
@pytest.mark.parametrize("order", [(0, 1, 3), (3, 1, 0), (1, 0)])
def test_a_prompt_asks_for_the_very_states_that_an_engine_in_process_makes_of_it(
    tiny: CausalLM, tmp_path: Path, order: tuple[int, ...], preamble: Preamble | None
) -> None:
    """The opening's, the first document's and those of later ones, each in its language."""
    prompt = rag_prompt(order)
    joined, _ = join_separators(prompt, tiny.text.holds_special)
    engine = PromptCacheEngine(tiny, DiskStore(tmp_path), "fast", preamble=preamble)
    engine.prefill(joined)
    made = digests(tmp_path)
    assert len(made) == 1 + len(order)
    assert made <= {run.key for run in modules_of(tiny, prompt, preamble).runs(space_of(tiny))}


def test_documents_encoded_ahead_are_asked_for_wherever_they_stand(
    tiny: CausalLM, tmp_path: Path
) -> None:
    """With their separator in the middle, and at the end of the documents without it."""
    texts = [text + "\n\n" for text in (*FACTS, GERMAN)]
    PromptCacheEngine(tiny, DiskStore(tmp_path)).encode(texts, progress=False)
    encoded = digests(tmp_path)
    assert len(encoded) == 8
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        runs = modules_of(tiny, rag_prompt(order)).runs(space_of(tiny))
        found = [run for run in runs if run.key in encoded]
        assert len(found) == 4
        assert [run.preamble for run in found][:2] == ["opening", "en"]
        assert found[-1].tail or found[-1].end == found[-1].start + len(
            tiny.text.ids(Segment(texts[order[-1]], "document"))
        )
        assert all(a.end == b.start for a, b in pairwise(found))


def test_the_server_is_asked_to_keep_what_every_order_of_the_documents_wants(
    tiny: CausalLM,
) -> None:
    space = space_of(tiny)
    made = {module.key(space) for module in modules_of(tiny, rag_prompt((0, 1, 3))).modules()}
    for order in permutations((0, 1, 3)):
        runs = modules_of(tiny, rag_prompt(order)).runs(space)
        starts = {run.start for run in runs}
        assert {run.start for run in runs if run.key in made} == starts


def preambles_of(lm: CausalLM, preamble: Preamble | None = None) -> Preambles:
    return named_preambles(PreambleIds(lm.text, lm.context_length, preamble))


def connector(lm: CausalLM, preambles: Preambles) -> dict[str, Any]:
    own = (lm.fingerprint, str(lm.dtype), "default", preambles_digest(preambles))
    return Description(*own, lm.context_length, saves=True, refused={}).as_dict()


def test_a_server_of_the_same_preambles_is_asked_for_states_and_to_keep_them(
    plain: _PlainServer, tiny: CausalLM
) -> None:
    mine = Preamble("Look here.\n", ["A text of some length about nothing much at all."])
    ids = preambles_of(tiny, mine)
    plain.says, plain.most = connector(tiny, ids), 2048
    address = Address(f"http://127.0.0.1:{plain.server_port}")
    engine = RemoteEngine(address, "builtin:tiny-rag", reuse="fast", preamble=mine)
    assert engine.preamble == mine
    assert engine.preamble_for(GERMAN) == ids["all"]
    report = engine.generate(rag_prompt((0, 1)), SamplingParams(max_tokens=4)).report
    engine.flush()
    assert (report.reuse, report.fallback_reason) == ("fast", None)
    sent = [body.get("kv_transfer_params", {}) for body in plain.bodies]
    asked = [run[3] for params in sent for run in params.get(LOAD, [])]
    assert set(asked) == {"", "opening", "all"}
    kept = [(b["prompt"], b["kv_transfer_params"][SAVE]) for b in plain.bodies if SAVE in str(b)]
    assert sorted(wish[3] for _, wish in kept) == ["", "all", "all", "opening", "opening"]
    for prompt, (start, end, _, name) in kept:
        assert (tuple(prompt[:start]), end) == (ids[name], len(prompt))


def test_what_was_used_and_then_lost_is_asked_for_again(
    plain: _PlainServer, tiny: CausalLM
) -> None:
    plain.says, plain.most = connector(tiny, preambles_of(tiny)), 2048
    address = Address(f"http://127.0.0.1:{plain.server_port}")
    engine = RemoteEngine(address, "builtin:tiny-rag", reuse="fast")
    for plain.cached, kept in ((1000, 0), (0, 5), (0, 5)):
        engine.generate(rag_prompt((0, 1)), SamplingParams(max_tokens=4))
        engine.flush()
        assert len([body for body in plain.bodies if SAVE in str(body)]) == kept


@pytest.mark.parametrize("other", ["preamble", "version"])
def test_a_server_of_other_preambles_or_version_gives_no_states_and_one_warning(
    plain: _PlainServer, tiny: CausalLM, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    plain.says, plain.most = connector(tiny, preambles_of(tiny, Preamble.none())), 2048
    if other == "version":
        plain.says[LOAD] |= {"version": 1}
    engine = RemoteEngine(
        Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag", reuse="fast"
    )
    reports = [engine.generate(rag_prompt((0, 1))).report for _ in range(3)]
    engine.flush()
    remedy = "pcache serve --preamble" if other == "preamble" else "install the same pcache-integ"
    for report in reports:
        assert report.reuse == "exact"
        assert remedy in str(report.fallback_reason)
    assert [b["kv_transfer_params"] for b in plain.bodies if "kv_transfer_params" in b] == [
        {LOAD: []}
    ]
    assert len([r for r in caplog.records if remedy in r.getMessage()]) == 1
    encoded = engine.encode(FACTS, progress=False)
    assert (encoded.kept, remedy in str(encoded.reason)) == (0, True)


def test_encoding_counts_texts_and_refuses_one_that_can_never_be_used(
    plain: _PlainServer, tiny: CausalLM
) -> None:
    plain.says, plain.most = connector(tiny, preambles_of(tiny)), 500
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    report = engine.encode([*FACTS, "Short."], progress=False)
    assert (report.texts, report.encoded, report.kept, report.too_short) == (4, 3, 3, 1)
    again = engine.encode(FACTS, progress=False)
    assert (again.encoded, again.already_stored) == (0, 3)
    before = len(plain.bodies)
    with pytest.raises(ContextLengthError, match=r"don't fit after a preamble .*500 tokens"):
        engine.encode([FACTS[0], "word " * 500], progress=False)
    assert len(plain.bodies) == before


@pytest.mark.parametrize("separator", ["\n", "\n\n", "~" * 32, "\U0001f9f6" * 12], ids=len)
@pytest.mark.parametrize("text", ["One of us who was there", FACTS[0]], ids=len)
def test_what_a_client_asks_for_is_within_what_a_server_takes(
    tiny: CausalLM, text: str, separator: str
) -> None:
    """As many short documents as there may be, each in the three ways that it may be stored."""
    segments: list[Segment] = [Segment("Read.\n", "literal")]
    for number in range(40):
        segments += [Segment(f"{text} {number}.", "document"), Segment(separator)]
    prompt = Prompt([*segments, Segment("Who?")])
    runs = modules_of(tiny, prompt).runs(space_of(tiny))
    joined, _ = join_separators(prompt, tiny.text.holds_special)
    length = len(tokenise(joined, tiny.text.ids, tiny.text.bos_ids).token_ids)
    assert len(runs) >= 79
    sent = json.loads(json.dumps([run.as_list() for run in runs]))
    assert list(parse_runs(sent, length, preambles_of(tiny))) == runs


@pytest.mark.parametrize(("reuse", "warns"), [("fast", 0), ("exact", 0), ("balanced", 1)])
def test_a_mode_that_a_server_has_no_counterpart_of_is_named_once(
    plain: _PlainServer, caplog: pytest.LogCaptureFixture, reuse: ReuseMode, warns: int
) -> None:
    address = Address(f"http://127.0.0.1:{plain.server_port}")
    engine = RemoteEngine(address, "builtin:tiny-rag", reuse=reuse)
    assert engine.reuse == reuse
    for _ in range(2):
        engine.generate(Prompt.from_text("Who?"))
    assert len([r for r in caplog.records if "repairs nothing" in r.getMessage()]) == warns


def test_a_served_engine_refuses_what_one_in_process_does(
    plain: _PlainServer, tiny: CausalLM
) -> None:
    here = PromptCacheEngine(tiny)
    there = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    asked: list[tuple[Any, Any, Any, Any]] = [
        ("Who?", None, None, None),
        (Prompt.from_text("Who?"), {"max_tokens": 4}, None, None),
        (Prompt.from_text("Who?"), None, "fast", 0.15),
        (Prompt.from_text("Who?"), None, "best", None),
        (Prompt.from_text("Who?"), None, "high", 1),
    ]
    for arguments in asked:
        errors: list[PromptCacheError] = []
        for engine in (here, there):
            with pytest.raises(PromptCacheError) as caught:
                engine.generate(*arguments)
            errors.append(caught.value)
        assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))
    assert len(plain.bodies) == 0


def test_prompts_of_a_schema_stand_without_gaps_which_is_said(
    plain: _PlainServer, tiny: CausalLM
) -> None:
    here = PromptCacheEngine(tiny)
    plan = "<module name='a'>Go by train.</module><module name='b'>Go by boat to the isle.</module>"
    here.add_schema(f'<schema name="trip">{plan}</schema>')
    whole, far = (
        here.prompt_from_pml(f'<prompt schema="trip">{used}When?</prompt>')
        for used in ("<a/><b/>", "<b/>")
    )
    there = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    with pytest.raises(PromptError, match="laid out for another model than the server says"):
        there.generate(far)
    plain.says = connector(tiny, preambles_of(tiny))
    there = RemoteEngine(there.address, "builtin:tiny-rag", reuse="fast")
    for prompt, has_gaps in ((whole, False), (far, True)):
        report = there.generate(prompt).report
        (*_, asked) = (body["prompt"] for body in plain.bodies if body.get("stream"))
        assert asked == list(here.tokenise(prompt).token_ids)
        assert ("without the gaps" in str(report.fallback_reason)) == has_gaps
        assert report.reuse == "fast"


@pytest.mark.parametrize("mode", ["off", "exact", "fast", "balanced"])
def test_sources_that_a_server_can_not_name_are_named_as_lost(
    plain: _PlainServer, tiny: CausalLM, mode: ReuseMode
) -> None:
    plain.says = connector(tiny, preambles_of(tiny))
    engine = RemoteEngine(Address(f"http://127.0.0.1:{plain.server_port}"), "builtin:tiny-rag")
    report = engine.generate(Prompt.from_text("Who?"), SamplingParams(sources=True), mode).report
    assert "answers name no sources" in str(report.fallback_reason)
    assert ("repairs nothing" in str(report.fallback_reason)) == (mode == "balanced")


def test_something_else_than_a_preamble_is_refused(plain: _PlainServer) -> None:
    address = Address(f"http://127.0.0.1:{plain.server_port}")
    with pytest.raises(OptionError, match="preamble must be a Preamble, got str"):
        RemoteEngine(address, "builtin:tiny-rag", preamble="Read.")  # type: ignore[arg-type]
