"""How good are samples, and which solver makes them best: evaluate, compare and demo.

The heavy libraries are imported when a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdeflow.plugins import Factory, hookimpl


@hookimpl
def sdeflow_commands() -> Mapping[str, Factory]:
    from ..demo import demo
    from .command import compare, evaluate

    return {"compare": compare, "demo": demo, "evaluate": evaluate}
