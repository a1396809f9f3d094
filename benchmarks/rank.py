"""How often the right document comes first: by the question's attention, and by BM25.

    python benchmarks/rank.py --model builtin:smollm2 --top-k 8

Each question of `examples/corpus` is asked over the documents that BM25 ranks highest, shuffled;
the right one takes the last place among them where BM25 missed it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from statistics import median

from pcache_core import CausalLM, PromptCacheEngine
from pcache_integrations.demo.corpus import Corpus, shipped


def main() -> None:
    """Rank, and print how often the right document was first and among the first three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--top-k", type=int, default=8)
    arguments = parser.parse_args()
    engine = PromptCacheEngine(CausalLM.from_pretrained(arguments.model))
    corpus, chance = Corpus(shipped("corpus")), random.Random(1)
    by_name = {chunk.name: chunk for chunk in corpus.documents}
    engine.encode([chunk.text for chunk in corpus.documents])
    first: Counter[str] = Counter()
    among_three: Counter[str] = Counter()
    times_s = []
    for question in corpus.questions:
        assert question.document is not None
        found = [chunk.name for chunk in corpus.search(question.text, arguments.top_k)]
        if question.document not in found:
            found[-1] = question.document
        names = chance.sample(found, len(found))
        started = time.perf_counter()
        scores = engine.rank(question.text, [by_name[name].text for name in names])
        times_s.append(time.perf_counter() - started)
        order = sorted(range(len(names)), key=scores.__getitem__, reverse=True)
        for way, ranked in (("attention", [names[i] for i in order]), ("BM25", found)):
            first[way] += ranked[0] == question.document
            among_three[way] += question.document in ranked[:3]
    print(f"{engine.lm.name}, {len(corpus.questions)} questions, {arguments.top_k} documents each")
    for way in ("attention", "BM25"):
        print(f"{way:10} first {first[way]:3}, among the first three {among_three[way]:3}")
    print(f"{1000 * median(times_s):,.0f} ms a question (median), documents known")


if __name__ == "__main__":
    main()
