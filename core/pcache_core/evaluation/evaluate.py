"""A question set and a model to a table: what `pcache eval` runs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from tqdm import tqdm

from pcache_core.engine import PromptCacheEngine
from pcache_core.evaluation.data import QuestionSet
from pcache_core.evaluation.metrics import ROUGE_HINT, has_rouge
from pcache_core.evaluation.prompts import Fitted, Layout, fit
from pcache_core.evaluation.run import BASELINE, Conditions, Outcomes, Way, measure
from pcache_core.evaluation.table import Evaluation, summarise
from pcache_core.lm import CausalLM
from pcache_core.params import REUSE_MODES, ReuseMode, SamplingParams, StorageDtype

ANSWER_TOKENS = 32


def evaluate(  # noqa: PLR0913 (each is an option of the command)
    lm: CausalLM,
    questions: QuestionSet,
    *,
    modes: Sequence[ReuseMode] = REUSE_MODES,
    sweep: Sequence[Way] = (),
    layout: Layout | None = None,
    max_tokens: int = ANSWER_TOKENS,
    storage_dtype: StorageDtype | None = None,
    warm: bool = False,
) -> Evaluation:
    """Ask every question in every mode, greedily, and compare the modes with `off`.

    modes: beside `off`, which is always asked and has a row. sweep: more ways to ask, for a curve.
    layout: `chat` if not given and the model's chat template tells a user from an assistant.
    storage_dtype: how files keep the states between being encoded and being used; None keeps them
        in memory. warm: encode all documents before the first question, as `engine.encode` does,
        instead of each by the first question that has it.
    An answer ends at a line's end. Shows a progress bar on standard error if that is a terminal.
    An interrupt (ctrl-C) ends it with the questions that were asked in every way until then.

    Raises: ContextLengthError, ChatTemplateError, OptionError: before the first question.
        KeyboardInterrupt: before the first question was done.
    """
    if layout is None:
        layout = "chat" if lm.text.marks_roles() else "completion"
    chosen = (Way(mode, mode) for mode in modes)
    ways = list(dict.fromkeys((BASELINE, *chosen, *sweep)))
    params = SamplingParams(max_tokens=max_tokens, stop=["\n"])
    engine = PromptCacheEngine(lm)
    fitted = [fit(engine, item, layout, max_tokens) for item in questions.items]
    conditions = Conditions(params, storage_dtype, warm)
    outcomes = _ask(lm, fitted, ways, conditions)
    names = [way.name for way in ways]
    asked = replace(questions, items=questions.items[: len(outcomes)])
    shortened = [each.left_out for each in fitted[: len(outcomes)] if each.left_out]
    return Evaluation(
        model=lm.name,
        questions=asked,
        rows=summarise(asked, outcomes, names),
        answers=tuple({name: each[name].answer for name in names} for each in outcomes),
        layout=layout,
        max_tokens=max_tokens,
        shortened=len(shortened),
        unasked=len(fitted) - len(outcomes),
        environment=environment(lm),
        notes=(*_how(conditions), *_notes(outcomes, names, shortened)),
    )


def _ask(
    lm: CausalLM, fitted: Sequence[Fitted], ways: Sequence[Way], conditions: Conditions
) -> list[Outcomes]:
    """Ask all questions in every way, or those until an interrupt."""
    outcomes: list[Outcomes] = []
    with tqdm(
        desc="answers",
        total=len(fitted) * len(ways),
        disable=None,  # unless standard error is a terminal
    ) as bar:
        try:
            for each in measure(lm, fitted, ways, conditions, bar.update):
                outcomes.append(each)
        except KeyboardInterrupt:
            if not outcomes:
                raise
    return outcomes


def _how(conditions: Conditions) -> tuple[str, ...]:
    """Return what was different from the usual."""
    notes = []
    if conditions.warm:
        notes.append("all documents were encoded ahead")
    if conditions.storage_dtype is not None:
        kept = conditions.storage_dtype
        notes.append(f"states were read from files that keep them as {kept}")
    return tuple(notes)


def environment(lm: CausalLM) -> dict[str, str | int]:
    """Hardware and versions, for whoever compares times."""
    on_gpu = lm.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(lm.device) if on_gpu else str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _notes(
    outcomes: Sequence[Outcomes], names: Sequence[str], shortened: Sequence[int]
) -> tuple[str, ...]:
    """What the figures alone don't tell. shortened: documents left out, where there are any."""
    notes = []
    if "exact" in names:
        notes.append("exact computes every token: no question continues an earlier prompt")
    if shortened:
        notes.append(
            f"{len(shortened)} of {len(outcomes)} questions left out {sum(shortened)} documents "
            "from their middle, to fit the model's context"
        )
    reports = {name: [each[name].report for each in outcomes] for name in names}
    for name, asked in reports.items():
        reasons = [report.fallback_reason for report in asked if report.fallback_reason]
        if reasons:
            count = f"{len(reasons)} of {len(outcomes)} questions"
            notes.append(f"{name} fell back for {count}: {reasons[0]}")
    if not has_rouge():
        notes.append(ROUGE_HINT)
    return tuple(notes)
