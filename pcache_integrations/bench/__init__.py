"""What `pcache bench` measures: times to first token, their floor, and what peers take.

Reading order: `run` (the whole) and `one_size` (its rounds); `options`, `models` and `workload`
(what is asked); `ways` (who is asked), `check` (right before fast), `floor`, `encoding`,
`concurrency` and `growth`; `peers`, `gguf_file` and the scripts in `workers/` (other libraries,
each in a process of its own); `memory`; `figures`, `summary`, `table` and `plot`.
"""
