"""Ollama's protocol: chat and generate in JSON lines, and what there is of models."""
