"""The command line: `list` and `check`, and a subcommand for each function that a plugin offers.

The signature of a command is its options, its docstring is its help. jsonargparse reads both.
"""

from __future__ import annotations

import argparse
import inspect
import keyword
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .errors import PluginError, SdeflowError, one_of
from .plugins import KINDS, Entry, Plugins, PluginWarning, plugins
from .testing.command import check

OK, FAILED, INTERRUPTED = 0, 2, 130


def list_plugins(kind: str = "", options: bool = False) -> None:
    """List every SDE, solver, grid, network, data set and command, and who offers it.

    Under a name stand the other names that it is found by. Plugins that could not be loaded, and
    names that two of them claim, stand at the end.

    Args:
        kind: only this one: sde, solver, grid, network, dataset, preset or command.
        options: also print the options of each, with their defaults.
    """
    kinds = [one_of("kind", kind, KINDS)] if kind else list(KINDS)
    found = _loaded()
    for each in kinds:
        entries, aliases = found.entries(each), found.aliases(each)
        if each == "command":
            entries += [Entry(each, name, command, "sdeflow") for name, command in CORE.items()]
        print(f"{each}s" if each != "sde" else "SDEs")
        width = max((len(entry.name) for entry in entries), default=0) + 2
        owners = max((len(entry.distribution) for entry in entries), default=0) + 2
        for entry in sorted(entries, key=lambda e: e.name):
            print(f"  {entry.name:<{width}}{entry.distribution:<{owners}}{entry.summary}")
            text = _options(entry.factory) if options else ""
            others = sorted(also for also, name in aliases.items() if name == entry.name)
            for note in (text, "also: " + ", ".join(others) if others else ""):
                if note:
                    print(textwrap.indent(textwrap.fill(note, 88), " " * (width + owners + 2)))
        print()
    for line in _troubles(found):
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or what the command returns (`check`: 1
    where something failed), 2 for an error, 130 for Ctrl-C."""
    try:
        found = _loaded()
        for line in _troubles(found):
            print(f"warning: {line}", file=sys.stderr)
        command, values = _parse(_commands(found), argv)
        status = _call(command, values)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (SdeflowError, OSError) as error:
        print(f"sdeflow: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nsdeflow: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status if isinstance(status, int) else OK


def _call(command: Callable[..., Any], values: dict[str, Any]) -> Any:
    """The command called with its options, and with its `*names` one by one."""
    names = values.pop(_several(command), None) or ()
    for parameter in _reserved(command):
        values[parameter.name] = values.pop(parameter.name[:-1])
    return command(*names, **values)


def _several(command: Callable[..., Any]) -> str:
    """The name of a parameter `*names`, if the command has one."""
    parameters = inspect.signature(command).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")


def _reserved(command: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters such as `class_`, whose option is the word that Python reserves: --class."""
    names = inspect.signature(command).parameters
    found = [name for name in names if name.endswith("_") and keyword.iskeyword(name[:-1])]
    whole = inspect.signature(command, eval_str=True).parameters if found else names
    return [whole[name] for name in found]


def _parse(
    commands: dict[str, Callable[..., Any]], argv: Sequence[str] | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(command, its arguments) as the command line says."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise PluginError(
            "the command line needs jsonargparse; pip install 'sdeflow[images]'"
        ) from error

    parser = ArgumentParser(
        prog="sdeflow",
        description="SDEs and diffusion models: train, sample, compare. `sdeflow COMMAND --help` "
        "tells each command's options.",
        formatter_class=_help_format(),
    )
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        text = inspect.cleandoc(command.__doc__ or "")
        sub = ArgumentParser(
            description=text.split("\nArgs:")[0].strip(),
            formatter_class=_help_format(),
        )
        sub.add_argument(
            "--config", action="config", help="a YAML file of options; options after it win"
        )
        several = _several(command)
        if several:
            sub.add_argument(several, nargs="*", type=str, default=[], help=_told(several, text))
        reserved = _reserved(command)
        skip: set[str | int] = {several, *(p.name for p in reserved)}
        sub.add_function_arguments(command, as_positional=True, fail_untyped=False, skip=skip)
        for each in reserved:
            told = _told(each.name, text)
            option = f"--{each.name[:-1]}"
            sub.add_argument(option, type=each.annotation, default=each.default, help=told)
        subcommands.add_subcommand(name, sub, help=text.split("\n")[0])
    values = parser.parse_args(_with_flags(sys.argv[1:] if argv is None else argv, commands))
    chosen = values.subcommand
    options = values[chosen].as_dict()
    options.pop("config", None)
    return commands[chosen], options


def _told(name: str, text: str) -> str | None:
    """What a docstring's "Args:" say of a parameter."""
    found = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", text, re.MULTILINE)
    return found and " ".join(found[1].split())


def _with_flags(argv: Sequence[str], commands: dict[str, Callable[..., Any]]) -> list[str]:
    """The arguments, with "true" put after each switch that stands alone, such as --all."""
    command = next((commands[word] for word in argv if word in commands), None)
    parameters = inspect.signature(command).parameters.values() if command else ()
    switches = {
        f"--{p.name}": {"true", "false", "yes", "no", "0", "1", *_words(p.annotation)}
        for p in parameters
        if p.default is False
    }
    words = []
    for word, after in zip(argv, [*argv[1:], "-"], strict=True):
        words.append(word)
        if word in switches and after.lower() not in switches[word]:
            words.append("true")
    return words


def _words(annotation: Any) -> list[str]:
    """The words that a switch takes beside true and false: bool | Literal["auto"] takes auto."""
    return re.findall(r"""['"](\w+)['"]""", str(annotation))


def _help_format() -> type[argparse.HelpFormatter]:
    """jsonargparse's help, with the description's line breaks kept as they were written."""
    from jsonargparse import DefaultHelpFormatter

    class Kept(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        pass

    return Kept


def _commands(found: Plugins) -> dict[str, Callable[..., Any]]:
    """The core's commands and those of the plugins."""
    offered = {name: entry.factory for name, entry in found.catalogue("command").items()}
    return {**offered, **CORE}


CORE: dict[str, Callable[..., Any]] = {"list": list_plugins, "check": check}


def _loaded() -> Plugins:
    """The plugins, all hooks asked once, so that what is broken is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        found = plugins()
        for kind in KINDS:
            found.entries(kind)
    return found


def _troubles(found: Plugins) -> list[str]:
    """One line for each broken plugin and each name with two owners."""
    lines = [
        f"broken plugin {broken.plugin}: {type(broken.error).__name__}: {broken.error}"
        for broken in found.broken
    ]
    for kind in KINDS:
        owners: dict[str, list[str]] = {}
        for entry in found.entries(kind):
            owners.setdefault(entry.name, []).append(entry.distribution)
        lines += [
            f"conflict: {kind} {name!r} is offered by {' and '.join(sorted(claims))}"
            for name, claims in owners.items()
            if len(claims) > 1
        ]
    return lines


def _options(factory: Callable[..., Any]) -> str:
    """The parameters of a factory with their defaults, in one line."""
    shown = []
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        given = parameter.default is not parameter.empty
        shown.append(f"{parameter.name}={parameter.default!r}" if given else parameter.name)
    return ", ".join(shown)


if __name__ == "__main__":
    sys.exit(main())
