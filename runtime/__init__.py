"""The top of the house: topology files, models, the supervision tree of a node, the command line, and `LLM`."""
