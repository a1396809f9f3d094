"""Re-ranking: prompts whose question's attention tells which document answers it.

In-context re-ranking by attention (arXiv 2410.02642), over states instead of a full prefill: what
is computed for a question is the question alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pcache_core.errors import ModelError, PromptError
from pcache_core.lm import CausalLM
from pcache_core.prompt import Prompt, Segment
from pcache_core.report import Report

_INSTRUCTION = "Use the following documents to answer the question.\n\n"
_SEPARATOR = "\n\n"
_ROOM_TOKENS = 8  # for what joins the parts, and a beginning-of-sequence token


def ranking_prompts(lm: CausalLM, question: str, documents: Sequence[str]) -> list[Prompt]:
    """Lay out documents and question; each document is a segment named by its index.

    Documents that no single prompt of the model can hold are shared out among several.

    Raises: PromptError: no question, or documents that are no list of texts. ModelError: the
        model's attention can't be observed.
    """
    if not isinstance(question, str) or not question.strip():
        raise PromptError(f"question must be a text that asks something, got {question!r:.80}")
    if isinstance(documents, str):
        raise PromptError("rank takes several documents, got one string; put it in a list")
    for document in documents:
        if not isinstance(document, str):
            raise PromptError(
                f"rank takes documents' texts, got {type(document).__name__}; "
                "use page_content of LangChain's documents, get_content() of LlamaIndex's nodes"
            )
    if not lm.watches:
        raise ModelError(f"{lm.name} doesn't show its attention and can't rank documents by it")
    return [_prompt(lm, question, part) for part in _parts(lm, question, documents)]


def scores_of(reports: Iterable[Report], num_documents: int) -> list[float]:
    """Return each document's share of the attention, from what was read of `ranking_prompts`."""
    scores = [0.0] * num_documents
    for report in reports:
        for segment in report.segments:
            if segment.kind == "document" and segment.attention is not None:
                scores[int(segment.name or 0)] = segment.attention
    return scores


def _prompt(lm: CausalLM, question: str, documents: Sequence[tuple[int, str]]) -> Prompt:
    """End in the question itself; a completion model asks where its answer is to begin."""
    segments = [Segment(_INSTRUCTION, "literal")]
    for index, document in documents:
        segments.append(Segment(document, "document", str(index)))
        segments.append(Segment(_SEPARATOR, "literal"))
    segments += [Segment("Question:", "literal"), Segment(f" {question}", "argument")]
    ending = [] if lm.text.marks_roles() else [Segment("\nAnswer:", "literal")]
    return Prompt([*segments, *ending])


def _parts(
    lm: CausalLM, question: str, documents: Sequence[str]
) -> Iterator[list[tuple[int, str]]]:
    """Yield documents with their indices, in as few parts as fit and of about equal length."""
    counts = [lm.count_tokens(document + _SEPARATOR) for document in documents]
    room = total = sum(counts)
    if lm.context_length is not None:
        room = lm.context_length - lm.count_tokens(_INSTRUCTION + question) - _ROOM_TOKENS
    room = max(room, 1)
    share = total / max(1, -(-total // room))
    part: list[tuple[int, str]] = []
    held = 0
    for index, (document, count) in enumerate(zip(documents, counts, strict=True)):
        if part and (held + count > room or held >= share):
            yield part
            part, held = [], 0
        part.append((index, document))
        held += count
    if part:
        yield part
