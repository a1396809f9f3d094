"""`pcache eval`: the reuse modes on one question set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from pcache_core.errors import OptionError
from pcache_core.params import DEFAULT_MODEL, REUSE_MODES, check_reuse, check_storage_dtype
from pcache_integrations.cli.errors import INTERRUPTED
from pcache_integrations.cli.options import (
    CORPUS_DOCUMENTS,
    MODEL_HELP,
    TOY,
    AsJson,
    Device,
    Dtype,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from pcache_core.evaluation.data import QuestionSet
    from pcache_core.evaluation.prompts import Layout

_QUESTIONS = 400  # one question is a quarter of a point
_RANKED_DOCUMENTS = 32
_WIDTH_OF_A_FILE = 120  # columns of output that is not a terminal


def evaluate(  # noqa: PLR0913 (each is an option of the command)
    model: Annotated[
        str | None,
        typer.Option(
            help=MODEL_HELP,
            show_default="builtin:smollm2; builtin:tiny-rag for the tiny world",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Questions as JSON or JSON lines: question, contexts, answers; or in the shape "
            "of LongBench, MuSiQue, HotpotQA or 2WikiMQA. Without it, the corpus that comes with "
            "the project is asked; the tiny world where the model is builtin:tiny-rag, or an "
            "option of the tiny world is given."
        ),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(
            help="Documents in each prompt, without --data.", show_default="12, tiny world: 8"
        ),
    ] = None,
    hops: Annotated[
        int | None, typer.Option(help="Tiny world: 2 for chains of two facts.", show_default="1")
    ] = None,
    split: Annotated[
        bool,
        typer.Option("--split", help="Tiny world: chunks that name their subject by 'She' only."),
    ] = False,
    absent: Annotated[
        bool, typer.Option("--absent", help="Tiny world: what no document answers.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Tiny world: draws the questions.", show_default="0")
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many.", show_default="all; 400 of the tiny world, which has no end"
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="Reuse modes to compare with off, by commas.", show_default="all"),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Ask through the model's own chat template, or in plain text.",
            show_default="--chat if its template tells a user from an assistant",
        ),
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Encode all documents before the first question.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    storage_dtype: Annotated[
        str | None,
        typer.Option(
            help="Keep states in files as auto, float32, bfloat16, float16 or int8, and use them "
            "from there; without it they stay in memory."
        ),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option(help="Also sweep repair budgets, and plot it into this .svg or .png."),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print the answers to this many questions, too.")
    ] = 0,
    rank: Annotated[
        bool,
        typer.Option(
            "--rank",
            help="Instead of the modes, compare rankings of the documents, by the question's "
            "attention and by BM25: 32 documents unless --documents or --data says otherwise.",
        ),
    ] = False,
    keep: Annotated[
        int, typer.Option(min=1, help="With --rank: answer from this many of the best.")
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Compare the reuse modes, or rankings of documents, on one question set.

    Interrupted by ctrl-C, it prints what the questions until then gave.
    """
    from pcache_core.evaluation.curve import check_plot, plot, sweep
    from pcache_core.evaluation.evaluate import evaluate as ask
    from pcache_core.evaluation.rank import evaluate_ranking
    from pcache_integrations._engines import load_lm

    if rank:
        unused = {"modes": modes, "warm": warm, "curve": curve, "show": show}
        unused["storage-dtype"] = storage_dtype
        options = ", ".join(f"--{name}" for name, value in unused.items() if value)
        if options:
            raise OptionError(f"--rank compares rankings, not modes; leave out {options}")
        if data is None and documents is None:
            documents = _RANKED_DOCUMENTS
    names = REUSE_MODES if modes is None else modes.split(",")
    chosen = [check_reuse(name.strip()) for name in names]
    world = {"documents": documents, "hops": hops, "split": split, "absent": absent, "seed": seed}
    given = {
        name: value for name, value in world.items() if value is not None and value is not False
    }
    storage = None if storage_dtype is None else check_storage_dtype(storage_dtype)
    if curve is not None:
        check_plot(curve)
    model = model or (TOY if given.keys() - {"documents"} else DEFAULT_MODEL)
    asked = _questions(model, data, given, questions)
    lm = load_lm(model, dtype, device, trust_remote_code=trust_remote_code)
    layout: Layout | None = None if chat is None else "chat" if chat else "completion"
    if rank:
        ranked = evaluate_ranking(lm, asked, keep=keep, layout=layout, max_tokens=max_tokens)
        _print(ranked, ranked.as_json() if as_json else None)
        return
    result = ask(
        lm,
        asked,
        modes=chosen,
        sweep=() if curve is None else sweep(),
        layout=layout,
        max_tokens=max_tokens,
        storage_dtype=storage,
        warm=warm,
    )
    if show and not as_json:
        _print(result.transcript(show), None)
    _print(result, result.as_json(show) if as_json else None)
    if curve is not None:
        plot(result, curve)
    if result.unasked:
        raise typer.Exit(INTERRUPTED)


def _print(table: RenderableType, figures: dict[str, Any] | None) -> None:
    """figures: what is printed as JSON instead of the table; None for the table."""
    if figures is not None:
        print(json.dumps(figures, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE).print(table)


def _questions(
    model: str, data: Path | None, world: dict[str, Any], count: int | None
) -> QuestionSet:
    """Read those of a file, of the corpus, or of the tiny world with the options given for it."""
    from pcache_core.evaluation.data import WorldOptions, tiny_world
    from pcache_core.evaluation.files import read_questions
    from pcache_integrations.demo.corpus import Corpus, shipped

    if data is None:
        if model == TOY or world.keys() - {"documents"}:
            return tiny_world(WorldOptions(**world), _QUESTIONS if count is None else count)
        return Corpus(shipped("corpus")).question_set(
            world.get("documents", CORPUS_DOCUMENTS), count
        )
    if world:
        options = ", ".join(f"--{name}" for name in world)
        raise OptionError(
            f"--data asks what {data} holds, but {options} is for questions without --data; "
            "leave out one or the other"
        )
    return read_questions(data, count)
