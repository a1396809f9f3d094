"""`pcache encode`: documents' states into a store, before any question needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcache_core import Preamble, Segment
from pcache_core.errors import OptionError
from pcache_core.params import DEFAULT_MODEL
from pcache_core.picture import shown
from pcache_integrations._engines import load_lm
from pcache_integrations._stores import lasting_store
from pcache_integrations.cli.errors import INTERRUPTED, NOT_ALL_DONE
from pcache_integrations.cli.options import (
    MODEL_HELP,
    AsJson,
    Device,
    Dtype,
    PreambleFile,
    TrustRemoteCode,
)
from pcache_integrations.cli.texts import SourceText, other_files, read_texts

if TYPE_CHECKING:
    from pcache_core import PromptCacheEngine

_NAMED = 5  # of what is left out, in a warning
_LISTED = 20  # of what could not be read


def encode(  # noqa: PLR0913 (each is an option of the command)
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Text files, folders of them (.txt, .md, .jsonl, .ndjson), or .jsonl files with a "
            "text a line: a JSON string, or an object with 'text', 'page_content' or 'content'. "
            "Of HTML, CSV or PDF, take the text out first, as your framework's reader does.",
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
        typer.Option(help=MODEL_HELP),
    ] = DEFAULT_MODEL,
    preamble: PreambleFile = None,
    separator: Annotated[
        str,
        typer.Option(
            help="What stands after each document in prompts, encoded together with it: for a "
            "server of `pcache serve`, which needs it, $'\\n\\n'."
        ),
    ] = "",
    field: Annotated[
        str | None, typer.Option(help="Where objects in .jsonl files have the text.")
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="States are found in their own namespace only.")
    ] = "default",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    storage_dtype: Annotated[
        str,
        typer.Option(help="Keep numbers as auto, float32, bfloat16, float16 or int8."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Precompute the attention states of documents into a store.

    A language model with the same model, store, namespace and preamble then finds them.
    What the store has already is not computed again: an interrupted run goes on. What can't be read
    is listed at the end; the exit status is 1 then.
    """
    from pcache_core import PromptCacheEngine

    chosen = None if preamble is None else Preamble.of_file(preamble)
    texts, troubles = read_texts(sources, field)
    texts = [replace(each, text=each.text + separator) for each in texts]
    _tell_of_others(other_files(sources))
    lasting = lasting_store(store, storage_dtype)
    lasting.check()
    lm = load_lm(model, dtype, device, trust_remote_code=trust_remote_code)
    engine = PromptCacheEngine(lm, store=lasting, namespace=namespace, preamble=chosen)
    fitting, left_out = _sort_out(engine, texts)
    try:
        report = engine.encode([each.text for each in fitting])
    except KeyboardInterrupt:
        print(
            f"interrupted; what was encoded is in {shown(store)}, "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        figures = asdict(report) | {"tokens_per_second": report.tokens_per_second}
        unread = [str(trouble) for trouble in troubles]
        print(
            json.dumps(
                {"model": model, "store": store, **figures, "left_out": left_out, "unread": unread}
            )
        )
    else:
        print(shown(str(report)))
    _tell_of_unread(troubles)
    if troubles or left_out or report.reason is not None or report.kept != report.encoded:
        raise typer.Exit(NOT_ALL_DONE)


def _tell_of_others(files: Sequence[Path]) -> None:
    if files:
        endings = sorted({file.suffix or file.name for file in files})
        several = "s of other kinds are" if len(files) > 1 else " of another kind is"
        print(
            f"warning: {len(files)} file{several} left out ({shown(_few(endings))}); name them one "
            "by one if they are text",
            file=sys.stderr,
        )


def _tell_of_unread(troubles: Sequence[OptionError]) -> None:
    for trouble in troubles[:_LISTED]:
        print(f"not read: {shown(str(trouble))}", file=sys.stderr)
    if troubles[_LISTED:]:
        print(f"and {len(troubles) - _LISTED} more; --json lists all", file=sys.stderr)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _sort_out(
    engine: PromptCacheEngine, texts: Sequence[SourceText]
) -> tuple[list[SourceText], list[str]]:
    """Return texts that can have a state, and where the longer ones stand; warn of those.

    One long text among thousands is no reason to encode none of the others.
    """
    lm, budget_bytes = engine.lm, engine.stats().budget_bytes
    most = sys.maxsize if budget_bytes is None else budget_bytes // max(1, lm.bytes_per_token)
    context = lm.context_length or sys.maxsize
    fitting: list[SourceText] = []
    left_out: list[SourceText] = []
    for each in texts:
        count = len(lm.text.ids(Segment(each.text, "document")))
        fits = count <= min(most, context - len(engine.preamble_for(each.text)))
        (fitting if fits else left_out).append(each)
    places = [each.place for each in left_out]
    if places:
        print(
            "warning: left out, as too long for the store or, after a preamble, for the model "
            f"({context:,} tokens): {shown(_few(places))}; "
            "split them into shorter documents",
            file=sys.stderr,
        )
    return fitting, places
