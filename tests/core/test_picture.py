"""The picture of a prompt: right colours, readable on any theme, harmless, and never long."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image
from rich.console import Console

from browser import dom_after_scripts, needs_chromium, screenshot
from pcache_core.picture.html import QUIET_OPACITY, TINT_ALPHA
from pcache_core.picture.palette import LOOKS, ON_COLOUR
from pcache_core.report import Report, SegmentReport, Source

AA_TEXT, AA_GRAPHICS = 4.5, 3.0  # WCAG 2.2, success criteria 1.4.3 and 1.4.11
SOURCES: tuple[Source, ...] = get_args(Source)
# Page and text of notebooks and of terminals: Jupyter, GitHub, VS Code.
THEMES = {
    "jupyter-light": ("#ffffff", "#212121"),
    "jupyter-dark": ("#111111", "#ffffff"),
    "github-light": ("#ffffff", "#1f2328"),
    "github-dark": ("#0d1117", "#e6edf3"),
    "vscode-light": ("#ffffff", "#3b3b3b"),
    "vscode-dark": ("#1e1e1e", "#cccccc"),
}
SENTENCE = "The museum by the harbour opens at nine. "
HOSTILE = (
    "</mark></div><script>document.title='owned'</script><img src=x onerror=\"document.title="
    '\'owned\'">" onmouseover="x\x1b]0;owned\x07\x1b[31m\u202e &amp; [bold]red[/bold] '
)

RGB = tuple[float, ...]


def rgb(colour: str) -> RGB:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def over(colour: RGB, page: RGB, opacity: float) -> RGB:
    return tuple(opacity * a + (1 - opacity) * b for a, b in zip(colour, page, strict=True))


def contrast(one: RGB, other: RGB) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: RGB) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (value / 255 for value in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def report_of(*segments: SegmentReport, **figures: float) -> Report:
    tokens = sum(segment.num_tokens for segment in segments)
    return Report(segments, tokens, 0, 0, tokens, "balanced", **figures)  # type: ignore[arg-type]


def page_of(tmp_path: Path, body: str, theme: str = "jupyter-light", script: str = "") -> Path:
    background, text = THEMES[theme]
    file = tmp_path / f"{theme}.html"
    style = f"margin:0;background:{background};color:{text}"
    file.write_text(
        f'<!doctype html><meta charset="utf-8"><title>page</title><body style="{style}">'
        f"{body}<script>{script}</script></body>",
        "utf-8",
    )
    return file


class Marks(HTMLParser):
    """What stands in `<mark>` elements, and every tag and attribute of the fragment."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.titles = "", list[str]()
        self.tags, self.attributes = set[str](), set[str]()
        self._open: list[str] = []
        self.feed(source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "mark":
            self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "mark":
            self.text += data


class TestColours:
    @pytest.mark.parametrize("source", SOURCES)
    def test_white_is_readable_on_each_colour(self, source: Source) -> None:
        assert contrast(rgb(ON_COLOUR), rgb(LOOKS[source].colour)) >= AA_TEXT

    @pytest.mark.parametrize("theme", THEMES)
    @pytest.mark.parametrize("source", SOURCES)
    def test_each_colour_stands_out_from_the_page_and_text_from_its_tint(
        self, source: Source, theme: str
    ) -> None:
        page, text = map(rgb, THEMES[theme])
        colour = rgb(LOOKS[source].colour)
        tint = over(colour, page, int(TINT_ALPHA, 16) / 255)
        assert contrast(colour, page) >= AA_GRAPHICS
        assert contrast(text, tint) >= AA_TEXT
        assert contrast(over(text, tint, QUIET_OPACITY), tint) >= AA_TEXT
        assert contrast(over(text, page, QUIET_OPACITY), page) >= AA_TEXT

    def test_no_source_is_told_by_colour_alone(self) -> None:
        assert len({look.symbol for look in LOOKS.values()}) == len(SOURCES) == len(LOOKS)
        for source in SOURCES:
            shown = report_of(SegmentReport("document", "d", SENTENCE, 9, source))
            html, printed = shown._repr_html_(), str(shown)
            symbol = LOOKS[source].symbol
            assert f"{symbol} d · 9" in html
            assert f"{symbol} {source}</b> {LOOKS[source].meaning}" in html
            assert f"{symbol} {source}  d  9 tokens" in printed


class TestText:
    def test_marks_hold_the_whole_prompt_with_all_there_is_to_say_of_each_part(self) -> None:
        report = report_of(
            SegmentReport("literal", None, "Answer:\n\n", 3, "prefix"),
            SegmentReport("document", "d1", SENTENCE, 9, "memory", repaired_tokens=4),
            SegmentReport("document", "d2", SENTENCE, 9, "memory"),
            SegmentReport("literal", None, "\n\nQ:", 3, "computed"),
            SegmentReport("argument", "question", " When?", 2, "computed"),
        )
        marks = Marks(report._repr_html_())
        assert marks.text == "".join(segment.text for segment in report.segments)
        assert dict.fromkeys(marks.titles).keys() == {
            "literal: 3 tokens, prefix",
            "document d1: 9 tokens, memory, 4 repaired",
            "document d2: 9 tokens, memory",
            "literal: 3 tokens, computed\nargument question: 2 tokens, computed",
        }

    def test_neighbours_of_one_source_are_one_part_but_modules_and_documents_are_not(self) -> None:
        report = report_of(
            SegmentReport("literal", None, "Plan.", 2, "memory"),
            SegmentReport("literal", "city", "To ", 1, "memory"),
            SegmentReport("argument", "where", "Oslo", 1, "memory"),
            SegmentReport("literal", "city", " by train.", 3, "memory"),
            SegmentReport("document", "d", "Oslo is far.", 4, "memory"),
            SegmentReport("document", "d", "Or near.", 3, "memory"),
            SegmentReport("literal", None, "Q:", 2, "computed"),
            SegmentReport("argument", "question", " When?", 2, "computed"),
        )
        chips = re.findall(r"<b style=[^>]*>(\S \S+ · \d+) </b>", report._repr_html_())
        assert chips == ["● literal · 2", "● city · 5", "● d · 4", "● d · 3", "○ question · 4"]

    def test_hostile_text_and_names_stay_text_in_the_notebook(self) -> None:
        report = report_of(
            SegmentReport("document", HOSTILE, HOSTILE, 9, "disk"),
            SegmentReport("text", None, HOSTILE, 9, "computed"),
        )
        report.fallback_reason = HOSTILE
        marks = Marks(report._repr_html_())
        assert marks.tags <= {"div", "span", "mark", "b"}
        assert marks.attributes <= {"style", "title", "role", "aria-label", "aria-hidden"}
        assert marks.text.count("<script>document.title='owned'</script>") == 2

    @pytest.mark.parametrize("colour", [None, "truecolor"])
    def test_hostile_text_reaches_no_terminal_as_a_command(self, colour: str | None) -> None:
        report = report_of(SegmentReport("document", HOSTILE, HOSTILE * 3, 9, "disk"))
        report.fallback_reason = HOSTILE
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=colour is not None, color_system=colour, width=90
        )
        console.print(report)
        without_colours = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
        assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202d\u202e]", without_colours)
        assert "\x1b[31m\u202e" not in file.getvalue()
        assert "[bold]red[/bold]" in without_colours

    def test_documents_are_shown_with_their_share_of_the_attention_to_documents(self) -> None:
        documents = [
            SegmentReport("document", name, SENTENCE, 9, "memory", attention=attention)
            for name, attention in (("d1", 0.375), ("d2", 0.125))
        ]
        asked = SegmentReport("text", None, "When?", 2, "computed", attention=0.5)
        report = report_of(*documents, asked)
        html = report._repr_html_()
        assert re.findall(r"width:(\d+%);background:currentColor", html) == ["100%", "75%", "25%"]
        assert re.findall(r"</span>(\d+%) ", html) == ["100%", "75%", "25%"]
        assert re.findall(r"(█+)(░+)  (\d+%) (d\d)", str(report)) == [
            ("█" * 8, "░" * 2, "75%", "d1"),
            ("█" * 2, "░" * 8, "25%", "d2"),
        ]
        unread = report_of(SegmentReport("document", "d", SENTENCE, 9, "memory"), asked)
        assert "attention" not in unread._repr_html_() + str(unread)

    def test_times_are_shown_with_what_no_part_accounts_for(self) -> None:
        figures = {"ttft_ms": 20.0, "load_ms": 4.0, "prefill_ms": 11.5}
        report = report_of(SegmentReport("text", None, "Hi", 1, "computed"), **figures)
        for shown in (str(report), re.sub("<.*?>", "", report._repr_html_())):
            assert "first token after 20.0 ms" in shown
            for time in ("load 4.0", "prefill 11.5", "other 4.5"):
                assert time in shown
            assert "repair" not in shown
        untimed = report_of(SegmentReport("text", None, "Hi", 1, "computed"))
        assert "first token" not in untimed._repr_html_() + str(untimed)


