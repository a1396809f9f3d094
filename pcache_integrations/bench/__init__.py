"""What `pcache bench` measures: the reuse modes, beside a bare forward."""
