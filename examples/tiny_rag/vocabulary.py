"""The tokenizer of `builtin:tiny-rag`: byte-level BPE in which every word of the world is a token.

`ignore_merges` makes a piece that is in the vocabulary one token; any other text falls back to
merges and bytes, so everything round-trips. Names that can open a line have a second token without
the leading space (`aliases`), which shares the embedding of the first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from layouts import ALL
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pcache_core.evaluation.world import attributes, names
from pcache_core.evaluation.world.questions import ABSENT

SPECIAL = ["<pad>", "<bos>", "<eos>"]
_PIECE = r"\n|'[a-z]+| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"
_ASCII_PIECE = re.compile(r"\n|'[a-z]+| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s")
_MERGED_VOCABULARY = 700
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)
_GROUPS = {
    "first": names.FIRST_NAMES,
    "surname": names.SURNAMES,
    "company": names.COMPANIES,
    "city": names.CITIES,
    "river": names.RIVERS,
    "job": names.JOBS,
    "hobby": names.HOBBIES,
    "product": names.PRODUCTS,
}
_OPENS_LINES = ("first", "company", "city")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer, and what training needs to know of it.

    ids: piece to token. groups: kind of name to the tokens of its members. aliases: token without
    leading space to the one with it.
    """

    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, int]
    groups: dict[str, list[int]]
    aliases: dict[int, int]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text of the world, names at a line's start by their common token."""
        return [self.ids[piece] for piece in _ASCII_PIECE.findall(text)]


def build() -> Vocabulary:
    """Make the tokenizer; the same one each time."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MERGED_VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    base.train_from_iterator(_texts(), trainer)
    bos = SPECIAL.index("<bos>")
    base.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    description = json.loads(base.to_str())
    words = description["model"]["vocab"]
    description["model"]["ignore_merges"] = True
    for piece in _pieces():
        words.setdefault(_as_bytes(piece), len(words))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = _CHAT_TEMPLATE
    return _vocabulary(tokenizer, words)


def _vocabulary(tokenizer: PreTrainedTokenizerFast, words: dict[str, int]) -> Vocabulary:
    ids = {word.replace("Ġ", " ").replace("Ċ", "\n"): number for word, number in words.items()}
    groups = {kind: [ids[f" {name}"] for name in members] for kind, members in _GROUPS.items()}
    opening = [name for kind in _OPENS_LINES for name in _GROUPS[kind]]
    aliases = {ids[name]: ids[f" {name}"] for name in opening}
    ids.update({name: ids[f" {name}"] for name in opening})
    return Vocabulary(tokenizer, ids, groups, aliases)


def _as_bytes(piece: str) -> str:
    return piece.replace(" ", "Ġ").replace("\n", "Ċ")


def _texts() -> list[str]:
    """Everything that is written around the names."""
    texts = [*names.ASIDES, *names.LEADS, ABSENT, "She also", "He also", "It"]
    texts += ["The company also", "The city also"]
    for attribute in attributes.ATTRIBUTES.values():
        texts += [*attribute.statements, *attribute.questions]
    texts += [question for hop in attributes.HOPS for question in hop.questions]
    texts = [re.sub(r"\{[sSv]\}", "X", text) for text in texts]
    return texts + [f"{layout.opening}{layout.closing}".replace("{q}", "X") for layout in ALL]


def _pieces() -> list[str]:
    """Every piece that shall be one token, in a fixed order."""
    pieces = [piece for text in _texts() for piece in _ASCII_PIECE.findall(text)]
    pieces += [f" {piece}" for piece in pieces if piece.isalpha()]
    pieces += ["\n", " ", "'s", "-", ".", "?", ":", ","]
    pieces += [f"{space}{n}" for space in (" ", "") for n in range(10)]
    pieces += [f"{space}{n:02d}" for space in (" ", "") for n in range(100)]
    pieces += [f" {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    pieces += [f" {name}" for members in _GROUPS.values() for name in members]
    pieces += [name for kind in _OPENS_LINES for name in _GROUPS[kind]]
    return list(dict.fromkeys(pieces))
