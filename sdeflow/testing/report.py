"""Reports: what was checked, whether it held, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import SdeflowError


class CheckFailed(SdeflowError):
    """A check of the conformance kit failed; the message is its report."""


class Check(NamedTuple):
    """One thing that was checked: its name, whether it held, the figure and the rule."""

    name: str
    passed: bool
    detail: str = ""


@dataclass
class Report:
    """The checks of one object. `print` shows the table; `ok` says whether all of them held."""

    title: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, by name: for tables over many objects."""

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if not check.passed]

    def run(self, name: str, check: Callable[[], Iterable[Check]]) -> None:
        """Add the outcome of one group of checks; an exception in it is a failure of it."""
        try:
            self.checks.extend(check())
        except Exception as error:
            self.checks.append(Check(name, False, f"{type(error).__name__}: {error}"))

    def raise_if_failed(self) -> None:
        """Raise a CheckFailed with the report if anything did not hold."""
        if not self.ok:
            raise CheckFailed(str(self))

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            verdict = "ok  " if check.passed else "FAIL"
            lines.append(f"  {verdict}  {check.name:<{width}}  {check.detail}".rstrip())
        verdict = "passed" if self.ok else f"FAILED ({len(self.failures)} of {len(self.checks)})"
        return "\n".join([self.title, *lines, f"  {verdict}"])
