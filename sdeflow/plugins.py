"""The plugin door: hook specifications, discovery, and `get(kind, name)`.

A distribution offers objects to sdeflow through the entry-point group `sdeflow`: each entry names
a module (or object) with functions marked `@hookimpl`. Bundled plugins use the same door.
pluggy finds them; it takes no part once a solver runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from .errors import ArgumentError, PluginError, SdeflowError, UnknownNameError, did_you_mean

GROUP = "sdeflow"
Factory = Callable[..., Any]

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class PluginWarning(UserWarning):
    """A plugin could not be loaded and was set aside."""


class Specs:
    """What a plugin may offer: each hook returns a mapping from name to factory.

    A factory is a class or function; `get(kind, name, **options)` calls it with the options. Names
    are lower snake case. A hook has no side effects, and imports nothing heavy: let the factory do
    that when it is called.
    """

    @hookspec
    def sdeflow_sdes(self) -> Mapping[str, Factory]:
        """name -> factory(**parameters) of a forward SDE."""

    @hookspec
    def sdeflow_solvers(self) -> Mapping[str, Factory]:
        """name -> factory(**options) of a Solver."""

    @hookspec
    def sdeflow_grids(self) -> Mapping[str, Factory]:
        """name -> grid(sde, n, **options) itself: a function to n + 1 times. Not called by get
        unless options are given, which it then binds."""

    @hookspec
    def sdeflow_networks(self) -> Mapping[str, Factory]:
        """name -> factory(shape, **options) of an nn.Module (x, t) -> tensor like x; `shape` is
        that of one sample."""

    @hookspec
    def sdeflow_datasets(self) -> Mapping[str, Factory]:
        """name -> factory(split="train" | "test", **options) of a torch Dataset of tensors in
        [-1, 1], all of one shape."""

    @hookspec
    def sdeflow_presets(self) -> Mapping[str, Factory]:
        """name -> factory() of a Preset: eta, solver, grid and steps under one name."""

    @hookspec
    def sdeflow_commands(self) -> Mapping[str, Factory]:
        """name -> function; its signature and docstring become a subcommand of `sdeflow`."""

    @hookspec
    def sdeflow_aliases(self) -> Mapping[str, Mapping[str, str]]:
        """kind -> {other name: name}: what else a thing is called. `get` understands both; the
        catalogue lists names alone, and a name goes before an alias."""


KINDS = {
    "sde": "sdeflow_sdes",
    "solver": "sdeflow_solvers",
    "grid": "sdeflow_grids",
    "network": "sdeflow_networks",
    "dataset": "sdeflow_datasets",
    "preset": "sdeflow_presets",
    "command": "sdeflow_commands",
}


@dataclass(frozen=True)
class Entry:
    """One named object and who offers it."""

    kind: str
    name: str
    factory: Factory
    distribution: str

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring; and what a partial one sets."""
        factory, settings = self.factory, ""
        if isinstance(factory, functools.partial) and factory.__doc__ == functools.partial.__doc__:
            bound = inspect.signature(factory.func).bind_partial(*factory.args, **factory.keywords)
            settings = ", ".join(f"{name}={value!r}" for name, value in bound.arguments.items())
            factory = factory.func
        first = (factory.__doc__ or "").strip().split("\n")[0]
        return f"{first} [{settings}]" if settings else first


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded, and why."""

    plugin: str
    error: BaseException


class Plugins:
    """The plugins of one process: a pluggy manager that quarantines what is broken."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(Specs)
        self.broken: list[Broken] = []
        self._owners: dict[str, str] = {}

    def load(self) -> Plugins:
        """Load every entry point of the group, one by one."""
        seen = set()
        for distribution in importlib.metadata.distributions():
            for entry in distribution.entry_points:
                owner = distribution.metadata["Name"]
                if entry.group != GROUP or (owner, entry.name, entry.value) in seen:
                    continue
                seen.add((owner, entry.name, entry.value))
                try:
                    self.register(entry.load(), f"{owner}:{entry.name}", owner)
                except (Exception, SystemExit) as error:  # a stranger's import may do anything
                    self._quarantine(f"{owner}:{entry.name}", error)
        return self

    def register(self, plugin: Any, name: str | None = None, owner: str = "this process") -> None:
        """Add a plugin object by hand, as a notebook or a test does."""
        name = name or f"{getattr(plugin, '__name__', type(plugin).__name__)}"
        if self.manager.has_plugin(name):
            raise PluginError(f"a plugin is already registered as {name!r}; choose another name")
        try:
            self.manager.register(plugin, name)
            self.manager.check_pending()
            if not self.manager.get_hookcallers(plugin):
                hooks = ", ".join([*KINDS.values(), "sdeflow_aliases"])
                raise PluginError(f"it offers nothing: mark one of {hooks} with @hookimpl")
        except Exception as error:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            raise PluginError(f"plugin {name!r} cannot be registered: {error}") from error
        self._owners[name] = owner

    def entries(self, kind: str) -> list[Entry]:
        """All that is offered of a kind, sorted by name; a name may stand there twice."""
        if kind not in KINDS:
            raise ArgumentError(f"kind={kind!r} is unknown{did_you_mean(kind, KINDS)}")
        found = []
        for implementation in getattr(self.manager.hook, KINDS[kind]).get_hookimpls():
            plugin = implementation.plugin_name
            if any(broken.plugin == plugin for broken in self.broken):
                continue
            try:
                offered = implementation.function()
                found += [
                    Entry(kind, _checked(name, factory), factory, self._owners[plugin])
                    for name, factory in offered.items()
                ]
            except Exception as error:
                self._quarantine(plugin, error)
        return sorted(found, key=lambda entry: entry.name)

    def catalogue(self, kind: str) -> dict[str, Entry]:
        """name -> entry for every name of a kind that has one owner."""
        entries = self.entries(kind)
        names = [entry.name for entry in entries]
        return {entry.name: entry for entry in entries if names.count(entry.name) == 1}

    def aliases(self, kind: str) -> dict[str, str]:
        """other name -> name, of a kind; of two plugins that differ the first counts, with a
        warning."""
        found: dict[str, str] = {}
        for implementation in self.manager.hook.sdeflow_aliases.get_hookimpls():
            plugin = implementation.plugin_name
            if any(broken.plugin == plugin for broken in self.broken):
                continue
            try:
                told: Any = implementation.function()
                offered = dict(told.get(kind, {}))
            except Exception as error:
                self._quarantine(plugin, error)
                continue
            for alias, name in offered.items():
                if found.setdefault(alias, name) != name:
                    warnings.warn(
                        f"{self._owners[plugin]} calls {kind} {name!r} {alias!r}, which is already "
                        f"another name of {found[alias]!r}; the first is kept",
                        PluginWarning,
                        stacklevel=3,
                    )
        return found

    def find(self, kind: str, name: str) -> Entry:
        """The one entry of that name, or an error that tells what is wrong."""
        entries = self.entries(kind)
        owners = [entry for entry in entries if entry.name == name]
        if len(owners) == 1:
            return owners[0]
        if owners:
            both = " and ".join(sorted(entry.distribution for entry in owners))
            raise PluginError(
                f"{kind} {name!r} is offered by {both}; uninstall one, or pass the object itself"
            )
        aliases, names = self.aliases(kind), {entry.name for entry in entries}
        if aliases.get(name) in names:
            return self.find(kind, aliases[name])
        known = names | {alias for alias, target in aliases.items() if target in names}
        message = f"{kind} {name!r} is unknown{did_you_mean(name, known)}"
        if not self.broken:
            raise UnknownNameError(message)
        reasons = "; ".join(
            f"{b.plugin} ({type(b.error).__name__}: {b.error})" for b in self.broken
        )
        raise UnknownNameError(
            f"{message}. These plugins failed to load and may have provided it: {reasons}"
        ) from self.broken[-1].error

    def _quarantine(self, plugin: str, error: BaseException) -> None:
        self.broken.append(Broken(plugin, error))
        warnings.warn(
            f"sdeflow plugin {plugin} is set aside: {type(error).__name__}: {error}",
            PluginWarning,
            stacklevel=4,
        )


def _checked(name: Any, factory: Any) -> str:
    if not isinstance(name, str) or not name or not callable(factory):
        raise PluginError(f"a hook must return name -> factory, not {name!r} -> {factory!r}")
    return name


@functools.cache
def plugins() -> Plugins:
    """The plugins installed beside sdeflow, loaded at the first call."""
    return Plugins().load()


def catalogue(kind: str) -> dict[str, Entry]:
    """name -> entry of a kind: "sde", "solver", "grid", "network", "dataset", "preset" or
    "command"."""
    return plugins().catalogue(kind)


def get(kind: str, name: str, **options: Any) -> Any:
    """The object of that kind and name, built with the options.

    A grid is a function already: it is returned as it is, with the options bound.
    """
    factory = plugins().find(kind, name).factory
    if kind in ("grid", "command"):
        return functools.partial(factory, **options) if options else factory
    try:
        return factory(**options)
    except TypeError as error:
        if isinstance(error, SdeflowError):
            raise
        raise ArgumentError(f"{kind} {name!r} cannot be built from {options!r}: {error}") from error
