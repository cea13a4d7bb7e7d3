"""The top of the house: topology files, models, the supervision tree of a node, and the command line."""
