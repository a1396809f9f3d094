"""Reports: sums, what the terminal and the notebook show."""

from __future__ import annotations

from IPython.lib.pretty import pretty

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


def test_the_notebook_shows_the_counts_and_why_another_mode_ran() -> None:
    html = REPORT._repr_html_()
    for shown in ("4 of 17 tokens reused", "9 encoded, 4 computed", "because &lt;it&gt; is so"):
        assert shown in html


def test_the_terminal_shows_every_segments_text_and_the_counts() -> None:
    printed = str(REPORT)
    for segment in REPORT.segments:
        assert segment.text.strip() in printed
        assert segment.source in printed
    assert "fast: 4 of 17 tokens reused, 9 encoded, 4 computed" in printed
    assert "fallback: because <it> is so" in printed


def test_ipython_shows_the_picture_and_not_every_field() -> None:
    assert pretty(REPORT) == str(REPORT)


def test_the_cached_share_is_of_all_tokens() -> None:
    assert REPORT.cached_share == 4 / 17


def test_an_encode_report_says_what_was_done_or_why_nothing_was() -> None:
    done = EncodeReport(5, 2, 1, 2, 1, 100, 2.0)
    assert done.tokens_per_second == 50
    assert str(done).startswith("2 of 5 texts encoded (100 tokens in 2.0 s, 50 tokens/s)")
    nothing = EncodeReport(5, 0, 0, 0, 0, 0, 0.0, "no positions")
    assert nothing.tokens_per_second == 0
    assert str(nothing) == "nothing encoded: no positions"
