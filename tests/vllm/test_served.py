"""Module states inside real vLLM servers, over HTTP.

The oracles are our own engine on the same weights, in this process, and the server itself with
nothing reused.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_client

from pcache_core import (
    CausalLM,
    Generation,
    Preamble,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.evaluation.data import Item, WorldOptions, tiny_world
from pcache_core.evaluation.prompts import make_prompt
from pcache_core.evaluation.world.questions import OPENING, SEPARATOR
from pcache_core.kv.key import KeySpace
from pcache_core.store.redis import RedisStore
from pcache_integrations.vllm.client_modules import join_separators
from pcache_integrations.vllm.protocol import LOAD, SAVE, Run, exact_salt, fast_salt
from vllm_server import Cluster, VllmServer, client, first_distance, post

pytestmark = pytest.mark.timeout(900)  # servers take a minute to start, on a busy machine many

PARAMS = SamplingParams(max_tokens=12, logprobs=5)


def questions(seed: int, count: int = 1, documents: int = 8) -> tuple[Item, ...]:
    return tiny_world(WorldOptions(documents=documents, seed=seed), count).items


def encode(lm: CausalLM, cluster: Cluster, items: Sequence[Item]) -> None:
    """As `pcache encode` does: by our engine, into the store that the servers read."""
    engine = PromptCacheEngine(lm, store=RedisStore(cluster.redis.url))
    texts = [context + SEPARATOR for item in items for context in item.contexts]
    engine.encode(texts, progress=False)
    # A prompt's constant opening is stored by whoever reads it first.
    engine.prefill(Prompt([Segment(OPENING, "literal"), Segment("Go on.")]), "fast")


def prompt(item: Item, *, seed: int | None = None) -> Prompt:
    """The item's prompt, its documents in another order if a seed is given."""
    contexts = list(item.contexts)
    if seed is not None:
        random.Random(seed).shuffle(contexts)
    return make_prompt(None, item.question, contexts, "completion")  # type: ignore[arg-type]


def document_tokens(answer: Generation) -> int:
    return sum(s.num_tokens for s in answer.report.segments if s.kind == "document")