class TestLongPrompts:
    """Thousands of documents, or one of a book's length, are a page or two to look at."""

    MANY = [SegmentReport("document", f"d{i}", f"<{i}> " + SENTENCE * 9, 100, "memory")
            for i in range(300)]  # fmt: skip

    def test_a_long_text_is_cut_in_its_middle_and_says_by_how_much(self) -> None:
        text = "BEGIN " + SENTENCE * 3000 + "END"
        report = report_of(SegmentReport("document", "book", text, 27_000, "memory"))
        html = report._repr_html_()
        for shown in (html, " ".join(str(report).replace("▎", "").split())):
            assert len(shown) < 12_000
            assert "BEGIN" in shown
            assert "END" in shown
            (left_out,) = re.findall(r"([\d,]+) characters are not shown", shown)
        assert len(Marks(html).text) < 2_000
        assert len(Marks(html).text) == len(text) - int(left_out.replace(",", ""))

    def test_many_parts_are_counted_by_source_instead_of_shown(self) -> None:
        segments = [*self.MANY, SegmentReport("text", None, "\n\nWhen?", 2, "computed")]
        segments[150] = SegmentReport("document", "other", SENTENCE, 50, "disk")
        report = report_of(*segments)
        html = report._repr_html_()
        assert len(html) < 100_000
        assert len(str(report).splitlines()) < 300
        for shown in (html, str(report)):
            assert "237 parts are not shown: tokens 23,600 memory, 50 disk" in shown
            assert "When?" in shown
        assert "&lt;0&gt; The museum" in html
        assert "&lt;299&gt; The museum" in html
        assert "d150" not in html

    def test_a_thousand_names_of_any_length_stay_short(self) -> None:
        segments = [SegmentReport("document", "n" * 10_000, "x", 1, "computed")] * 1000
        html = report_of(*segments)._repr_html_()
        assert len(html) < 100_000
        assert "parts are not shown" in html

    def test_short_parts_are_never_cut_for_the_long_ones(self) -> None:
        short = "The question, in full: " + SENTENCE * 3
        segments = [*self.MANY[:20], SegmentReport("text", None, short, 30, "computed")]
        assert short in Marks(report_of(*segments)._repr_html_()).text


