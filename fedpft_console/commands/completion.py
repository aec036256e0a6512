"""`fedpft completion`: a script that completes commands, options and keys in a shell."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_BASH = """\
# Completion of fedpft; made by `fedpft completion {shell}`.
_fedpft() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command="" i
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in
{commands}
    esac
  done
  if [ "$before" = -c ]; then
    compopt -o nospace 2>/dev/null
    COMPREPLY=($(compgen -W {keys} -S = -- "$word"))
    return
  fi
  case "$command" in
{options}
  esac
  [ ${{#COMPREPLY[@]}} -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _fedpft fedpft
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    main_parser: argparse.ArgumentParser,
) -> None:
    """Add the command to the parser.

    Args:
        commands: the subparsers of `fedpft`, to which `completion` is added.
        main_parser: the whole parser, whose commands and options are completed.
    """
    completion = commands.add_parser(
        "completion", help="print a script that completes commands, options and keys",
        description='In ~/.bashrc: eval "$(fedpft completion bash)"; in ~/.zshrc: '
        'eval "$(fedpft completion zsh)".',
    )  # fmt: skip
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(function=command, of=main_parser)


def command(args: argparse.Namespace, console: Console) -> int:
    """Print the script.

    Args:
        args: `shell`, and `of`, the parser of the whole command line.
        console: not used; the script goes to standard output as it is.

    Returns:
        The exit status, 0.
    """
    print(script(args.of, args.shell), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script.

    Args:
        parser: of the whole command line.
        shell: `bash` or `zsh`, which can run bash's completions.

    Returns:
        Shell code, which defines a function and names it for `fedpft`.
    """
    from fedpft_core import config

    found = _commands(parser)
    names = "\n".join(f"      {name}) command={name} ;;" for name in found)
    tops = [*found, *_options(parser)]
    cases = [f'    "") COMPREPLY=($(compgen -W {_words(tops)} -- "$word")) ;;']
    for name, sub in found.items():
        more = [*_commands(sub), *_choices(sub), *_options(sub)]
        # Where no option is begun, files are what most arguments are.
        fit = _words(more)
        cases.append(f'    {name}) COMPREPLY=($(compgen -W {fit} -- "$word")) ;;')
    made = _BASH.format(
        shell=shell, commands=names, keys=_words(list(config.keys())), options="\n".join(cases)
    )
    return _ZSH + made if shell == "zsh" else made


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Sub-commands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [
        option
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") or option == "-c"
    ]


def _choices(parser: argparse.ArgumentParser) -> list[str]:
    """What positional arguments may be, where that is a list."""
    return [
        str(choice)
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
        for choice in action.choices or ()
    ]


def _words(words: list[str]) -> str:
    return shlex.quote(" ".join(words))
