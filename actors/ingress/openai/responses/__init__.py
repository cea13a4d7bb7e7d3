"""OpenAI's responses, which are stored for a while."""