@needs_chromium
class TestBrowser:
    BAND = 320  # pixels, for each of several pictures on one page

    def pictures(self) -> str:
        """One for each source, at known places."""
        return "".join(
            f'<div style="height:{self.BAND}px;overflow:hidden">'
            f"{report_of(SegmentReport('document', 'd', SENTENCE, 9, source))._repr_html_()}</div>"
            for source in SOURCES
        )

    @pytest.mark.parametrize("theme", ["jupyter-light", "jupyter-dark"])
    def test_each_source_is_drawn_in_its_own_colour_on_dark_and_light_pages(
        self, theme: str, tmp_path: Path
    ) -> None:
        page = page_of(tmp_path, self.pictures(), theme)
        image = screenshot(page, width=800, height=self.BAND * len(SOURCES))
        background, text = map(rgb, THEMES[theme])
        for index, source in enumerate(SOURCES):
            top = index * self.BAND
            counts = colours(image.crop((0, top, image.width, top + self.BAND)))
            drawn = {name for name in SOURCES if counts.get(rgb(LOOKS[name].colour), 0) > 500}
            assert drawn == {source}
            tint = over(rgb(LOOKS[source].colour), background, int(TINT_ALPHA, 16) / 255)
            assert sum(n for colour, n in counts.items() if near(colour, tint)) > 500
            assert sum(n for colour, n in counts.items() if near(colour, text)) > 50

    def test_a_narrow_page_needs_no_scrolling_to_the_side(self, tmp_path: Path) -> None:
        wide = "W" * 400 + " " + "\u6587" * 300
        report = report_of(
            SegmentReport("document", "W" * 200, wide, 9, "memory", 3),
            SegmentReport("text", None, SENTENCE * 30, 9, "computed"),
            **{name: 5.0 for name in ("load_ms", "assemble_ms", "prefill_ms", "repair_ms")},
            ttft_ms=25.0,
        )
        report.fallback_reason = "f" * 500
        page = page_of(
            tmp_path,
            f'<div id="cell" style="width:300px;overflow:auto">{report._repr_html_()}</div>',
            script="document.title=`${cell.scrollWidth} of ${cell.clientWidth}`",
        )
        assert "<title>300 of 300</title>" in dom_after_scripts(page)

    def test_hostile_text_runs_no_script_and_makes_no_element(self, tmp_path: Path) -> None:
        report = report_of(
            SegmentReport("document", HOSTILE, HOSTILE, 9, "disk"),
            SegmentReport("text", None, HOSTILE, 9, "computed"),
        )
        report.fallback_reason = HOSTILE
        page = page_of(tmp_path, report._repr_html_(), script="document.title+=' is mine'")
        dom = dom_after_scripts(page)
        assert "<title>page is mine</title>" in dom
        assert "<img" not in dom
        assert dom.count("<script>") == 1

    def test_a_prompt_is_copied_without_labels(self, tmp_path: Path) -> None:
        text = f"Answer:\n\n{SENTENCE}\nWhen?"
        report = report_of(
            SegmentReport("literal", None, "Answer:\n\n", 3, "prefix"),
            SegmentReport("document", "d", SENTENCE, 9, "memory", attention=0.2),
            SegmentReport("text", None, "\nWhen?", 2, "computed"),
        )
        select = (
            "const marks=document.querySelectorAll('mark'), range=document.createRange();"
            "range.setStartBefore(marks[0]); range.setEndAfter(marks[marks.length-1]);"
            "getSelection().addRange(range);"
            "document.title=JSON.stringify(getSelection().toString())"
        )
        dom = dom_after_scripts(page_of(tmp_path, report._repr_html_(), script=select))
        (copied,) = re.findall(r'<title>"(.*)"</title>', dom)
        assert copied.replace("\\n", "\n") == text


def colours(image: Image.Image) -> dict[RGB, int]:
    counted = image.getcolors(image.width * image.height)
    assert counted is not None
    return {colour: count for count, colour in counted if isinstance(colour, tuple)}


def near(one: RGB, other: RGB) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 2
