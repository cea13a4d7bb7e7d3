"""What is asked of models that embed or classify, in the shapes of vLLM, Jina and Cohere."""
