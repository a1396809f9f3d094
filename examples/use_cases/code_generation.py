"""Writing code for a code base, of which each file is a module.

python examples/use_cases/code_generation.py --model random
"""

from __future__ import annotations

from pathlib import Path

from measure import UseCase, main

from pcache_templates.use_cases import render

FOLDER = Path(__file__).parent / "warehouse"
FILES = ("item.py", "shelf.py", "order.py", "warehouse.py", "report.py")
TASKS = (
    "Write a function that moves every piece from one shelf to another.",
    "Write a function that says which orders can be packed today.",
    "Write a test that an order which is too large takes nothing.",
    "Write a class for a van that carries packed orders.",
    "Write a function that finds the shelf with most room.",
    "Write a report of items that have run out.",
)


def prompt(task: str, first: int) -> str:
    """A task over all files, beginning with another one each time."""
    files = [*FILES[first:], *FILES[:first]]
    uses = "".join(f"<{file}/>" for file in files)
    return f'<prompt schema="code-generation">{uses}<user>{task}</user></prompt>'


CASE = UseCase(
    title="Code generation",
    schema=render("code_generation", files=FILES),
    prompts=[prompt(task, index % len(FILES)) for index, task in enumerate(TASKS)],
    paper_gpu_ms=(924, 93),
    paper_cpu_ms=(75_976, 861),
    src_root=FOLDER,
)

if __name__ == "__main__":
    main(CASE)
