"""A random model in bfloat16, served by vLLM, beside transformers on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from pcache_core import (
    CausalLM,
    DiskStore,
    Preamble,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.kv.key import KeySpace
from vllm_server import Cluster, client, first_distance

pytestmark = pytest.mark.timeout(900)  # servers take a minute to start, on a busy machine many

RANDOM_DOCUMENTS = [
    "The harbour at Stonn was dug by hand, and took eleven years of work to finish.",
    "Ellis Varr keeps the toll bridge; she counts the carts, and never sells a ticket twice.",
    "A fire in the north granary was put out with milk because the well had run dry.",
]


def test_states_of_transformers_and_of_vllm_are_interchangeable(
    cluster: Cluster, tmp_path: Path
) -> None:
    lm = CausalLM.from_pretrained(cluster.random.name)
    own, served = DiskStore(tmp_path), DiskStore(cluster.random_store)
    texts = [text + "\n\n" for text in RANDOM_DOCUMENTS]
    preamble = Preamble.of_file(cluster.random_preamble)
    engine = PromptCacheEngine(lm, store=own, preamble=preamble)
    engine.encode(texts, progress=False)
    report = client(cluster.random, preamble=preamble).encode(RANDOM_DOCUMENTS, progress=False)
    assert report.kept == 3
    space = KeySpace(lm.fingerprint, str(lm.dtype), "default")
    opening = lm.text.bos_ids + lm.text.ids(Segment(str(preamble.opening), "literal"))
    for text, before in product(texts, (opening, engine.preamble_for(texts[0]))):
        key = space.key(before, lm.text.ids(Segment(text, "document")), None)
        ours, theirs = own.get(key), served.get(key)
        assert ours is not None
        assert theirs is not None
        theirs.state.check(lm.stacks, lm.dtype)
        assert theirs.state.position == ours.state.position
        for mine, other in zip(ours.state.layers(), theirs.state.layers(), strict=True):
            for a, b in zip(mine, other, strict=True):
                error = (a.float() - b.float()).norm() / a.float().norm()
                assert error < 2e-2  # bfloat16 has 8 bits: 4e-3 a rounding, three layers of them
                unmatched = (a.float() - b.float().roll(1, dims=1)).norm() / a.float().norm()
                assert unmatched > 0.5


def test_a_random_model_in_bfloat16_answers_as_our_engine_does_in_fast(cluster: Cluster) -> None:
    lm = CausalLM.from_pretrained(cluster.random.name)
    preamble = Preamble.of_file(cluster.random_preamble)
    local = PromptCacheEngine(lm, reuse="fast", preamble=preamble)
    engine = client(cluster.random, preamble=preamble)
    opening = Segment("Read the documents, then go on.\n\n", "literal")

    def asked(order: Sequence[int]) -> Prompt:
        texts = [RANDOM_DOCUMENTS[index] + "\n\n" for index in order]
        documents = [Segment(text, "document") for text in texts]
        return Prompt([opening, *documents, Segment("What did the keeper say of it?", "text")])

    one_token = SamplingParams(max_tokens=1, logprobs=10)
    engine.generate(asked([0, 1, 2]), one_token)
    engine.flush()
    remote = engine.generate(asked([2, 0, 1]), one_token)
    here = local.generate(asked([2, 0, 1]), one_token)
    off = local.generate(asked([2, 0, 1]), one_token, reuse="off")
    assert remote.report.cached_tokens > 100

    assert first_distance(remote, here) < 0.2
    assert first_distance(remote, here) < first_distance(remote, off)
