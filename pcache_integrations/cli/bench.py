"""The command `pcache bench`: how soon the first token comes, in every reuse mode."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pcache_core.errors import OptionError
from pcache_core.params import check_reuse
from pcache_integrations.cli.options import MODEL_HELP, AsJson, Device

if TYPE_CHECKING:
    from pcache_core.params import ReuseMode
    from pcache_integrations.bench.results import Order

_WIDTH_OF_A_FILE = 140  # columns of output that is not a terminal


def bench(  # noqa: PLR0913 (each is an option of the command)
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
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
    device: Device = "auto",
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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch.", show_default="torch's own")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Everything is timed this often.")] = 5,
    seed: Annotated[int, typer.Option(help="Draws weights, texts and orders.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Time the reuse modes against a bare forward of what no state can hold.

    All answer the same prompts in turn, round by round.
    """
    import torch

    from pcache_integrations.bench.measure import BenchOptions, measure
    from pcache_integrations.bench.models import load_model

    options = BenchOptions(
        sizes=parse_sizes(cached),
        documents=documents,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        modes=parse_modes(modes),
        orders=parse_orders(order),
        tier=tier,
        rounds=rounds,
        seed=seed,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    lm = load_model(
        model, random, dtype, device, context_tokens=options.context_tokens, seed=options.seed
    )
    result = measure(lm, options)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE).print(result)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read token counts by commas, `k` for 1024; ascending, each once. Raises: OptionError."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(k?)", part.strip().lower())
        if match is None:
            raise OptionError(
                f"--cached {text!r} is not a list of token counts; use one like 1k,5000"
            )
        found.add(int(match[1]) * (1024 if match[2] else 1))
    return tuple(sorted(found))


def parse_modes(text: str) -> tuple[ReuseMode, ...]:
    """Read reuse modes by commas, without `off`. Raises: OptionError."""
    modes = (check_reuse(part.strip()) for part in text.split(","))
    return tuple(dict.fromkeys(mode for mode in modes if mode != "off"))


def parse_orders(text: str) -> tuple[Order, ...]:
    """Read `same`, `new` or both, by commas. Raises: OptionError."""
    known: tuple[Order, ...] = ("same", "new")
    parts = {part.strip() for part in text.split(",")}
    if not parts <= set(known):
        raise OptionError(f"unknown --order {text!r}; use same, new or same,new")
    return tuple(order for order in known if order in parts)