def agree_up_to_a_tie(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two answers part only where two tokens were as likely, to the last digits.

    Batches of another size round otherwise.
    """
    ids = zip(a["token_ids"], b["token_ids"], strict=True)
    parted = next((index for index, (own, other) in enumerate(ids) if own != other), None)
    if parted is None:
        return True
    first, second = sorted(a["logprobs"]["top_logprobs"][parted].values())[-2:]
    return abs(first - second) < 0.02


def test_answers_of_a_corpus_encoded_once_are_our_engines_on_both_replicas(
    cluster: Cluster, tiny: CausalLM
) -> None:
    items = questions(seed=1, count=100)
    encode(tiny, cluster, items)
    local = PromptCacheEngine(tiny, reuse="fast")
    replicas = [client(cluster.first), client(cluster.second)]
    equal = 0
    for number, item in enumerate(items):
        asked = prompt(item, seed=number)
        answer = replicas[number % 2].generate(asked, PARAMS)
        assert answer.report.cached_tokens > 0.95 * document_tokens(answer)
        joined, _ = join_separators(asked, tiny.text.holds_special)
        equal += answer.text == local.generate(joined, PARAMS).text
    assert equal >= 99


def test_documents_in_a_new_order_are_cached_where_stock_vllm_has_none(
    cluster: Cluster, tiny: CausalLM
) -> None:
    (item,) = questions(seed=2, documents=24)
    encode(tiny, cluster, [item])
    engine = client(cluster.first)
    engine.generate(prompt(item), PARAMS)
    engine.generate(prompt(item), PARAMS, reuse="exact")
    fast = engine.generate(prompt(item, seed=1), PARAMS)
    stock = engine.generate(prompt(item, seed=1), PARAMS, reuse="exact")
    assert fast.report.cached_tokens >= 0.95 * document_tokens(fast)
    assert stock.report.cached_tokens == 0
    sources = [s.source for s in fast.report.segments if s.kind == "document"]
    assert sources == ["remote"] * 24


def test_exact_answers_after_reused_ones_are_those_of_a_prompt_nobody_saw(
    cluster: Cluster, tiny: CausalLM
) -> None:
    (item,) = questions(seed=3)
    encode(tiny, cluster, [item])
    engine = client(cluster.first)
    fast = engine.generate(prompt(item), PARAMS)
    exact = engine.generate(prompt(item), PARAMS, reuse="exact")
    again = engine.generate(prompt(item), PARAMS, reuse="exact")
    off = engine.generate(prompt(item), PARAMS, reuse="off")
    assert fast.report.cached_tokens > 0
    assert exact.report.cached_tokens == off.report.cached_tokens == 0
    assert again.report.cached_tokens > 0
    assert first_distance(exact, off) < 1e-4
    assert first_distance(again, off) < 1e-4
    assert first_distance(fast, off) > 1e-3  # so that states taken for exact ones would show


def test_documents_seen_for_the_first_time_are_encoded_after_the_answer(cluster: Cluster) -> None:
    (item,) = questions(seed=4)
    engine = client(cluster.first)
    first = engine.generate(prompt(item), PARAMS)
    opening = engine.tokenise(prompt(item)).opening
    engine.flush()
    then = client(cluster.second).generate(prompt(item, seed=1), PARAMS)
    assert first.report.cached_tokens in (0, opening)  # others may have had the same opening
    assert then.report.cached_tokens >= 0.95 * document_tokens(then)
    assert then.text == first.text


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_state_that_is_gone_in_mid_prompt_is_computed(
    cluster: Cluster, tiny: CausalLM, harm: str
) -> None:
    (item,) = questions(seed=5 if harm == "missing" else 6)
    encode(tiny, cluster, [item])
    space = KeySpace(tiny.fingerprint, str(tiny.dtype), "default")
    tokens = client(cluster.first).tokenise(prompt(item))
    document = [piece for piece in tokens.pieces if piece.segment.kind == "document"][3]
    ids = tokens.token_ids[document.start : document.stop]
    preamble_ids = client(cluster.first).preamble_for(document.segment.text)
    digest = space.key(preamble_ids, ids, None).digest
    with redis_client.Redis(port=cluster.redis.port) as redis:
        names = redis.keys(f"*{digest}*")
        assert len(names) >= 2
        for name in names:
            if harm == "missing":
                redis.delete(name)
            elif len(content := redis.get(name) or b"") > 10_000:
                redis.set(name, content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    answer = client(cluster.first).generate(prompt(item), PARAMS)
    whole = client(cluster.first).generate(prompt(item), PARAMS, reuse="off")
    assert answer.text == whole.text
    warned = "a state could not be loaded" in cluster.first.log.read_text()
    if harm == "missing":
        assert 0 < answer.report.cached_tokens <= document.start
    else:
        assert warned


def test_a_key_that_is_not_the_prompts_own_is_not_used(cluster: Cluster, tiny: CausalLM) -> None:
    (item,) = questions(seed=7)
    engine = client(cluster.first)
    ids = engine.tokenise(prompt(item)).token_ids
    before = engine.connector
    assert before is not None
    other = KeySpace("another model", str(tiny.dtype), "default")
    foreign = [[0, 64, other.key((), ids[:64], None).digest, ""], [0, 64, "f" * 64, "en"]]
    version_1 = [[0, 64, before.key_space.key((), ids[:64], None).digest, 0]]
    plain = post(cluster.first, ids)["choices"][0]["text"]
    unknown = [[0, 64, "f" * 64, "xx"]]
    too_large = [[0, len(ids), "f" * 64, "en", [2**63]]]  # an error here would end the server
    beyond = [[0, 10_000, "f" * 64, ""]]
    for runs in (foreign, version_1, unknown, too_large, beyond, [["x"]], "nonsense"):
        answer = post(
            cluster.first,
            ids,
            cache_salt=fast_salt("default"),
            kv_transfer_params={LOAD: runs},
        )
        assert answer["choices"][0]["text"] == plain
    wrong = Run(0, 8, "f" * 64, "").as_list()
    post(cluster.first, ids, kv_transfer_params={SAVE: wrong})
    after = client(cluster.first).connector
    assert after is not None
    assert sum(after.refused.values()) == sum(before.refused.values()) + 9
    assert len(after.refused) == 3


def test_states_fill_no_prompt_that_others_would_take_for_exact(
    cluster: Cluster, tiny: CausalLM
) -> None:
    (item,) = questions(seed=8)
    encode(tiny, cluster, [item])
    request = client(cluster.first).request(prompt(item), PARAMS)
    params = {LOAD: [run.as_list() for run in request.runs]}

    def cached_tokens(**fields: str) -> int:
        answer = post(cluster.first, request.tokens.token_ids, kv_transfer_params=params, **fields)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached_tokens() == 0
    assert cached_tokens(cache_salt=exact_salt("default")) == 0
    assert cached_tokens(cache_salt=fast_salt("default")) > 100


def test_preempted_requests_resume_with_the_same_answers(cluster: Cluster, tiny: CausalLM) -> None:
    items = questions(seed=9, count=6)
    encode(tiny, cluster, items)
    engine = client(cluster.first)

    def ask(server: VllmServer, item: Item) -> dict[str, Any]:
        tokens = engine.tokenise(prompt(item))
        request = engine.request(prompt(item), PARAMS)
        answer = post(
            server,
            tokens.token_ids,
            max_tokens=200,
            ignore_eos=True,
            logprobs=2,
            return_token_ids=True,
            cache_salt=fast_salt("default"),
            kv_transfer_params={LOAD: [run.as_list() for run in request.runs]},
        )
        (choice,) = answer["choices"]
        assert len(choice["token_ids"]) == 200
        return dict(choice)

    alone = [ask(cluster.first, item) for item in items]
    before = cluster.second.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(items)) as pool:
        together = list(pool.map(lambda item: ask(cluster.second, item), items))
    assert cluster.second.metric("vllm:num_preemptions_total") > before
    assert all(map(agree_up_to_a_tie, alone, together))
    assert [one["text"][:8] for one in together] == [one["text"][:8] for one in alone]


def test_another_namespace_gets_no_states_and_says_so(cluster: Cluster) -> None:
    (item,) = questions(seed=1, count=1)
    answer = client(cluster.first, namespace="other").generate(prompt(item), PARAMS)
    assert answer.report.reuse == "exact"
    assert "namespace 'default'" in str(answer.report.fallback_reason)


def test_a_client_of_another_preamble_gets_no_states_and_is_told_what_to_do(
    cluster: Cluster, tiny: CausalLM
) -> None:
    (item,) = questions(seed=1, count=1)
    encode(tiny, cluster, [item])
    own = client(cluster.first, preamble=Preamble.none())
    answer = own.generate(prompt(item), PARAMS)
    assert answer.report.reuse == "exact"
    assert "pcache serve --preamble" in str(answer.report.fallback_reason)
    assert answer.text == own.generate(prompt(item), PARAMS, reuse="off").text
    assert client(cluster.first).generate(prompt(item), PARAMS).report.cached_tokens > 0


def test_without_redis_both_replicas_answer(cluster: Cluster, tiny: CausalLM) -> None:
    (item,) = questions(seed=10)
    encode(tiny, cluster, [item])
    expected = client(cluster.first).generate(prompt(item), PARAMS, reuse="off").text
    cluster.redis.kill()
    try:
        for server in (cluster.first, cluster.second):
            answer = client(server).generate(prompt(item), PARAMS)
            assert answer.text == expected
            assert answer.report.cached_tokens == 0
    finally:
        cluster.redis.start()
