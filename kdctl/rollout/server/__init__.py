"""Completions from the servers that people serve with: vLLM, SGLang and llama-server."""
