"""Running the demonstration and printing what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.markup import escape

from pcache_core import CausalLM, PromptCacheEngine, Report
from pcache_core.params import DEFAULT_REUSE, ReuseMode
from pcache_integrations.demo.corpus import Corpus, Question
from pcache_integrations.demo.pipelines import Pipeline, langchain_pipeline, llama_index_pipeline

_MODES: tuple[ReuseMode, ReuseMode] = ("off", DEFAULT_REUSE)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question asked through a framework, without and with reuse.

    expected: what the corpus says, empty if unknown. off, on: reports of the two requests.
    """

    framework: str
    question: str
    expected: str
    answer_off: str
    answer_on: str
    off: Report
    on: Report

    @property
    def speedup(self) -> float:
        """Time to first token without reuse over that with reuse."""
        return self.off.ttft_ms / self.on.ttft_ms

    def as_json(self) -> dict[str, object]:
        """Plain values, for machines."""
        return {
            "framework": self.framework,
            "question": self.question,
            "expected": self.expected or None,
            "answer_off": self.answer_off,
            "answer_on": self.answer_on,
            "prompt_tokens": self.on.prompt_tokens,
            "cached_tokens": self.on.cached_tokens,
            "ttft_off_ms": self.off.ttft_ms,
            "ttft_on_ms": self.on.ttft_ms,
        }


def run_demo(lm: CausalLM, corpus: Corpus, *, top_k: int, console: Console) -> list[Comparison]:
    """Ask every question through both frameworks, reuse off and on; print each as it comes.

    Each framework has an engine and a store of its own, so that neither profits from the other.
    """
    console.print(
        f"{escape(lm.name)} on {lm.device}, {len(corpus.documents)} documents, "
        f"{len(corpus.questions)} questions, {top_k} documents each"
    )
    results: list[Comparison] = []
    for build in (langchain_pipeline, llama_index_pipeline):
        pipeline = build(PromptCacheEngine(lm), corpus, top_k)
        console.rule(pipeline.name)
        console.print(str(pipeline.cache()))
        _warm_up(pipeline)
        for number, question in enumerate(corpus.questions):
            comparison = compare(pipeline, question, off_first=number % 2 == 0)
            _print_comparison(console, question, comparison)
            results.append(comparison)
    console.rule()
    console.print(summary(results))
    return results


def compare(pipeline: Pipeline, question: Question, *, off_first: bool) -> Comparison:
    """Ask one question without and with reuse. The order alternates, so that neither gains."""
    answers: dict[ReuseMode, tuple[str, Report]] = {}
    for mode in _MODES if off_first else _MODES[::-1]:
        answer = pipeline.ask(question.text, mode)
        answers[mode] = (answer, pipeline.engine.reports[-1])
    (answer_off, off), (answer_on, on) = (answers[mode] for mode in _MODES)
    return Comparison(pipeline.name, question.text, question.answer, answer_off, answer_on, off, on)


def summary(results: Sequence[Comparison]) -> str:
    """One line over everything that was asked."""
    documents = [part for c in results for part in c.on.segments if part.kind == "document"]
    tokens = sum(part.num_tokens for part in documents)
    reused = sum(p.num_tokens for p in documents if p.source not in ("computed", "encoded"))
    known = [c for c in results if c.expected]
    off, on = median(c.off.ttft_ms for c in results), median(c.on.ttft_ms for c in results)
    return (
        f"{len(results)} questions: "
        f"{sum(c.answer_on == c.answer_off for c in results)} answers the same with reuse, "
        f"{sum(c.answer_off == c.expected for c in known)} right without and "
        f"{sum(c.answer_on == c.expected for c in known)} right with it (of {len(known)}); "
        f"{reused / tokens if tokens else 0:.0%} of document tokens reused; "
        f"median time to first token {off:.1f} → {on:.1f} ms, {off / on:.1f} times faster"
    )


def _warm_up(pipeline: Pipeline) -> None:
    """First calls pay for imports and memory; measure neither mode with them."""
    for mode in _MODES:
        pipeline.ask("Is anybody there?", mode)


def _print_comparison(console: Console, question: Question, result: Comparison) -> None:
    names = [part.name or "?" for part in result.on.segments if part.kind == "document"]
    verdict = ""
    if result.expected:
        verdict = "[green]right[/]" if result.answer_on == result.expected else "[red]wrong[/]"
    console.print(f"[bold]{escape(question.text)}[/]")
    console.print(f"  {escape(result.answer_on)}  {verdict}")
    if result.answer_on != result.answer_off:
        console.print(f"  without reuse: {escape(result.answer_off)}")
    console.print(f"  [dim]{escape(', '.join(names))}[/]")
    console.print(
        f"  {result.on.cached_tokens} tokens reused, {result.on.computed_tokens} computed; "
        f"first token {result.off.ttft_ms:.1f} → {result.on.ttft_ms:.1f} ms, "
        f"{result.speedup:.1f} times faster"
    )
