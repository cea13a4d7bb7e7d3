"""Parsers of a model's output: reasoning and tool calls in the formats that models are trained on.

A parser is a function of the text alone. It is given the text in pieces and gives events, which are the same whatever
the pieces were. So a stream says what an answer in one piece would say, and a worker that is started anew repeats it.
"""
