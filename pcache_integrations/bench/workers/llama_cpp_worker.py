"""llama.cpp through llama-cpp-python, which reuses the common prefix with the prompt before."""

from __future__ import annotations

from itertools import islice
from typing import Any

from worker_loop import Arrivals, LoadOptions, common_prefix, reply, serve


class LlamaCppPeer:
    """`Llama.generate` on token ids, as its completion calls use it."""

    modules: tuple[str, ...] = ("llama_cpp",)
    packages: tuple[str, ...] = ("llama-cpp-python",)

    def __init__(self) -> None:
        self._ids: list[int] = []

    def load(self, options: LoadOptions) -> None:
        """Load a GGUF file."""
        from llama_cpp import Llama

        self._llm = Llama(
            model_path=options.model,
            n_ctx=options.context_tokens,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            n_gpu_layers=0 if options.device == "cpu" else -1,
            verbose=False,
        )

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> dict[str, Any]:
        """Tokens are asked for one by one; it never stops of itself."""
        arrivals = Arrivals()
        cached = min(common_prefix(self._ids, prompt_ids), len(prompt_ids) - 1)
        tokens = []
        for token in islice(self._llm.generate(prompt_ids, temp=0.0), max_tokens):
            arrivals.note()
            tokens.append(int(token))
        self._ids = [*prompt_ids, *tokens[:-1]]
        return reply(
            arrivals.started,
            arrivals.times,
            tokens,
            prompt_tokens=len(prompt_ids),
            cached_tokens=cached,
        )

    def reset(self) -> None:
        """Forget the prompt before."""
        self._ids = []
        self._llm.reset()


if __name__ == "__main__":
    serve(LlamaCppPeer())
