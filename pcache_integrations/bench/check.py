"""What is to be timed has to compute the right thing first."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pcache_core import PromptCacheEngine, PromptCacheError
from pcache_core.params import ReuseMode, check_reuse
from pcache_integrations.bench.floor import Floor
from pcache_integrations.bench.workload import Round

# Relative error, in the L2 norm, between logits of the same ids computed in other portions. In
# bfloat16, a random model with 24 layers is 0.04 away from itself in fp32; documents in another
# order move its logits by 1, another question by 0.2.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}

Engines = Mapping[str, PromptCacheEngine]
"""By the name of the way that they serve, which starts with its mode."""


class WrongAnswerError(PromptCacheError):
    """What is to be timed does not compute what it should."""


def mode_of(name: str) -> ReuseMode:
    """The reuse mode that a way's name starts with."""
    return check_reuse(name.partition(",")[0])


def warm_up(engines: Engines, prompts: Round) -> tuple[str, ...]:
    """Read a prompt in every mode but `off`; returns what did not run as asked, and why."""
    fallbacks = []
    for name, engine in engines.items():
        if name == "off":
            continue  # `check_answers` runs it
        report = engine.prefill(prompts.first, reuse=mode_of(name)).report
        if report.fallback_reason:
            fallbacks.append(f"{name} fell back to {report.reuse}: {report.fallback_reason}")
    return tuple(fallbacks)


def check_answers(engines: Engines, floor: Floor, prompts: Round) -> None:
    """Every mode reads the same ids; a repeated prefix and the floor give the logits of `off`.

    Raises: WrongAnswerError.
    """
    off = engines["off"]
    ids = off.tokenise(prompts.same).token_ids
    if any(engine.tokenise(prompts.same).token_ids != ids for engine in engines.values()):
        raise WrongAnswerError("the modes read different token ids for the same prompt")
    expected = off.prefill(prompts.same, reuse="off").logits
    found = {"a forward over keys and values in place": floor.last_logits()}
    if "exact" in engines:
        answer = engines["exact"].prefill(prompts.same, reuse="exact")
        found["exact over a repeated prefix"] = answer.logits
    limit = _TOLERANCE[off.lm.dtype]
    for what, logits in found.items():
        error = float((logits - expected).norm() / expected.norm())
        if not error <= limit:
            raise WrongAnswerError(
                f"{what} gives other logits than off (relative error {error:.1e}, limit "
                f"{limit:.0e} in {off.lm.dtype}), so its time would mean nothing; "
                "please report it with the command that you ran"
            )
