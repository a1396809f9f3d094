"""Module states inside a vLLM server: a KV connector, and the protocol that clients speak to it."""
