"""LangChain's `HuggingFacePipeline`, which keeps nothing between requests."""

from __future__ import annotations

from typing import Any

from worker_loop import Arrivals, LoadOptions, reply, serve


class LangChainPeer:
    """`llm.stream(text)`: its first piece is the first token's, even where that shows no text."""

    modules: tuple[str, ...] = ("torch", "transformers", "langchain_huggingface")
    packages: tuple[str, ...] = ("langchain-huggingface",)

    def load(self, options: LoadOptions) -> None:
        """Load a directory that `save_pretrained` wrote, its tokenizer included."""
        import torch
        from langchain_huggingface import HuggingFacePipeline
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

        torch.set_num_threads(options.threads)
        self._tokenizer = AutoTokenizer.from_pretrained(options.model)
        loaded = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
        loaded.generation_config.eos_token_id = None  # answers of one length
        loaded.generation_config.pad_token_id = 0
        pipe = pipeline(
            "text-generation", model=loaded.eval().to(options.device), tokenizer=self._tokenizer
        )
        self._llm = HuggingFacePipeline(pipeline=pipe)

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> dict[str, Any]:
        """The text is tokenised as a whole here; the ids are not used."""
        prompt_tokens = len(self._tokenizer(text)["input_ids"])
        options = {"max_new_tokens": max_tokens, "do_sample": False}
        arrivals = Arrivals()
        for _ in self._llm.stream(text, pipeline_kwargs=options, skip_prompt=True):
            arrivals.note()
        return reply(
            arrivals.started,
            arrivals.times[:max_tokens],  # behind the last token comes an empty piece
            [],  # ids can't be told from text
            prompt_tokens=prompt_tokens,
            cached_tokens=0,
        )

    def reset(self) -> None:
        """Nothing is kept."""


if __name__ == "__main__":
    serve(LangChainPeer())
