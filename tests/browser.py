"""Pages as a real browser shows them."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs the program chromium (Debian: apt-get install chromium)"
)
_ALWAYS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--force-device-scale-factor=1",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def screenshot(page: Path, *, width: int, height: int) -> Image.Image:
    """The upper left of a page, RGB."""
    file = page.with_suffix(".png")
    _run(page, f"--screenshot={file}", f"--window-size={width},{height}", "--hide-scrollbars")
    return Image.open(io.BytesIO(file.read_bytes())).convert("RGB")


def dom_after_scripts(page: Path) -> str:
    """The page's markup as the browser understood it, after its scripts ran."""
    return _run(page, "--dump-dom", "--window-size=1000,1000")


def _run(page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *_ALWAYS, profile, *options, page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout
