"""The language reference says what is so: its examples are read as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pcache_core.pml

README = (Path(pcache_core.pml.__file__).parent / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```(xml|text)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
XML = [text for kind, text in EXAMPLES if kind == "xml"]
