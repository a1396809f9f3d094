"""What `pcache demo` shows: the same questions through both frameworks."""
