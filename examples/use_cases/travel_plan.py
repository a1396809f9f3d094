"""A travel plan with parameters for everything that differs from journey to journey.

python examples/use_cases/travel_plan.py --model random
"""

from __future__ import annotations

from measure import UseCase, main

from pcache_templates.use_cases import render

JOURNEYS = (
    ("Oslo", "5", "May", "two", "900 euros", "calm", "by-train", "nuts"),
    ("Rome", "3", "April", "four", "1500 euros", "busy", "by-train", "meat"),
    ("the Alps", "10", "July", "three", "2000 euros", "calm", "by-car", "fish"),
    ("Lisbon", "4", "March", "two", "800 euros", "busy", "by-train", "cheese"),
    ("Brittany", "7", "June", "five", "2400 euros", "calm", "by-car", "eggs"),
    ("Vienna", "6", "October", "two", "1100 euros", "busy", "by-train", "pork"),
)


def prompt(journey: tuple[str, ...]) -> str:
    """A journey's arguments in their places."""
    destination, days, month, people, budget, pace, way, avoid = journey
    return (
        '<prompt schema="travel-plan">'
        f'<journey destination="{destination}" days="{days}" month="{month}" people="{people}">'
        f'<{way}/></journey><money budget="{budget}"/><{pace}/><food avoid="{avoid}"/>'
        "<user>Write the plan.</user></prompt>"
    )


CASE = UseCase(
    title="Travel plan",
    schema=render("travel_plan"),
    prompts=[prompt(journey) for journey in JOURNEYS],
    paper_gpu_ms=(75, 54),
    paper_cpu_ms=(4_725, 479),
)

if __name__ == "__main__":
    main(CASE)
