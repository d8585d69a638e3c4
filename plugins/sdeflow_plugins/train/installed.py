"""Whether the plugins that a recipe names are there, and which distributions offer them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sdeflow.errors import PluginError, UnknownNameError
from sdeflow.plugins import plugins

from .recipe import Recipe

PLUGINS = {"data": "dataset", "network": "network", "sde": "sde"}
"""The options of a recipe that name plugins, and their kinds."""


def check_installed(
    recipe: Recipe,
    options: Iterable[str] = tuple(PLUGINS),
    origins: Callable[[], dict[str, str]] = dict,
) -> None:
    """One error for all plugins of a recipe that are not there.

    origins: called then; the distributions that offered them, by option.
    """
    problems: list[PluginError] = []
    for option in options:
        try:
            plugins().find(PLUGINS[option], getattr(recipe, option))
        except PluginError as error:
            problems.append(error)
            if origin := origins().get(option):
                problems[-1] = UnknownNameError(
                    f"{error}. The run was trained with that of {origin}"
                )
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n  - {error}" for error in problems)
        raise UnknownNameError(f"the recipe names plugins that are not installed:{lines}")


def origins(recipe: Recipe) -> dict[str, str]:
    """The distribution that offers each plugin of the recipe."""
    return {
        option: plugins().find(kind, getattr(recipe, option)).distribution
        for option, kind in PLUGINS.items()
    }


def is_ink(recipe: Recipe) -> bool:
    """Whether images of the recipe's data set are drawn dark on light."""
    factory = plugins().find("dataset", recipe.data).factory
    return bool(getattr(factory, "ink", False))
