"""A model and options to a finished benchmark: what `pcache bench` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from pcache_core import CausalLM, OptionError, PromptCacheError
from pcache_core.evaluation.evaluate import environment
from pcache_integrations.bench.figures import Benchmark
from pcache_integrations.bench.gguf_file import write_gguf
from pcache_integrations.bench.growth import fit_rows
from pcache_integrations.bench.models import parameter_count, save
from pcache_integrations.bench.one_size import OneSize
from pcache_integrations.bench.options import BenchOptions
from pcache_integrations.bench.peers import PEERS, LoadOptions, Peer
from pcache_integrations.bench.ways import FLOOR

_WARM_UP_TOKENS = 32


def benchmark(
    lm: CausalLM, options: BenchOptions, peers: Sequence[Peer], *, threads: int
) -> Benchmark:
    """Measure every size. Shows a progress bar on standard error if that is a terminal.

    peers: started; loaded here. Raises: OptionError: the model is not of a kind that can be
    measured, or its context is too short. WrongAnswerError: before anything is timed.
    """
    _check_model(lm, options)
    with TemporaryDirectory(prefix="pcache-bench-") as folder:
        _load(lm, options, peers, ModelFiles(lm, options, Path(folder)), threads)
        total = len(options.sizes) * options.rounds
        with tqdm(total=total, unit="round", disable=None) as bar:
            found = []
            for size in options.sizes:
                bar.set_description(f"{size} tokens")
                running = [peer for peer in peers if peer.problem is None]
                found.append(OneSize(lm, options, running, size).measure(bar.update))
    rows = tuple(row for each in found for row in each.rows)
    stored = [each.stored_bytes_per_token for each in found]
    return Benchmark(
        model=lm.name,
        parameters=parameter_count(lm),
        kv_bytes_per_token=lm.bytes_per_token,
        stored_bytes_per_token=stored[-1],
        options=options.as_json(),
        environment=environment(lm),
        rows=rows,
        encoding=tuple(each.encoding for each in found),
        concurrency=tuple(each.concurrency for each in found if each.concurrency),
        growth=fit_rows(rows, ("fast", FLOOR)),
        peers=tuple(peer.state for peer in peers),
        notes=tuple(dict.fromkeys(note for each in found for note in each.fallbacks)),
    )


@contextmanager
def started(chosen: Mapping[str, str]) -> Iterator[list[Peer]]:
    """Processes of these peers, by interpreter; none is left when this ends, however it ends."""
    peers: list[Peer] = []
    try:
        for name, python in chosen.items():
            peers.append(Peer(PEERS[name], python))
        for peer in peers:
            peer.greet()
        yield peers
    finally:
        for peer in peers:
            peer.close()


class ModelFiles:
    """The model as files for peers, written when the first asks for them."""

    def __init__(self, lm: CausalLM, options: BenchOptions, folder: Path) -> None:
        self._lm = lm
        self._options = options
        self._folder = folder

    @cached_property
    def folder(self) -> Path:
        """As `save_pretrained` writes it."""
        folder = self._folder / "model"
        save(self._lm, folder)
        return folder

    @cached_property
    def gguf(self) -> Path:
        """The user's file, or one of the same weights. Raises: OptionError, DependencyError."""
        if self._options.gguf_file is not None:
            return self._options.gguf_file
        file = self._folder / "model.gguf"
        write_gguf(self._lm, file, self._options.gguf_type)
        return file


def _load(
    lm: CausalLM, options: BenchOptions, peers: Sequence[Peer], files: ModelFiles, threads: int
) -> None:
    """Load every peer and let it answer once; one that can't gives up."""
    load_options = LoadOptions(
        threads=threads,
        dtype=str(lm.dtype).removeprefix("torch."),
        device=lm.device.type,
        context_tokens=options.context_tokens,
        kv_bytes=options.peer_kv_tokens * lm.bytes_per_token,
    )
    text = "".join(f" {number % 10}" for number in range(_WARM_UP_TOKENS))
    ids = [*lm.text.bos_ids, *lm.token_ids(text)]
    for peer in peers:
        if peer.problem is not None:
            continue
        try:
            peer.load(files.gguf if peer.spec.weights == "gguf" else files.folder, load_options)
            peer.run(ids, text, options.answer_tokens)
        except PromptCacheError as error:
            peer.give_up(str(error))


def _check_model(lm: CausalLM, options: BenchOptions) -> None:
    if lm.support.kind == "no-cache":
        raise OptionError(
            f"{lm.name} keeps no keys and values per token ({lm.support.reason}), so there is "
            "nothing to reuse and no floor to measure; take another --model"
        )
    limit = lm.context_length
    if limit is not None and options.context_tokens > limit:
        raise OptionError(
            f"--cached {max(options.sizes)} with question and answer takes "
            f"{options.context_tokens} tokens, {lm.name} has a context of {limit}; take fewer"
        )
