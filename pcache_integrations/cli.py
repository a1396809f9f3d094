"""The command line: `pcache`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pcache_core.errors import OptionError
from pcache_core.params import DEFAULT_MODEL
from pcache_core.picture import shown
from pcache_integrations.cli_bench import bench
from pcache_integrations.cli_encode import encode
from pcache_integrations.cli_errors import EXIT_STATUSES, INTERRUPTED, USER_ERROR, explain
from pcache_integrations.cli_schema import schema
from pcache_integrations.cli_store import app as store_app
from pcache_integrations.vllm.serve import serve

if TYPE_CHECKING:
    from pcache_core import CausalLM
    from pcache_core.evaluation.data import QuestionSet

TOY = "builtin:tiny-rag"
_QUESTIONS = 400  # one question is a quarter of a point
_DOCUMENTS = 12  # of the corpus, in a prompt: about 1,150 tokens
_WIDTH_OF_A_FILE = 120  # columns of output that is not a terminal

app: typer.Typer = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt Cache: reuse of attention states of prompt parts, for LangChain and LlamaIndex.",
    epilog=EXIT_STATUSES,
)
app.command(epilog="Example: pcache encode handbook/ faq.jsonl --store ./states")(encode)
app.add_typer(store_app)
app.command(epilog="Example: pcache schema prompt.j2 --len question=32")(schema)
app.command(epilog="Example: pcache bench --model builtin:smollm2 --cached 1k,4k")(bench)
app.command(
    epilog="Example: pcache serve --model Qwen/Qwen2.5-0.5B-Instruct --store ./states --run",
)(serve)


@app.command(epilog="Example: pcache demo --model Qwen/Qwen2.5-0.5B-Instruct --top-k 6")
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A built-in model, a directory, a hub id, a .gguf file or ollama:NAME.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="A folder of .txt files and questions.tsv.", show_default="the project's own"
        ),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many of the corpus's first.")] = 12,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Documents retrieved for a question.", show_default="12, tiny model: 8"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask questions over a small corpus through LangChain and LlamaIndex, reuse off and on.

    Without the default model it runs the tiny one. Interrupted by ctrl-C, it sums up what there
    is.
    """
    from pcache_integrations.demo.corpus import Corpus, shipped
    from pcache_integrations.demo.run import run_demo

    console = Console(quiet=as_json, highlight=False)
    lm = _demo_model(model)
    is_toy = lm.name == TOY
    documents = Corpus(corpus or shipped("corpus_toy" if is_toy else "corpus"))
    chosen = documents.questions[:questions]
    found = top_k or (8 if is_toy else _DOCUMENTS)
    done = run_demo(lm, documents, chosen, top_k=found, console=console)
    if as_json:
        asked = [each.as_json() for each in done.asked]
        encoded_s = {name: report.seconds for name, report in done.encoded.items()}
        figures = {"model": lm.name, "encoded_s": encoded_s, "interrupted": done.interrupted}
        print(json.dumps({**figures, "questions": asked}))
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)


def _demo_model(name: str | None) -> CausalLM:
    """The model that was named; else the default one, or, where that isn't to be had, the tiny one.

    Raises: ModelError: the one that was named can't be loaded.
    """
    from pcache_core import CausalLM
    from pcache_core.errors import ModelError

    if name is not None:
        return CausalLM.from_pretrained(name)
    try:
        return CausalLM.from_pretrained(DEFAULT_MODEL)
    except ModelError as error:
        stderr = Console(stderr=True)
        stderr.print(shown(explain(error) or ""), markup=False, highlight=False)
        stderr.print(f"The demo goes on with {TOY}, which needs no download.\n", style="bold")
        return CausalLM.from_pretrained(TOY)


@app.command("eval", epilog="Example: pcache eval --documents 12 --modes fast,balanced --warm")
def evaluate(  # noqa: PLR0913 (each is an option of the command)
    model: Annotated[
        str | None,
        typer.Option(
            help="A built-in model, a directory, a hub id, a .gguf file or ollama:NAME.",
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
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1 …")] = "auto",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the reuse modes on one question set: accuracy, agreement with off, speed.

    Interrupted by ctrl-C, it prints what the questions until then gave.
    """
    from pcache_core import CausalLM
    from pcache_core.evaluation.curve import check_plot, plot, sweep
    from pcache_core.evaluation.evaluate import evaluate as ask
    from pcache_core.params import REUSE_MODES, check_reuse
    from pcache_core.store.packing import check_storage_dtype

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
    result = ask(
        CausalLM.from_pretrained(model, dtype=dtype, device=device),
        asked,
        modes=chosen,
        sweep=() if curve is None else sweep(),
        layout=None if chat is None else "chat" if chat else "completion",
        max_tokens=max_tokens,
        storage_dtype=storage,
        warm=warm,
    )
    if as_json:
        print(json.dumps(result.as_json(show), indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
        if show:
            console.print(result.transcript(show))
        console.print(result)
    if curve is not None:
        plot(result, curve)
    if result.unasked:
        raise typer.Exit(INTERRUPTED)


def _questions(
    model: str, data: Path | None, world: dict[str, Any], count: int | None
) -> QuestionSet:
    """Those of a file, of the corpus, or of the tiny world with the options given for it."""
    from pcache_core.evaluation.data import WorldOptions, tiny_world
    from pcache_core.evaluation.files import read_questions
    from pcache_integrations.demo.corpus import Corpus, shipped

    if data is None:
        if model == TOY or world.keys() - {"documents"}:
            return tiny_world(WorldOptions(**world), _QUESTIONS if count is None else count)
        return Corpus(shipped("corpus")).question_set(world.get("documents", _DOCUMENTS), count)
    if world:
        options = ", ".join(f"--{name}" for name in world)
        raise OptionError(
            f"--data asks what {data} holds, but {options} is for questions without --data; "
            "leave out one or the other"
        )
    return read_questions(data, count)


def main() -> None:
    """Run a command; what went wrong is a sentence on standard error, and an exit status."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        Console(stderr=True).print("[red]error:[/] ", end="")
        print(shown(message), file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
