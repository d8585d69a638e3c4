"""Objects by plugin name with options, as they stand on a command line or in a config file."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from sdeflow.errors import ArgumentError, did_you_mean
from sdeflow.plugins import Factory, get, plugins

Options = Mapping[str, Any]


def build(kind: str, name: str, options: Options | None = None, **given: Any) -> Any:
    """The object of that kind and name, its options checked against the factory's signature.

    kind: "sde", "solver", "grid", "network" or "dataset"; name: the plugin's.
    options: by name, as the user wrote them; unknown names and wrong types are errors.
    given: what the caller itself supplies, such as shape or split.
    """
    factory = plugins().find(kind, name).factory
    options = dict(options or {})
    known = option_names(factory) - set(given)
    if kind == "grid":  # called later, as grid(sde, n)
        known -= {"sde", "n", "u"}
    for option in options:
        if known and option not in known and "**" not in known:
            hint = did_you_mean(option, known)
            raise ArgumentError(f"{kind} {name!r} has no option {option!r}{hint}")
        if not known:
            raise ArgumentError(f"{kind} {name!r} takes no options; {option!r} was given")
    return get(kind, name, **given, **_typed(kind, name, factory, options))


def option_names(factory: Factory) -> set[str]:
    """The keyword parameters of a factory; "**" stands for "any other name as well".

    A wrapped function counts with the parameters of its wrapper and its own, where the two differ.
    """
    names: set[str] = set()
    for follow in (False, True):
        for parameter in inspect.signature(factory, follow_wrapped=follow).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                if not hasattr(factory, "__wrapped__"):
                    names.add("**")
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                names.add(parameter.name)
    return names


def _typed(kind: str, name: str, factory: Factory, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the types that the factory's annotations ask for."""
    if not options:
        return options
    from jsonargparse import ArgumentError as Refused
    from jsonargparse import ArgumentParser

    hints = _hints(factory)
    typed = dict(options)
    for option, value in options.items():
        if option not in hints:
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{option}", type=hints[option])
        try:
            typed[option] = parser.parse_object({option: value})[option]
        except Refused as error:
            reason = " ".join(str(error).split())
            raise ArgumentError(f"{kind} {name!r}: option {option}={value!r}: {reason}") from error
    return typed


def _hints(factory: Factory) -> dict[str, Any]:
    """The types of a factory's parameters, where they can be told."""
    while isinstance(factory, functools.partial):  # a preset
        factory = factory.func
    try:
        hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):
        return {}
    if hasattr(factory, "__wrapped__"):  # it carries the annotations of what it wraps
        own = inspect.signature(factory).parameters
        return {n: h for n, h in hints.items() if n in own and own[n].default is not own[n].empty}
    return hints
