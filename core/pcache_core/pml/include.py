"""Files named by `src=`: only below a root folder, symbolic links followed before the check."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pcache_core.errors import PMLError
from pcache_core.pml.source import quoted


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
