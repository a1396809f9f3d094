"""A tutor that knows its pupil: one trait out of each of six unions.

python examples/use_cases/personalisation.py --model random
"""

from __future__ import annotations

import random

from measure import UseCase, main

from pcache_templates.use_cases import render

TRAITS = {
    "age": ("child", "teenager", "student", "senior"),
    "level": ("beginner", "intermediate", "expert"),
    "goal": ("exam", "curiosity", "work"),
    "style": ("visual", "verbal", "formal", "practical"),
    "tone": ("warm", "plain", "playful"),
    "memory": ("none", "fractions", "planets"),
}
QUESTIONS = (
    "Why is the sky blue?",
    "What is a prime number?",
    "How does a ship float?",
    "Why do leaves turn red?",
    "What is electricity?",
    "Who decides what money is worth?",
)


def prompt(question: str, rng: random.Random) -> str:
    """A question of a pupil with random traits."""
    uses = "".join(f"<{union}-{rng.choice(traits)}/>" for union, traits in TRAITS.items())
    return f'<prompt schema="personalisation">{uses}<user>{question}</user></prompt>'


_rng = random.Random(0)
CASE = UseCase(
    title="Personalisation",
    schema=render("personalisation"),
    prompts=[prompt(question, _rng) for question in QUESTIONS],
    paper_gpu_ms=(216, 65),
    paper_cpu_ms=(22_449, 686),
)

if __name__ == "__main__":
    main(CASE)
