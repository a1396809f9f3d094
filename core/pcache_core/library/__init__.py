"""The states of a model: found, or encoded once."""
