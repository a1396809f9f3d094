"""Texts for `pcache encode`: from text files, folders of them, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcache_core.errors import OptionError

_PLAIN = (".txt", ".md")
_LINES = (".jsonl", ".ndjson")
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
    but `.json` is one text.

    Raises: OptionError: a file can't be read or is not UTF-8, a line is not JSON or has no text,
        or there is no text at all; the message says where.
    """
    texts = [
        SourceText(text.strip(), place)
        for source in sources
        for file in _files(source)
        for text, place in _texts_of(file, field)
    ]
    found = [each for each in texts if each.text]
    if not found:
        names = ", ".join(map(str, sources))
        raise OptionError(f"{names}: no text in there; nothing to encode")
    return found


def _files(source: Path) -> Sequence[Path]:
    if not source.is_dir():
        return [source]
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in (*_PLAIN, *_LINES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
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
        yield content, str(file)
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            place = f"{file}:{number}"
            yield _text_of(_parse(line, place), field, place), place


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
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
