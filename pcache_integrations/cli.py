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
from pcache_integrations.cli_bench import bench
from pcache_integrations.cli_encode import encode
from pcache_integrations.cli_errors import EXIT_STATUSES, INTERRUPTED, USER_ERROR, explain
from pcache_integrations.cli_schema import schema
from pcache_integrations.cli_serve import serve
from pcache_integrations.cli_store import app as store_app

if TYPE_CHECKING:
    from pcache_core.evaluation.data import QuestionSet

_QUESTIONS = 400  # one question is a quarter of a point
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
app.command(epilog="Example: pcache bench --random llama-0.5b --cached 1k,4k --plot bench.svg")(
    bench
)
app.command(
    epilog="Example: pcache serve --model Qwen/Qwen2.5-0.5B-Instruct --store ./states --run",
)(serve)


@app.command(epilog="Example: pcache demo --model Qwen/Qwen2.5-0.5B-Instruct --top-k 6")
def demo(
    model: Annotated[
        str,
        typer.Option(help="A built-in model, a directory, a hub id, a .gguf file or ollama:NAME."),
    ] = DEFAULT_MODEL,
    corpus: Annotated[
        Path | None, typer.Option(help="A folder of .txt files and questions.tsv.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Documents retrieved for a question.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask questions over a small corpus through LangChain and LlamaIndex, reuse off and on."""
    from pcache_core import CausalLM
    from pcache_integrations.demo.corpus import Corpus, default_folder
    from pcache_integrations.demo.run import run_demo

    documents = Corpus(corpus or default_folder())
    lm = CausalLM.from_pretrained(model)
    asked = run_demo(lm, documents, top_k=top_k, console=Console(quiet=as_json))
    if as_json:
        print(json.dumps({"model": model, "questions": [each.as_json() for each in asked]}))


@app.command("eval", epilog="Example: pcache eval --documents 8 --split --modes fast,balanced")
def evaluate(  # noqa: PLR0913 (each is an option of the command)
    model: Annotated[
        str,
        typer.Option(help="A built-in model, a directory, a hub id, a .gguf file or ollama:NAME."),
    ] = DEFAULT_MODEL,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Questions as JSON or JSON lines: question, contexts, answers; or in the shape "
            "of LongBench, MuSiQue, HotpotQA or 2WikiMQA. Without it, the tiny world is asked."
        ),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="Tiny world: documents of a question.", show_default="8")
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
        typer.Option(min=1, help="How many.", show_default="400 of the tiny world, all of a file"),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="Reuse modes to compare with off, by commas.", show_default="all"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the model's own chat template.")
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
        typer.Option(help="Also sweep the repaired share, and plot it into this .svg or .png."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the reuse modes on one question set: accuracy, agreement with off, speed."""
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
    asked = _questions(data, given, questions)
    result = ask(
        CausalLM.from_pretrained(model, dtype=dtype, device=device),
        asked,
        modes=chosen,
        sweep=() if curve is None else sweep(),
        layout="chat" if chat else "completion",
        max_tokens=max_tokens,
        storage_dtype=storage,
    )
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE).print(result)
    if curve is not None:
        plot(result, curve)


def _questions(data: Path | None, world: dict[str, Any], count: int | None) -> QuestionSet:
    """Those of a file, or of the tiny world with the options that were given for it."""
    from pcache_core.evaluation.data import WorldOptions, tiny_world
    from pcache_core.evaluation.files import read_questions

    if data is None:
        return tiny_world(WorldOptions(**world), _QUESTIONS if count is None else count)
    if world:
        options = ", ".join(f"--{name}" for name in world)
        raise OptionError(
            f"--data asks what {data} holds, but {options} is for questions of the tiny world; "
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
        print(message, file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
