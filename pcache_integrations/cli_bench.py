"""The command `pcache bench`: speed, beside its limits and beside other libraries."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pcache_core.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pcache_integrations.bench.figures import Benchmark
    from pcache_integrations.bench.models import ModelSource
    from pcache_integrations.bench.options import BenchOptions

_DEFAULT_MODEL = "llama-115m"
_WIDTH_OF_A_FILE = 140  # columns of output that is not a terminal


def bench(  # noqa: PLR0913 (each is an option of the command)
    model: Annotated[
        str | None, typer.Option(help="A built-in model, a directory or a hub id.")
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            help="A random model instead: llama-tiny, llama-115m, llama-0.5b, llama-1b, llama-7b.",
            show_default="llama-115m",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (a model's own; bfloat16 of a random one), float32, float16, bfloat16."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1 …")] = "auto",
    cached: Annotated[
        str, typer.Option(help="Tokens of all documents, by commas; k is 1024.")
    ] = "1k,2k,4k",
    documents: Annotated[int, typer.Option(min=2, help="Documents in a prompt.")] = 8,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = 32,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    modes: Annotated[
        str, typer.Option(help="Reuse modes beside off, by commas.")
    ] = "exact,fast,balanced",
    order: Annotated[
        str, typer.Option(help="Documents that come again in the same order, a new one, or both.")
    ] = "same,new",
    tier: Annotated[
        str, typer.Option(help="Where states are: memory, disk, or redis://host:port.")
    ] = "memory",
    batch: Annotated[int, typer.Option(min=0, help="Requests at once; 0 leaves them out.")] = 0,
    store_states: Annotated[
        int, typer.Option(min=0, help="Also measure fast with this many other states in the store.")
    ] = 0,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=PYTHON]",
            help="Only this library, here or in another interpreter: transformers, langchain, "
            "llama-cpp, vllm. May be repeated.",
            show_default="all that are installed",
        ),
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Measure no other library.")] = False,
    gguf: Annotated[
        Path | None, typer.Option(help="The model as a GGUF file, where it is no plain Llama.")
    ] = None,
    gguf_type: Annotated[
        str, typer.Option(help="Weights of the GGUF file that is written: q8_0, f16, bf16, f32.")
    ] = "q8_0",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of every library.", show_default="torch's own")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Everything is timed this often.")] = 5,
    seed: Annotated[int, typer.Option(help="Draws weights, texts and orders.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Plot into this .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time the reuse modes against a bare forward, and against other libraries.

    All answer the same prompts in turn, round by round, one process computing at a time.
    """
    from pcache_integrations.bench.gguf_file import check_gguf_type
    from pcache_integrations.bench.options import (
        BenchOptions,
        parse_modes,
        parse_orders,
        parse_sizes,
    )
    from pcache_integrations.bench.peers import chosen_peers
    from pcache_integrations.bench.plot import check_plot

    if peer and no_peers:
        raise OptionError("--peer names a library and --no-peers leaves all out; give one of them")
    options = BenchOptions(
        sizes=parse_sizes(cached),
        documents=documents,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        modes=parse_modes(modes),
        orders=parse_orders(order),
        tier=tier,
        batch=batch,
        rounds=rounds,
        seed=seed,
        store_states=store_states,
        gguf_type=check_gguf_type(gguf_type),
        gguf_file=gguf,
    )
    if plot is not None:
        check_plot(plot)
    source = _source(model, random, dtype, device)
    interpreters = {} if no_peers else chosen_peers(peer or ())
    result = _measure(source, options, interpreters, threads)
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        _print(result)
    if plot is not None:
        _draw(result, plot)


def _source(model: str | None, random: str | None, dtype: str, device: str) -> ModelSource:
    from pcache_integrations.bench.models import RandomModel, SavedModel

    if model is None:
        return RandomModel(random or _DEFAULT_MODEL, dtype, device)
    if random is not None:
        raise OptionError("--model and --random name two models; leave out one of them")
    return SavedModel(model, dtype, device)


def _measure(
    source: ModelSource,
    options: BenchOptions,
    interpreters: Mapping[str, str],
    threads: int | None,
) -> Benchmark:
    """Peers are started first: which are there decides how much memory is needed."""
    import torch

    from pcache_integrations.bench.run import benchmark, started

    if threads is not None:
        torch.set_num_threads(threads)
    with started(interpreters) as peers:
        running = sum(peer.problem is None for peer in peers)
        lm = source.load(options, running)
        return benchmark(lm, options, peers, threads=torch.get_num_threads())


def _print(result: Benchmark) -> None:
    from pcache_integrations.bench.table import Report

    Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE).print(Report(result))


def _draw(result: Benchmark, file: Path) -> None:
    from pcache_integrations.bench.plot import plot

    plot(result, file)
