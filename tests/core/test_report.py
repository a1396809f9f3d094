"""Reports: sums, what the terminal and the notebook show."""

from __future__ import annotations

from html.parser import HTMLParser

from pcache_core.report import EncodeReport, Report, SegmentReport

REPORT = Report(
    segments=(
        SegmentReport("literal", None, "Answer:\n", 3, "memory"),
        SegmentReport("document", "d<1>", "<script>alert('x')</script> [bold]", 9, "encoded"),
        SegmentReport("argument", "q", "Who & why?", 4, "computed"),
    ),
    prompt_tokens=17,
    cached_tokens=4,
    encoded_tokens=9,
    computed_tokens=4,
    reuse="fast",
    ttft_ms=12.5,
    fallback_reason="because <it> is so",
)


class Text(HTMLParser):
    """The text a browser would show, and the tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.feed(source)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)


def test_the_notebook_shows_every_segments_text_and_no_markup_of_theirs() -> None:
    shown = Text(REPORT._repr_html_())
    assert "".join(segment.text for segment in REPORT.segments) in shown.text
    assert shown.tags == {"div", "span"}
    for word in ("memory", "encoded", "computed", "because <it> is so"):
        assert word in shown.text


def test_the_terminal_shows_every_segments_text_and_the_counts() -> None:
    printed = str(REPORT)
    joined = printed.replace("\n", "")
    for segment in REPORT.segments:
        assert segment.text.replace("\n", "") in joined
        assert segment.source in printed
    assert "4 of 17 tokens reused" in joined
    assert "because <it> is so" in joined


def test_the_cached_share_is_of_all_tokens() -> None:
    assert REPORT.cached_share == 4 / 17


def test_an_encode_report_says_what_was_done_or_why_nothing_was() -> None:
    done = EncodeReport(5, 2, 1, 2, 1, 100, 2.0)
    assert done.tokens_per_second == 50
    assert str(done).startswith("2 of 5 texts encoded (100 tokens in 2.0 s, 50 tokens/s)")
    nothing = EncodeReport(5, 0, 0, 0, 0, 0, 0.0, "no positions")
    assert nothing.tokens_per_second == 0
    assert str(nothing) == "nothing encoded: no positions"
