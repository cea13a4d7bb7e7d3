"""Grammars: constraints on the text of an answer, compiled to automata over the model's tokens.

`Grammar` is the actor that finds out whether a constraint can be kept. The rank that draws the tokens compiles it too
(`GrammarCompiler`), because that is many times faster than handing over the automaton. The library behind it is one of
`backends`, loaded when it is first needed or, in a node, once before its processes are forked.
"""

from llm_runtime.actors.grammar.actor import Grammar, GrammarConfig
from llm_runtime.actors.grammar.backends import Backend, BackendName, Compiled, Matcher, load_backend, missing
from llm_runtime.actors.grammar.closing import closing
from llm_runtime.actors.grammar.compiler import GrammarCompiler
from llm_runtime.actors.grammar.errors import BadGrammar
from llm_runtime.actors.grammar.tokens import Tokens

__all__ = [
    "Backend",
    "BackendName",
    "BadGrammar",
    "Compiled",
    "Grammar",
    "GrammarCompiler",
    "GrammarConfig",
    "Matcher",
    "Tokens",
    "closing",
    "load_backend",
    "missing",
]
