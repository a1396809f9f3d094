"""Draw the README's picture of a prompt, from the report of a request that really ran.

python examples/pictures/prompt.py     # writes docs/prompt-light.png and docs/prompt-dark.png

Needs chromium (Debian: apt-get install chromium) and Pillow.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageChops

from pcache_core import CausalLM, Prompt, PromptCacheEngine, Report, Segment
from pcache_integrations.demo.corpus import Corpus, shipped

DOCS = Path(__file__).parents[2] / "docs"
OPENING = "Answer the question from the documents.\n\n"
QUESTION = "\n\nQuestion: Where is the company that employs Bella Fortholt based?\nAnswer:"
KNOWN = ("zentron", "june-woltwell", "bella-fortholt")
NEW = "pixfirth"
# Page and text on GitHub.
THEMES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
WIDTH, HEIGHT, SCALE, COLOURS = 840, 900, 2, 96


def report() -> Report:
    """Three documents that were encoded before, one that is new, and a question."""
    torch.set_num_threads(1)  # quickest for a model this small
    texts = {document.name: document.text for document in Corpus(shipped("corpus_toy")).documents}
    # The default repairs more tokens, and would compute a prompt this short as a whole.
    engine = PromptCacheEngine(CausalLM.from_pretrained("builtin:tiny-rag"), repair=32)
    engine.encode([texts[name] for name in KNOWN], progress=False)

    def prompt(*names: str) -> Prompt:
        segments = [Segment(OPENING, "literal")]
        for name in names:
            segments += [Segment(texts[name], "document", name), Segment("\n\n", "literal")]
        return Prompt([*segments[:-1], Segment(QUESTION, "argument", "question")])

    engine.prefill(prompt(KNOWN[1]))  # pays for imports and memory
    return engine.prefill(prompt(*KNOWN[::-1], NEW)).report


def draw(html: str, background: str, text: str) -> Image.Image:
    """The picture as a browser shows it, without the empty page around it."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        style = f"margin:8px;background:{background};color:{text}"
        page.write_text(f'<!doctype html><meta charset="utf-8"><body style="{style}">{html}')
        options = (f"--screenshot={folder}/page.png", f"--window-size={WIDTH},{HEIGHT}")
        always = ("--headless", "--no-sandbox", "--hide-scrollbars")
        scale = f"--force-device-scale-factor={SCALE}"
        subprocess.run(["chromium", *always, *options, scale, page.as_uri()], check=True)
        image = Image.open(f"{folder}/page.png").convert("RGB")
    empty = Image.new("RGB", image.size, background)
    return image.crop(ImageChops.difference(image, empty).getbbox())


if __name__ == "__main__":
    # The quickest of a few: what else the machine was doing is not the picture's subject.
    drawn = min((report() for _ in range(5)), key=lambda each: each.ttft_ms)._repr_html_()
    for theme, (background, text) in THEMES.items():
        file = DOCS / f"prompt-{theme}.png"
        draw(drawn, background, text).quantize(COLOURS).save(file, optimize=True)
        print(file.name, f"{file.stat().st_size:,} bytes")
