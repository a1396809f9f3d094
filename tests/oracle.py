"""What the logits must be: one cache-less forward of an unmodified model under an explicit mask.

A prompt is laid out as rows. A row is a token with a position and with the rows it may attend to:

- A `document` of at least `min_module_tokens` tokens is a module, unless it ends the prompt. Its
  tokens see the tokens before them in the module, and its preamble as if it stood directly in
  front: every module gets its own copy of the preamble's rows. The first module's preamble is the
  opening alone, that of the others has company.
- Every other token sees all rows before it in the prompt's order, but no preamble copy.
- A module's token that was repaired is there twice, at the same place: first as the `replaced`
  token, which later tokens of its module saw when they were encoded and nothing else sees, then as
  a computed one, which every computed token behind it sees instead.

Nothing here shares code with the engine, and no cache is involved: this is the specification.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pcache_core.prompt import Prompt

Role = Literal["computed", "module", "replaced", "copy"]


@dataclass(frozen=True)
class Row:
    """A token and what decides whom it sees.

    place: where the row stands in the prompt, a copy directly before its module; for windows.
    position: what the model is told; the place, but for copies of `encoded="in place"`.
    group: 0 for a computed token, the module's number for its tokens (those that were replaced
        included) and its preamble copy.
    """

    token_id: int
    place: int
    position: int
    role: Role
    group: int


Rows = tuple[Row, ...]


def lay_out(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    preamble: tuple[str, Sequence[str]] = ("", ()),
    encoded: Literal["anywhere", "in place"] = "anywhere",
    min_module_tokens: int = 8,
    repaired: Collection[int] = (),
) -> Rows:
    """The rows of a prompt.

    preamble: what its modules were encoded after: an opening, after BOS, and company.
    encoded: `anywhere`: directly after the preamble, then moved together with it. `in place`: at
        the module's final positions, the preamble from the first position on, as far as it fits.
    """
    bos = tokenizer("").input_ids
    pieces = _pieces(tokenizer, prompt)
    before_ids, later_ids = preamble_ids(tokenizer, *preamble)
    total = len(bos) + sum(len(ids) for _, ids in pieces)

    rows = _computed(bos, 0)
    at = len(bos)
    for group, (kind, ids) in enumerate(pieces, start=1):
        stop = at + len(ids)
        if kind == "document" and len(ids) >= min_module_tokens and stop < total:
            if encoded == "in place":
                before_ids = before_ids[:at]
            before = at - len(before_ids)
            first = before if encoded == "anywhere" else 0
            rows += [
                Row(token_id, before + i, first + i, "copy", group)
                for i, token_id in enumerate(before_ids)
            ]
            rows += _module(ids, at, group, repaired)
            before_ids = later_ids
        else:
            rows += _computed(ids, at)
        at = stop
    return moved_up(rows)


def preamble_ids(
    tokenizer: PreTrainedTokenizerBase, opening: str, company: Sequence[str]
) -> tuple[list[int], list[int]]:
    """What a prompt's first module is encoded after, and what the others are."""
    first = tokenizer("").input_ids + tokenizer(opening, add_special_tokens=False).input_ids
    texts = [part for text in company for part in (text, "\n\n")]
    return first, first + [
        token_id
        for text in texts
        for token_id in tokenizer(text, add_special_tokens=False).input_ids
    ]


def moved_up(rows: Sequence[Row]) -> Rows:
    """The rows, all moved by as much as brings copies before the prompt's start to position 0.

    Only distances matter to models whose states can be moved.
    """
    by = -min(0, *(row.position for row in rows))
    return tuple(dataclasses.replace(row, position=row.position + by) for row in rows)


def without_modules(rows: Rows) -> Rows:
    """The same prompt as one causal text."""
    return tuple(_computed(token_ids(rows), 0))


def token_ids(rows: Rows) -> list[int]:
    """The prompt's ids, BOS included."""
    return [row.token_id for row in rows if row.role in ("computed", "module")]


def followed_by(rows: Rows, token_id: int) -> Rows:
    """The rows with one generated token more."""
    last = rows[-1]
    return (*rows, Row(token_id, last.place + 1, last.position + 1, "computed", 0))


