"""Nodes that a program starts for itself, and the use of a model from Python without a server to look after."""
