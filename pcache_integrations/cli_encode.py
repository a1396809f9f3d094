"""`pcache encode`: documents' states into a store, before any question needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcache_core import PromptCacheEngine, Segment
from pcache_core.errors import OptionError
from pcache_core.params import DEFAULT_MODEL
from pcache_integrations._engines import lasting_store, load_lm
from pcache_integrations.cli_errors import INTERRUPTED, NOT_ALL_DONE
from pcache_integrations.cli_schema import template_of
from pcache_integrations.cli_texts import SourceText, read_texts
from pcache_templates import Text

if TYPE_CHECKING:
    from pcache_core import EncodeReport

_NAMED = 5  # of the texts left out, in the warning


def encode(  # noqa: PLR0913 (each is an option of the command)
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Text files, folders of them, or .jsonl files with a text a line: a JSON string, "
            "or an object with 'text', 'page_content' or 'content'.",
            show_default=False,
        ),
    ],
    store: Annotated[
        str,
        typer.Option(
            help="A folder, redis://host:port/database or an object store's URL: what the language "
            "model's store= will be.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="A built-in model, a directory, a hub id, a .gguf file or ollama:NAME."),
    ] = DEFAULT_MODEL,
    anchor: Annotated[
        str | None,
        typer.Option(
            help="The constant opening of the prompts, exactly, to encode behind it. Without it, "
            "the states fit every prompt."
        ),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help="A template file whose text before the first variable is that opening."),
    ] = None,
    separator: Annotated[
        str,
        typer.Option(
            help="What stands behind each document in prompts, encoded together with it: for a "
            "server of `pcache serve`, which needs it, $'\\n\\n'."
        ),
    ] = "",
    field: Annotated[
        str | None, typer.Option(help="Where objects in .jsonl files have the text.")
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="States are found in their own namespace only.")
    ] = "default",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1 …")] = "auto",
    storage_dtype: Annotated[
        str,
        typer.Option(help="Keep numbers as auto, float32, bfloat16, float16 or int8."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Precompute the attention states of documents into a store.

    A language model with the same model, store and namespace then finds them.
    What the store has already is not computed again: an interrupted run goes on.
    """
    opening = _opening(anchor, template)
    texts = [replace(each, text=each.text + separator) for each in read_texts(sources, field)]
    lasting = lasting_store(store, storage_dtype)
    lasting.check()
    engine = PromptCacheEngine(load_lm(model, dtype, device), store=lasting, namespace=namespace)
    fitting, left_out = _sort_out(engine, texts, opening)
    try:
        report = engine.encode([each.text for each in fitting], anchor=opening)
    except KeyboardInterrupt:
        print(
            f"interrupted; what was encoded is in {store}, the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        figures = asdict(report) | {"tokens_per_second": report.tokens_per_second}
        print(json.dumps({"model": model, "store": store, **figures, "left_out": left_out}))
    else:
        print(report)
    if left_out or not _is_all_done(report):
        raise typer.Exit(NOT_ALL_DONE)


def _opening(anchor: str | None, template: Path | None) -> str | None:
    """Raises: OptionError: both were given, or the template has no opening that is text alone."""
    if template is None:
        return anchor or None
    if anchor is not None:
        raise OptionError("--anchor and --template both give the opening; leave one of them out")
    texts = []
    for node in template_of(template).raw_nodes():
        if not isinstance(node, Text):
            break
        texts.append(node.text)
    if not texts:
        raise OptionError(
            f"{template} does not begin with text of its own, so no opening is known; leave "
            "--template out: what is encoded without an opening fits every prompt"
        )
    return "".join(texts)


def _sort_out(
    engine: PromptCacheEngine, texts: Sequence[SourceText], opening: str | None
) -> tuple[list[SourceText], list[str]]:
    """Texts that can have a state, and where those stand that are too long for one; warns of them.

    One long text among thousands is no reason to encode none of the others.
    """
    lm, budget_bytes = engine.lm, engine.stats().budget_bytes
    opening_ids = lm.text.ids(Segment(opening, "literal")) if opening else ()
    limits = [sys.maxsize]
    if lm.context_length is not None:
        limits.append(lm.context_length - len(lm.text.bos_ids) - len(opening_ids) - 1)
    if budget_bytes is not None and lm.bytes_per_token:
        limits.append(budget_bytes // lm.bytes_per_token)
    most = min(limits)
    fitting: list[SourceText] = []
    left_out: list[SourceText] = []
    for each in texts:
        fits = len(lm.text.ids(Segment(each.text, "document"))) <= most
        (fitting if fits else left_out).append(each)
    places = [each.place for each in left_out]
    if places:
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        print(
            f"warning: left out, as longer than {most:,} tokens: {', '.join(places[:_NAMED])}"
            f"{more}; split them into shorter documents",
            file=sys.stderr,
        )
    return fitting, places


def _is_all_done(report: EncodeReport) -> bool:
    return report.reason is None and report.kept == report.encoded