def computed_logits(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Logits of every computed token, [computed tokens, vocab], in the prompt's order."""
    logits = _forward(model, rows).logits[0]
    return logits[torch.tensor([row.role == "computed" for row in rows])]


def next_logits(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """Logits of the token after the last row, [vocab]."""
    return computed_logits(model, rows)[-1]


def asking(rows: Rows) -> tuple[dict[int, float], dict[int, float]]:
    """Weights of the places that ask the question that ends a prompt, and of those before them.

    The last twelve behind its modules ask, the first three there are what they are compared with.
    """
    last_module = max(row.place for row in rows if row.role == "module")
    behind = [row.place for row in rows if row.role == "computed" and row.place > last_module]
    reference, asked = behind[:3], behind[3:][-12:]
    return dict.fromkeys(asked, 1 / len(asked)), dict.fromkeys(reference, 1 / 3)


def attention_paid(
    model: PreTrainedModel, rows: Rows, weights: Mapping[int, float]
) -> dict[int, float]:
    """How much the computed tokens at some places attend to each place, added up over heads.

    By the model's own eager attention, in the third quarter of the layers that see all tokens, or
    of all if none of the upper half does.
    Places of rows that the last one may not see are left out.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = _forward(model, rows, output_attentions=True).attentions
    model.set_attn_implementation(before)
    kinds = getattr(model.config, "layer_types", None) or ["full"] * len(attentions)
    seeing = [layer for layer, kind in enumerate(kinds) if "sliding" not in kind]
    if not any(layer >= len(attentions) // 2 for layer in seeing):
        seeing = list(range(len(attentions)))
    first = len(seeing) // 2
    paid = torch.zeros(len(rows), dtype=torch.double)
    for layer in seeing[first : max(first + 1, 3 * len(seeing) // 4)]:
        heads = attentions[layer][0, :, :, : len(rows)].double().sum(0)
        for index, row in enumerate(rows):
            if row.role == "computed" and row.place in weights:
                paid += weights[row.place] * heads[index]
    seen = _visible(rows)[-1].tolist()
    return {row.place: float(paid[i]) for i, row in enumerate(rows) if seen[i]}


def stock_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits of the token after `ids` by the model's own masks and positions, [vocab]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def greedy(model: PreTrainedModel, rows: Rows, num_tokens: int, stop_id: int) -> list[int]:
    """Likeliest tokens one by one, all rows recomputed for each; `stop_id` ends and is left out."""
    generated: list[int] = []
    while len(generated) < num_tokens:
        token_id = int(next_logits(model, rows).argmax())
        if token_id == stop_id:
            break
        generated.append(token_id)
        rows = followed_by(rows, token_id)
    return generated


def _pieces(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[tuple[str, list[int]]]:
    """Kind and ids of each segment, tokenised alone."""
    return [
        (segment.kind, tokenizer(segment.text, add_special_tokens=False).input_ids)
        for segment in prompt.segments
    ]


def _forward(model: PreTrainedModel, rows: Rows, **options: Any) -> Any:
    """The model's output for all rows, [1, rows, …]."""
    positions = torch.tensor([row.position for row in rows])
    masks = _masks(model, _visible(rows), _distance(rows))
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = positions[None]
    ids = torch.tensor([[row.token_id for row in rows]])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for patch in _patches(model, rows):
            stack.enter_context(patch)
        return model(input_ids=ids, attention_mask=masks, use_cache=False, **options)


def _module(ids: list[int], start: int, group: int, repaired: Collection[int]) -> list[Row]:
    """A module's tokens; a repaired one is followed by what took its place."""
    rows = []
    for place, token_id in enumerate(ids, start):
        if place in repaired:
            rows.append(Row(token_id, place, place, "replaced", group))
            rows.append(Row(token_id, place, place, "computed", 0))
        else:
            rows.append(Row(token_id, place, place, "module", group))
    return rows


def _computed(ids: list[int], start: int) -> list[Row]:
    return [Row(t, start + i, start + i, "computed", 0) for i, t in enumerate(ids)]


def _visible(rows: Rows) -> torch.Tensor:
    """Who sees whom, [rows, rows] bool: row i attends to row j."""
    group = torch.tensor([row.group for row in rows])
    computed = torch.tensor([row.role == "computed" for row in rows])
    hidden = torch.tensor([row.role in ("copy", "replaced") for row in rows])
    before = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    same = group[:, None] == group[None, :]
    return before & torch.where(computed[:, None], ~hidden[None, :], same)


def _distance(rows: Rows) -> torch.Tensor:
    """How far back row j lies from row i, [rows, rows]."""
    place = torch.tensor([row.place for row in rows])
    return place[:, None] - place[None, :]


def _masks(
    model: PreTrainedModel, visible: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks [1, 1, rows, rows]: one per layer type, or one where there are no types."""
    config = model.config
    windows: dict[str, torch.Tensor] = {"full_attention": visible}
    if getattr(config, "sliding_window", None):
        windows["sliding_attention"] = visible & (distance < config.sliding_window)
    lowest = torch.finfo(model.dtype).min
    masks = {
        kind: torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, lowest)[None, None]
        for kind, seen in windows.items()
    }
    if getattr(config, "layer_types", None) is not None:
        return {kind: masks[kind] for kind in set(config.layer_types)}
    return masks.get("sliding_attention", masks["full_attention"])


def _patches(model: PreTrainedModel, rows: Rows) -> list[Any]:
    """What makes models obey the rows that derive masks or biases from column numbers.

    BLOOM and Falcon build ALiBi from a 2D mask and fail on any other, MPT counts columns: softmax
    ignores a constant, so slope times position is their bias. GPT-Neo windows by column.
    """
    kind = model.config.model_type
    if kind == "gpt_neo":
        near = _visible(rows) & (_distance(rows) < model.config.window_size)
        layers = [block.attn.attention for block in model.transformer.h]
        local = [layer for layer in layers if layer.attention_type == "local"]
        return [mock.patch.object(layer, "bias", near[None, None]) for layer in local]
    heads = model.config.num_attention_heads
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)  # if heads is a power of two
    bias = slopes[:, None, None] * torch.tensor([row.position for row in rows])  # [heads, 1, rows]
    if kind == "bloom":
        return [mock.patch.object(model.transformer, "build_alibi_tensor", return_value=bias)]
    if kind == "mpt":
        return [mock.patch.object(model.transformer, "build_mpt_alibi_tensor", return_value=bias)]
    if kind == "falcon" and model.config.alibi:
        return [mock.patch(f"{type(model).__module__}.build_alibi_tensor", return_value=bias)]
    return []
