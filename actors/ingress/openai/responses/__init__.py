"""OpenAI's responses, without a memory: nothing is kept after an answer."""
