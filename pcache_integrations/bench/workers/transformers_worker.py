"""transformers' own `generate`, with the keys and values of the prompt before as prefix cache."""

from __future__ import annotations

from typing import Any

from worker_loop import Arrivals, LoadOptions, common_prefix, reply, serve


class TransformersPeer:
    """`model.generate` with a `DynamicCache` that is kept and cropped to the common prefix."""

    modules: tuple[str, ...] = ("torch", "transformers")
    packages: tuple[str, ...] = ("transformers",)

    def __init__(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []

    def load(self, options: LoadOptions) -> None:
        """Load a directory that `save_pretrained` wrote."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        loaded = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
        self._model = loaded.eval().to(options.device)
        self._model.generation_config.eos_token_id = None  # answers of one length

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> dict[str, Any]:
        """One `generate` call; the last token of a prompt is always computed."""
        import torch
        from transformers import DynamicCache

        arrivals = Arrivals()
        cached = min(common_prefix(self._ids, prompt_ids), len(prompt_ids) - 1)
        if self._cache is None or cached == 0:
            self._cache = DynamicCache(config=self._model.config)
        elif cached < self._cache.get_seq_length():
            self._cache.crop(cached - self._cache.get_seq_length())
        input_ids = torch.tensor([prompt_ids], device=self._model.device)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=self._cache,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=_Streamer(arrivals),
        )
        self._ids = output[0].tolist()[: self._cache.get_seq_length()]
        tokens = output[0, len(prompt_ids) :].tolist()
        return reply(
            arrivals.started,
            arrivals.times,
            tokens,
            prompt_tokens=len(prompt_ids),
            cached_tokens=cached,
        )

    def reset(self) -> None:
        """Forget the prompt before."""
        self._cache, self._ids = None, []


class _Streamer:
    """Called by `generate` with the prompt first, then with every token."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._prompt_came = False

    def put(self, value: Any) -> None:
        if self._prompt_came:
            self._arrivals.note()
        self._prompt_came = True

    def end(self) -> None:
        pass


if __name__ == "__main__":
    serve(TransformersPeer())
