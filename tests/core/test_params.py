"""Sampling parameters refuse what can't be meant."""

from __future__ import annotations

from typing import Any

import pytest

from pcache_core import OptionError, PromptCacheError, SamplingParams
from pcache_core.params import check_reuse


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"stop": [""]},
        {"stop": ["ok", ""]},
        {"stop": [3]},
        {"stop_token_ids": ["x"]},
        {"max_tokens": 10**400},
        {"repetition_penalty": 1e-300},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"seed": 1.5},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_a_value_out_of_range_is_an_option_error_that_names_it(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(OptionError, match=name.split("_ids")[0]) as caught:
        SamplingParams(**bad)
    assert isinstance(caught.value, (PromptCacheError, ValueError))


def test_one_stop_string_may_be_given_without_a_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


def test_an_unknown_reuse_mode_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'turbo'.*off, exact, fast"):
        check_reuse("turbo")
