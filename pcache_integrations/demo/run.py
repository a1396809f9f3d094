"""Running the demonstration and printing what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pcache_core import CausalLM, EncodeReport, MemoryStore, PromptCacheEngine, Report
from pcache_core.evaluation.metrics import contains
from pcache_core.params import DEFAULT_REUSE, ReuseMode
from pcache_core.picture import shown
from pcache_integrations.demo.corpus import Corpus, Question
from pcache_integrations.demo.pipelines import Pipeline, langchain_pipeline, llama_index_pipeline

MODES: tuple[ReuseMode, ...] = ("off", DEFAULT_REUSE, "fast")
_NAME_COLUMNS = max(map(len, MODES))


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in one mode. is_right: whether it holds the expected value; None if unknown."""

    answer: str
    is_right: bool | None
    report: Report


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, asked through a framework in every mode."""

    framework: str
    question: Question
    replies: dict[ReuseMode, Reply]

    def as_json(self) -> dict[str, object]:
        """Plain values, for machines."""
        return {
            "framework": self.framework,
            "question": self.question.text,
            "expected": list(self.question.answers) or None,
            "prompt_tokens": self.replies["off"].report.prompt_tokens,
            "replies": {
                mode: {
                    "answer": reply.answer,
                    "right": reply.is_right,
                    "cached_tokens": reply.report.cached_tokens,
                    "repaired_tokens": reply.report.repaired_tokens,
                    "computed_tokens": reply.report.computed_tokens,
                    "ttft_ms": reply.report.ttft_ms,
                }
                for mode, reply in self.replies.items()
            },
        }


@dataclass(slots=True)
class Demo:
    """What happened so far.

    encoded: by framework, when its documents were encoded ahead. interrupted: by ctrl-C.
    """

    asked: list[Asked] = field(default_factory=list)
    encoded: dict[str, EncodeReport] = field(default_factory=dict)
    interrupted: bool = False


def run_demo(
    lm: CausalLM, corpus: Corpus, questions: Sequence[Question], *, top_k: int, console: Console
) -> Demo:
    """Ask the questions through both frameworks in three modes; print each answer as it comes.

    Each framework has a store of its own, so that neither profits from the other. An interrupt
    (ctrl-C) ends it with what there is.
    """
    demo = Demo()
    try:
        console.print(
            f"[bold]{escape(shown(lm.name))}[/] on {lm.device}: {len(questions)} questions, "
            f"{top_k} of {len(corpus.documents)} documents in each prompt, "
            "through LangChain and through LlamaIndex"
        )
        for build in (langchain_pipeline, llama_index_pipeline):
            store = MemoryStore()
            engines = {mode: PromptCacheEngine(lm, store, mode) for mode in MODES}
            _run_pipeline(build(engines, corpus, top_k), questions, demo, console)
    except KeyboardInterrupt:
        demo.interrupted = True
    if demo.asked:
        _print_ending(demo, console)
    return demo


def _run_pipeline(
    pipeline: Pipeline, questions: Sequence[Question], demo: Demo, console: Console
) -> None:
    console.print()
    console.rule(pipeline.name)
    demo.encoded[pipeline.name] = encoded = pipeline.cache()
    console.print(f"encoded ahead: {escape(shown(str(encoded)))}", style="dim")
    for mode in MODES:  # first calls pay for imports and memory; measure no mode with them
        pipeline.ask("Is anybody there?", mode)
    for number, question in enumerate(questions):
        turn = number % len(MODES)  # none always goes first
        told = {mode: pipeline.ask(question.text, mode) for mode in MODES[turn:] + MODES[:turn]}
        replies = {mode: _reply(question, *told[mode]) for mode in MODES}
        asked = Asked(pipeline.name, question, replies)
        demo.asked.append(asked)
        console.print()
        console.print(
            f"[dim]{number + 1}/{len(questions)}[/]  [bold]{escape(shown(question.text))}[/]"
        )
        console.print(_replies(asked))


def _reply(question: Question, answer: str, report: Report) -> Reply:
    right = bool(contains(answer, question.answers)) if question.answers else None
    return Reply(answer, right, report)


def _replies(asked: Asked) -> Table:
    """Draw a line for each mode: its name, right or not, the answer, time to the first token."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=2 + _NAME_COLUMNS)
    grid.add_column(width=1)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    for mode, reply in asked.replies.items():
        answer = Text(shown(reply.answer)) if reply.answer else Text("(no answer)", style="dim")
        grid.add_row(f"  {mode}", _mark(reply), answer, f"{_time(reply.report.ttft_ms)}")
    return grid


