"""What a type checker tells a user of the public interface before anything runs.

Every ignored line is a mistake. In strict mode a comment that ignores nothing is an error itself,
so this file passes only as long as each of them is found.
"""

from __future__ import annotations

from pcache_core import CausalLM, DiskStore, PromptCacheEngine, SamplingParams, Segment
from pcache_templates import PromptProgram


def mistakes(lm: CausalLM, engine: PromptCacheEngine, program: PromptProgram[[str]]) -> None:
    PromptCacheEngine(lm, reuse="fastest")  # pyright: ignore[reportArgumentType]
    PromptCacheEngine(lm, None, "fast", "space", None, 64, 8)  # pyright: ignore[reportCallIssue]
    PromptCacheEngine(lm, repair="64")  # pyright: ignore[reportArgumentType]
    PromptCacheEngine(lm, preamble="Read:")  # pyright: ignore[reportArgumentType]
    PromptCacheEngine("builtin:tiny-rag")  # pyright: ignore[reportArgumentType]
    Segment("text", "doc")  # pyright: ignore[reportArgumentType]
    SamplingParams(max_token=4)  # pyright: ignore[reportCallIssue]
    DiskStore("states", storage_dtype="int4")  # pyright: ignore[reportArgumentType]
    engine.generate("text")  # pyright: ignore[reportArgumentType]
    engine.prompt_from_pml("<prompt/>", positions="dense")  # pyright: ignore[reportArgumentType]
    program.render(5)  # pyright: ignore[reportArgumentType]
