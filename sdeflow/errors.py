"""The exception tree, and the few argument checks that every module shares.

Each message names the argument, its value or shape, the rule it broke and the remedy.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class SdeflowError(Exception):
    """The root of every error that sdeflow raises on purpose."""


class ArgumentError(SdeflowError, ValueError):
    """An argument has a value outside its rule."""


class ShapeError(ArgumentError):
    """A tensor has the wrong shape, dtype or device."""


class GridError(ArgumentError):
    """A time grid is not strictly monotone, not finite, or leaves the process's range."""


class PairingError(SdeflowError, TypeError):
    """A solver was paired with a process that it cannot integrate."""


class NonFiniteError(SdeflowError, ArithmeticError):
    """A NaN or an infinity arose; the message names the step and the time."""


class SolverError(SdeflowError, RuntimeError):
    """A solver gave up: too many steps, or a step size of zero."""


class PluginError(SdeflowError, RuntimeError):
    """A plugin is broken, or two plugins claim one name."""


class UnknownNameError(PluginError, LookupError):
    """No plugin provides an object of that name."""


def positive_int(name: str, value: Any) -> int:
    """`value` as an int >= 1; True, 2.5, 0, -1 and "ten" are refused by name."""
    number = whole(value)
    if number is None:
        kind = type(value).__name__
        raise ArgumentError(f"{name}={value!r} ({kind}) must be a whole number >= 1, such as 20")
    if number < 1:
        raise ArgumentError(f"{name}={number} must be at least 1, such as 20")
    return number


def whole(value: Any) -> int | None:
    """`value` as an int if it is a whole number of any library's; None for True, 2.0 and arrays."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """`value` if it is one of `options`; otherwise an error with the close matches."""
    options = list(options)
    if value not in options:
        raise ArgumentError(f"{name}={value!r} is unknown{did_you_mean(value, options)}")
    return str(value)


def all_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no infinity; one pass over x in the usual case."""
    return math.isfinite(float(x.detach().sum())) or bool(x.isfinite().all())


def did_you_mean(value: Any, options: Iterable[str]) -> str:
    """The tail of an unknown-name message: close matches first, then all there are."""
    options, asked = sorted(options), str(value).lower()
    close = [option for option in options if asked and asked in option][:3]
    close = close or difflib.get_close_matches(asked, options, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ";"
    return f"{hint} there are: {', '.join(options) or 'none'}"
