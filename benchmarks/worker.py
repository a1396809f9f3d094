"""Other libraries, each a class here; `python worker.py NAME` answers for one of them.

A worker runs in the interpreter that has its library, which need not have this project, so this
file imports the standard library and, inside of methods, the library alone. It reads a JSON object
a line, `{"op": "hello" | "load" | "run" | "reset", ...arguments}`, and writes one a line: what the
operation returns, or `error`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, ClassVar, NamedTuple


class LoadOptions(NamedTuple):
    """model: a folder that `save_pretrained` wrote, or a GGUF file. context_tokens: the longest
    prompt and its answer. kv_bytes: room for the keys and values of a few such prompts.
    """

    model: str
    threads: int
    dtype: str
    device: str
    context_tokens: int
    kv_bytes: int


class Answer:
    """Takes the time when each token is known, and counts them."""

    def __init__(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.tokens: list[int] = []  # none where ids can't be told from text
        self.times: list[float] = []
        self._started = time.perf_counter()

    def note(self) -> None:
        self.times.append(time.perf_counter())

    def as_json(self) -> dict[str, Any]:
        elapsed = self.times[-1] - self.times[0]
        return {
            "ttft_ms": (self.times[0] - self._started) * 1000,
            "decode_tokens_per_s": (len(self.times) - 1) / elapsed if elapsed else None,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
        }


class Library:
    """A library that is compared with.

    label: in tables. install: what its users install. modules: imported by it. gguf: whether it
    reads a GGUF file. keeps_prefix: whether it keeps anything between requests. takes_ids: or text.
    """

    label: ClassVar[str]
    install: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    gguf: ClassVar[bool] = False
    keeps_prefix: ClassVar[bool] = True
    takes_ids: ClassVar[bool] = True

    def load(self, options: LoadOptions) -> None:
        raise NotImplementedError

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> Answer:
        """Answer a prompt greedily with exactly `max_tokens` tokens."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget every earlier prompt."""


class Transformers(Library):
    """`model.generate` with a `DynamicCache` that is kept and cropped to the common prefix."""

    label = "transformers generate"
    install = "transformers"
    modules = ("torch", "transformers")

    def __init__(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []

    def load(self, options: LoadOptions) -> None:
        self._model = load_model(options)

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> Answer:
        import torch
        from transformers import DynamicCache

        cached = common_prefix(self._ids, prompt_ids)
        answer = Answer(len(prompt_ids), cached)
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
            streamer=Streamer(answer),
        )
        self._ids = output[0].tolist()[: self._cache.get_seq_length()]
        answer.tokens = output[0, len(prompt_ids) :].tolist()
        return answer

    def reset(self) -> None:
        self._cache, self._ids = None, []


class Streamer:
    """Called by `generate` with the prompt first, then with every token."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._prompt_came = False

    def put(self, _: Any) -> None:
        if self._prompt_came:
            self._answer.note()
        self._prompt_came = True

    def end(self) -> None:
        pass


class LangChain(Library):
    """`HuggingFacePipeline.stream`: its first piece is the first token's, even without text."""

    label = "LangChain HuggingFacePipeline"
    install = "langchain-huggingface"
    modules = ("torch", "transformers", "langchain_huggingface")
    keeps_prefix = False
    takes_ids = False

    def load(self, options: LoadOptions) -> None:
        from langchain_huggingface import HuggingFacePipeline
        from transformers import AutoTokenizer, pipeline

        self._tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = load_model(options)
        model.generation_config.pad_token_id = 0
        pipe = pipeline("text-generation", model=model, tokenizer=self._tokenizer)
        self._llm = HuggingFacePipeline(pipeline=pipe)

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> Answer:
        answer = Answer(len(self._tokenizer(text)["input_ids"]), 0)
        options = {"max_new_tokens": max_tokens, "do_sample": False}
        for _ in self._llm.stream(text, pipeline_kwargs=options, skip_prompt=True):
            answer.note()
        del answer.times[max_tokens:]  # after the last token comes an empty piece
        return answer


class LlamaCpp(Library):
    """`Llama.generate` on token ids, which reuses the common prefix with the prompt before."""

    label = "llama.cpp"
    install = "llama-cpp-python"
    modules = ("llama_cpp",)
    gguf = True

    def load(self, options: LoadOptions) -> None:
        from llama_cpp import Llama

        self._ids: list[int] = []
        self._llm = Llama(
            model_path=options.model,
            n_ctx=options.context_tokens,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            n_gpu_layers=0 if options.device == "cpu" else -1,
            verbose=False,
        )

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> Answer:
        answer = Answer(len(prompt_ids), common_prefix(self._ids, prompt_ids))
        for token in islice(self._llm.generate(prompt_ids, temp=0.0), max_tokens):
            answer.note()
            answer.tokens.append(int(token))
        self._ids = [*prompt_ids, *answer.tokens[:-1]]
        return answer

    def reset(self) -> None:
        self._ids = []
        self._llm.reset()


class Vllm(Library):
    """`LLMEngine.add_request` and `step` in this process; the first token is seen at once."""

    label = "vLLM"
    install = "vllm"
    modules = ("vllm",)

    def load(self, options: LoadOptions) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        if options.device == "cpu" and hasattr(os, "sched_getaffinity"):
            cores = sorted(os.sched_getaffinity(0))[: options.threads]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        from vllm import LLM

        self._count = 0
        self._llm = LLM(
            model=options.model,
            dtype=options.dtype,
            max_model_len=options.context_tokens,
            kv_cache_memory_bytes=options.kv_bytes,
            enforce_eager=True,
            enable_prefix_caching=True,
        )

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> Answer:
        from vllm import SamplingParams

        answer = Answer(len(prompt_ids), 0)
        engine = self._llm.llm_engine
        self._count += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(str(self._count), {"prompt_token_ids": prompt_ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if len(output.outputs[0].token_ids) > len(answer.times):
                    answer.note()
                answer.tokens = list(output.outputs[0].token_ids)
                answer.prompt_tokens = len(output.prompt_token_ids)
                answer.cached_tokens = output.num_cached_tokens or 0
        return answer

    def reset(self) -> None:
        self._llm.reset_prefix_cache()


LIBRARIES: dict[str, type[Library]] = {
    "transformers": Transformers, "langchain": LangChain, "llama-cpp": LlamaCpp, "vllm": Vllm,
}  # fmt: skip


def load_model(options: LoadOptions) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model.generation_config.eos_token_id = None  # answers of one length
    return model.eval().to(options.device)


def common_prefix(before: list[int], prompt_ids: list[int]) -> int:
    """Count the first tokens that are the same; the last of a prompt is always computed."""
    pairs = enumerate(zip(before, prompt_ids[:-1], strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(prompt_ids) - 1))


def answer_to(library: Library, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if op == "hello":
        missing = [name for name in library.modules if importlib.util.find_spec(name) is None]
        return {"missing": missing, "version": version_of(library.install)}
    if op == "run":
        return library.run(**arguments).as_json()
    if op == "load":
        library.load(LoadOptions(**arguments))
    else:
        library.reset()
    return {}


def version_of(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


def main() -> None:
    """Answer until standard input ends.

    Libraries print; what they print goes to standard error, so that replies stay alone.
    """
    library = LIBRARIES[sys.argv[1]]()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = answer_to(library, request.pop("op"), request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
