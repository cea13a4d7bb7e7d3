"""Grammars: constraints on the text of an answer, compiled to automata over the model's tokens.

`Grammar` is the actor that finds out whether a constraint can be kept. The rank that draws the tokens compiles it too
(`Workshop`), because that is many times faster than handing over the automaton. The library behind it is xgrammar,
loaded when it is first needed.
"""

from actors.grammar.actor import Grammar, GrammarConfig
from actors.grammar.compiler import GrammarCompiler, Tokens, load_tokens
from actors.grammar.errors import BadGrammar
from actors.grammar.library import available, xgrammar
from actors.grammar.workshop import Workshop

__all__ = [
    "BadGrammar",
    "Grammar",
    "GrammarCompiler",
    "GrammarConfig",
    "Tokens",
    "Workshop",
    "available",
    "load_tokens",
    "xgrammar",
]
