"""Texts for `pcache encode`: from text files, folders of them, and JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcache_core.errors import OptionError

_PLAIN = (".txt", ".md")
_LINES = (".jsonl", ".ndjson")
_LINE_END = re.compile(r"\r\n?")
_HALF = re.compile("[\ud800-\udfff]")
_FIELDS = ("text", "page_content", "content")


@dataclass(frozen=True, slots=True)
class SourceText:
    """A text without outer whitespace, and where it stands: a file, or a file and a line."""

    text: str
    place: str


def read_texts(sources: Sequence[Path], field: str | None = None) -> list[SourceText]:
    """Read every text of the files and folders, in their order; empty ones are left out.

    A folder gives its `.txt`, `.md`, `.jsonl` and `.ndjson` files, those of its folders included
    and hidden ones not. `.jsonl` and `.ndjson` files hold a JSON string a line, or an object with
    the text in `field`: in `text`, `page_content` or `content` if no field is named. Any other file
    but `.json` is one text, with its byte order mark if it has one. Where it has line ends of
    Windows, the text with plain ones follows: LlamaIndex's reader keeps them, LangChain's does not.

    Raises: OptionError: a file can't be read or is not UTF-8, a line is not JSON or has no text,
        a text holds half a character, or there is no text at all; the message says where.
    """
    texts = [
        SourceText(text.strip(), place)
        for source in sources
        for file in _files(source)
        for text, place in _texts_of(file, field)
    ]
    found = [each for each in texts if each.text]
    for each in found:
        if _HALF.search(each.text):
            raise OptionError(
                f"{each.place}: the text holds half of a surrogate pair; write the whole "
                "character, or leave it out"
            )
    if not found:
        names = ", ".join(map(str, sources))
        raise OptionError(f"{names}: no text in there; nothing to encode")
    return found


def other_files(sources: Sequence[Path]) -> list[Path]:
    """Return the files in folders that `read_texts` leaves out for their endings."""
    folders = [source for source in sources if source.is_dir()]
    return [path for folder in folders for path in _visible(folder) if not _holds_texts(path)]


def _visible(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _holds_texts(path: Path) -> bool:
    return path.suffix.lower() in (*_PLAIN, *_LINES)


def _files(source: Path) -> Sequence[Path]:
    if not source.is_dir():
        return [source]
    files = [path for path in _visible(source) if _holds_texts(path)]
    if not files:
        raise OptionError(
            f"the folder {str(source)!r} holds no file of texts ({', '.join((*_PLAIN, *_LINES))}); "
            "name files of other endings one by one"
        )
    return files


def _texts_of(file: Path, field: str | None) -> Iterator[tuple[str, str]]:
    if file.suffix.lower() == ".json":
        raise OptionError(
            f"{file}: texts are read from JSON lines; write one a line, into a .jsonl"
        )
    content = _read(file)
    if file.suffix.lower() not in _LINES:
        for text in dict.fromkeys((content, _LINE_END.sub("\n", content))):
            yield text, str(file)
        return
    for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            place = f"{file}:{number}"
            yield _text_of(_parse(line, place), field, place), place


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{file} is not UTF-8 text (byte {error.start:,}); save it as UTF-8, or take the text "
            "out of it first if it is a document of another kind"
        ) from None
    except OSError as error:
        raise OptionError(f"{file} can't be read: {error.strerror or error}") from None


def _parse(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"{place} is not JSON ({error}); expected a JSON string or object a line"
        ) from None


def _text_of(record: object, field: str | None, place: str) -> str:
    if isinstance(record, str):
        return record
    names = _FIELDS if field is None else (field,)
    if isinstance(record, dict):
        for name in names:
            if isinstance(record.get(name), str):
                return str(record[name])
    wanted = " or ".join(map(repr, names))
    got = f"the fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
    raise OptionError(
        f"{place}: expected a string, or an object with a text in {wanted}, got {got}; "
        "--field names another"
    )
