"""What reuse does to answers: question sets, metrics, and the table behind `pcache eval`.

Reading order: `evaluate` (the whole), `data` and `files` (what is asked), `prompts`, `run` (asking
in every mode), `metrics`, `table`, `curve`. `world` holds the tiny world.
"""
