"""Module states served by vLLM: the engine that asks a server, and the KV connector inside it."""
