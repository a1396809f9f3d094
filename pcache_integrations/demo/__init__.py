"""The demonstration behind `pcache demo`: the same questions through both frameworks."""