def _mark(reply: Reply) -> Text:
    if reply.is_right is None:
        return Text(" ")
    return Text("✓", style="green") if reply.is_right else Text("✗", style="red")


def _print_ending(demo: Demo, console: Console) -> None:
    """Print the last prompt by source, the figures as a table, and in words."""
    last = demo.asked[-1].replies[DEFAULT_REUSE].report
    console.print()
    console.rule("one of the prompts, by where it came from")
    console.print(last)
    console.print()
    console.rule("in numbers")
    console.print(_table(demo.asked))
    console.print()
    for sentence in sentences(demo):
        console.print(sentence)


def _table(asked: Sequence[Asked]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\nframework", no_wrap=True)
    table.add_column("\nreuse", no_wrap=True)
    for header in ("answers\nright", "\nempty", "first token\n(median)", "\nsooner"):
        table.add_column(header, justify="right", no_wrap=True)
    for framework in dict.fromkeys(each.framework for each in asked):
        own = [each for each in asked if each.framework == framework]
        for number, mode in enumerate(MODES):
            replies = [each.replies[mode] for each in own]
            sooner = _speedup(own, mode)
            table.add_row(
                "" if number else framework,
                mode,
                f"{sum(bool(reply.is_right) for reply in replies)} of {len(replies)}",
                str(sum(not reply.answer for reply in replies)),
                _time(median(reply.report.ttft_ms for reply in replies)),
                "" if mode == "off" else f"{sooner:.1f} ×",
            )
    return table


def sentences(demo: Demo) -> list[str]:
    """Say what the table says, in words."""
    asked = demo.asked
    known = [each for each in asked if each.question.answers]
    tokens = [each.replies["off"].report.prompt_tokens for each in asked]

    def right(mode: ReuseMode) -> int:
        return sum(bool(each.replies[mode].is_right) for each in known)

    off = median(each.replies["off"].report.ttft_ms for each in asked)
    lines = [
        f"A prompt has {min(tokens):,} to {max(tokens):,} tokens. With reuse [bold]off[/], its "
        f"first token takes {_time(off)} (median), and {right('off')} of {len(known)} answers are "
        "right."
    ]
    for mode in MODES[1:]:
        name = f"{mode}[/], the default mode," if mode == DEFAULT_REUSE else f"{mode}[/]"
        lines.append(
            f"In [bold]{name} the first token comes [bold]{_speedup(asked, mode):.1f} times "
            f"sooner[/], and {right(mode)} of {len(known)} answers are right."
        )
    seconds = [f"{report.seconds:.1f}" for report in demo.encoded.values() if report.encoded]
    if seconds:
        texts = next(iter(demo.encoded.values())).texts
        lines.append(
            f"Before, each framework encoded the {texts} documents once, in "
            f"{' and '.join(seconds)} seconds; that is not in the times."
        )
    return lines


def _speedup(asked: Sequence[Asked], mode: ReuseMode) -> float:
    """Divide the time to the first token without reuse by that in a mode; both are medians."""
    off, own = (median(e.replies[m].report.ttft_ms for e in asked) for m in ("off", mode))
    return off / own


def _time(time_ms: float) -> str:
    return f"{time_ms:,.0f} ms" if time_ms < 10_000 else f"{time_ms / 1000:,.1f} s"
