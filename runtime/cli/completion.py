"""`runtime completion`: words that a shell offers after `runtime`, from the parsers of the commands."""

from __future__ import annotations

import argparse
import importlib

from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.shipped import topologies

_BASH = """\
_runtime() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    else
        case "$command" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "$word" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$word")) ;; esac
}}
complete -o filenames -F _runtime runtime
"""
_ZSH = "autoload -Uz bashcompinit && bashcompinit\n"
_HOW = {
    "bash": "echo 'eval \"$(runtime completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(runtime completion zsh)\"' >> ~/.zshrc    # after compinit",
    "fish": "runtime completion fish > ~/.config/fish/completions/runtime.fish",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=sorted(_HOW), help="bash, fish or zsh")
    parser.epilog = "examples:\n" + "\n".join(f"  {how}" for how in _HOW.values())


def run(options: argparse.Namespace) -> int:
    say(script(options.shell).rstrip("\n"))
    return 0


def script(shell: str) -> str:
    """The script of a shell."""
    from llm_runtime.runtime.cli import COMMANDS

    words = {command: _words(command) for command in COMMANDS}
    if shell == "fish":
        lines = ["complete -c runtime -n __fish_use_subcommand -f"]
        for command, summary in COMMANDS.items():
            lines.append(f"complete -c runtime -n __fish_use_subcommand -f -a {command} -d {_quoted(summary)}")
            inside = f'-n "__fish_seen_subcommand_from {command}"'
            for word in words[command]:
                option = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
                lines.append(f"complete -c runtime {inside} {option}")
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'            {command}) words="{" ".join(each)}" ;;' for command, each in words.items())
    return (_ZSH if shell == "zsh" else "") + _BASH.format(commands=" ".join(COMMANDS), cases=cases)


def _words(command: str) -> list[str]:
    """The options of a command, and the values of its arguments where they are known."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"llm_runtime.runtime.cli.{command}").configure(parser)
    words: list[str] = []
    for action in parser._actions:  # argparse has no public way to list them
        words += [option for option in action.option_strings if option.startswith("--")]
        if action.dest == "file":
            words += topologies()
        elif action.choices is not None and not action.option_strings:
            words += [str(each) for each in action.choices]
    return words


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"
