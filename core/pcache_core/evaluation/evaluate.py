"""A question set and a model to a table: what `pcache eval` runs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch
from tqdm import tqdm

from pcache_core.engine import PromptCacheEngine
from pcache_core.evaluation.data import QuestionSet
from pcache_core.evaluation.metrics import ROUGE_HINT, has_rouge
from pcache_core.evaluation.prompts import Layout, fit
from pcache_core.evaluation.run import BASELINE, Outcomes, Way, measure
from pcache_core.evaluation.table import Evaluation, summarise
from pcache_core.lm import CausalLM
from pcache_core.params import REUSE_MODES, ReuseMode, SamplingParams
from pcache_core.store.record import StorageDtype

ANSWER_TOKENS = 32


def evaluate(  # noqa: PLR0913 (each is an option of the command)
    lm: CausalLM,
    questions: QuestionSet,
    *,
    modes: Sequence[ReuseMode] = REUSE_MODES,
    sweep: Sequence[Way] = (),
    layout: Layout = "completion",
    max_tokens: int = ANSWER_TOKENS,
    storage_dtype: StorageDtype | None = None,
) -> Evaluation:
    """Ask every question in every mode, greedily, and compare the modes with `off`.

    modes: beside `off`, which is always asked and has a row. sweep: more ways to ask, for a curve.
    storage_dtype: how files keep the states between being encoded and being used; None keeps them
        in memory.
    An answer ends at a line's end. Shows a progress bar on standard error if that is a terminal.

    Raises: ContextLengthError, ChatTemplateError, OptionError: before the first question.
    """
    chosen = (Way(mode, mode) for mode in modes)
    ways = list(dict.fromkeys((BASELINE, *chosen, *sweep)))
    params = SamplingParams(max_tokens=max_tokens, stop=["\n"])
    engine = PromptCacheEngine(lm)
    fitted = [fit(engine, item, layout, max_tokens) for item in questions.items]
    prompts = [each.prompt for each in fitted]
    shortened = [each.left_out for each in fitted if each.left_out]
    outcomes = list(
        tqdm(
            measure(lm, prompts, ways, params, storage_dtype),
            desc="questions",
            total=len(prompts),
            disable=None,  # unless standard error is a terminal
        )
    )
    names = [way.name for way in ways]
    return Evaluation(
        model=lm.name,
        questions=questions,
        rows=summarise(questions, outcomes, names),
        max_tokens=max_tokens,
        shortened=len(shortened),
        environment=environment(lm),
        notes=(*_storage(storage_dtype), *_notes(outcomes, names, shortened)),
    )


def _storage(storage_dtype: StorageDtype | None) -> tuple[str, ...]:
    if storage_dtype is None:
        return ()
    return (f"states were read from files that keep them as {storage_dtype}",)


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
