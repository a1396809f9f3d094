"""The texts that trees are read from: given, or in files; every error can show its place."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pcache_core.errors import PMLError

_SHOWN_LINE = 160
_SHOWN_NAME = 60
_LISTED_NAMES = 8
_COMPARED_NAMES = 1000
_ENCODING = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""")
_UTF8_NAMES = ("utf-8", "utf8", "us-ascii", "ascii")


@dataclass(frozen=True, slots=True)
class Source:
    """A text in PML. name: the file's, or what stands for it in messages."""

    name: str
    text: str

    def error(self, message: str, line: int | None = None) -> PMLError:
        """Return the error to raise about a line, counted from 1."""
        if line is None:
            return PMLError(message, file=self.name)
        lines = self.text.split("\n")
        shown = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        return PMLError(
            message, file=self.name, line=line, source_line=shortened(shown, _SHOWN_LINE) or None
        )


def error_at(source: Source | None, line: int | None, message: str) -> PMLError:
    """As `Source.error`, for trees that may have been built without a text."""
    return PMLError(message) if source is None else source.error(message, line)


def read_source(text: str | bytes, file: str | None, max_bytes: int) -> Source:
    """Return the text of a file, with the line ends of XML.

    text: `str`, or bytes in UTF-8, or in UTF-16 with a byte order mark.
    Raises: PMLError: neither, larger than the limit, another encoding, half a surrogate pair.
    """
    name = "<string>" if file is None else str(file)
    if not isinstance(text, str | bytes):
        raise PMLError(f"PML is str or bytes, got {type(text).__name__}", file=name)
    if len(text) > max_bytes:
        raise PMLError(
            f"{name} holds {len(text):,} bytes, the limit is {max_bytes:,}; "
            "split it, or raise Limits(max_bytes=...)",
            file=name,
        )
    decoded = text if isinstance(text, str) else _decoded(text, name)
    decoded = decoded.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    source = Source(name, decoded)
    try:
        size = len(decoded.encode())
    except UnicodeEncodeError as error:
        line = decoded.count("\n", 0, error.start) + 1
        raise source.error(
            "half a surrogate pair; decode the text's source with errors='replace'", line
        ) from None
    if size > max_bytes:
        raise source.error(
            f"{size:,} bytes in UTF-8, the limit is {max_bytes:,}; "
            "split it, or raise Limits(max_bytes=...)"
        )
    return source


def _decoded(data: bytes, name: str) -> str:
    encoding = "utf-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif declared := _ENCODING.match(data.removeprefix(b"\xef\xbb\xbf")):
        asked = declared[1].decode("ascii")
        if asked.lower() not in _UTF8_NAMES:
            raise Source(name, "").error(
                f"the encoding is declared as {asked!r}; PML is read as UTF-8, so save it as "
                "that, or decode it and give str",
                1,
            )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Source(name, "").error(
            f"byte {error.start} is not {encoding.upper()} ({error.reason}); save it as UTF-8",
            line,
        ) from None


def shortened(text: str, limit: int = _SHOWN_NAME) -> str:
    """Return the text, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def quoted(name: str) -> str:
    """Return a name as it is shown in messages."""
    return repr(shortened(name))


def hint(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown name: the nearest known one, else the first of all."""
    names = [other for other in known if len(other) <= _SHOWN_NAME]
    if len(name) <= _SHOWN_NAME:
        near = difflib.get_close_matches(name, names[:_COMPARED_NAMES], n=1)
        if near:
            return f"did you mean {near[0]!r}?"
    if not names:
        return "there are none"
    more = ", …" if len(names) > _LISTED_NAMES else ""
    return f"expected one of: {', '.join(names[:_LISTED_NAMES])}{more}"


class SourceFolder:
    """Reads text files below a folder, together up to a number of bytes.

    Raises: PMLError: the folder is none.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        try:
            self._root = Path(folder).resolve(strict=True)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise PMLError(f"src_root={quoted(str(folder))} can't be read: {error}") from None
        if not self._root.is_dir():
            raise PMLError(f"src_root={quoted(str(folder))} is not a folder")
        self._max_bytes = self._left = max_bytes

    def read(self, name: str) -> str:
        """Return the text of a file, with the line ends of XML.

        Raises: PMLError: without a place: the caller knows the line. The file is not there, is
            outside of the folder, is not a regular file, is not UTF-8 or is over the limit.
        """
        data = self._bytes(self._inside(name))
        if len(data) > self._left:
            raise PMLError(
                f"src={quoted(name)} is over the limit of {self._max_bytes:,} bytes for a schema "
                "and its files; raise Limits(max_bytes=...)"
            )
        self._left -= len(data)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PMLError(
                f"src={quoted(name)}: byte {error.start} is not UTF-8; save the file as UTF-8"
            ) from None
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _inside(self, name: str) -> Path:
        if not name or "\0" in name or Path(name).is_absolute():
            raise PMLError(f"src={quoted(name)} is no path below the schema's root folder")
        try:
            path = (self._root / name).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "a loop of links"
            raise PMLError(f"src={quoted(name)} can't be read: {reason}") from None
        if not path.is_relative_to(self._root):
            raise PMLError(
                f"src={quoted(name)} leads out of the root folder; move the file into it"
            )
        return path

    def _bytes(self, path: Path) -> bytes:
        """Up to one byte more than is left; never waits for a pipe or device."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        shown = f"src: {quoted(path.name)}"
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            raise PMLError(f"{shown} can't be read: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PMLError(f"{shown} is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(self._left + 1)
        except OSError as error:
            raise PMLError(f"{shown} can't be read: {error.strerror}") from None
        finally:
            os.close(descriptor)
