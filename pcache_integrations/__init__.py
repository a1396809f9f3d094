"""Prompt Cache for LangChain and LlamaIndex. Import the submodule of the framework you use."""
