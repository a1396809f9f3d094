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


def read_texts(
    sources: Sequence[Path], field: str | None = None
) -> tuple[list[SourceText], list[OptionError]]:
    """Read every text of the files and folders, in their order; empty ones are left out.

    A folder gives its `.txt`, `.md`, `.jsonl` and `.ndjson` files, those of its folders included
    and hidden ones not. `.jsonl` and `.ndjson` files hold a JSON string a line, or an object with
    the text in `field`: in `text`, `page_content` or `content` if no field is named. Any other file
    but `.json` is one text, with its byte order mark if it has one. Where it has line ends of
    Windows, the text with plain ones follows: LlamaIndex's reader keeps them, LangChain's does not.

    Returns: the texts; and what is wrong with the files and lines that gave none: a file that can't
        be read or is not UTF-8, a line that is not JSON or has no text, half a character.
    Raises: OptionError: there is no text at all; the message says what is wrong, and where.
    """
    texts: list[SourceText] = []
    troubles: list[OptionError] = []
    for source in sources:
        for each in _texts_in(source, field):
            if isinstance(each, OptionError):
                troubles.append(each)
            elif each.text:
                texts.append(each)
    if not texts:
        names = ", ".join(map(str, sources))
        raise next(iter(troubles), OptionError(f"{names}: no text in there; nothing to encode"))
    return texts, troubles


def _texts_in(source: Path, field: str | None) -> Iterator[SourceText | OptionError]:
    try:
        for file in _files(source):
            yield from _texts_of(file, field)
    except OptionError as error:
        yield error


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


def _texts_of(file: Path, field: str | None) -> Iterator[SourceText | OptionError]:
    """Yield a file's texts, and an error for itself or each of its lines that gives none."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        yield OptionError(
            f"{file}: texts are read from JSON lines; write one a line, into a .jsonl"
        )
        return
    try:
        content = _read(file)
    except OptionError as error:
        yield error
        return
    if suffix not in _LINES:
        for text in dict.fromkeys((content, _LINE_END.sub("\n", content))):
            yield SourceText(text.strip(), str(file))
        return
    for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield _text_of_line(line, f"{file}:{number}", field)


def _text_of_line(line: str, place: str, field: str | None) -> SourceText | OptionError:
    try:
        return SourceText(_text_of(_parse(line, place), field, place).strip(), place)
    except OptionError as error:
        return error


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
        return _whole(record, place)
    names = _FIELDS if field is None else (field,)
    if isinstance(record, dict):
        for name in names:
            if isinstance(record.get(name), str):
                return _whole(record[name], place)
    wanted = " or ".join(map(repr, names))
    got = f"the fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
    raise OptionError(
        f"{place}: expected a string, or an object with a text in {wanted}, got {got}; "
        "--field names another"
    )


def _whole(text: str, place: str) -> str:
    if _HALF.search(text):
        raise OptionError(
            f"{place}: the text holds half of a surrogate pair; write the whole character, or "
            "leave it out"
        )
    return text
