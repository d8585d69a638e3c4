"""Training and the image pipeline: the commands train, sample, compare and demo.

The heavy libraries are imported when a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdeflow.plugins import Factory, hookimpl


@hookimpl
def sdeflow_commands() -> Mapping[str, Factory]:
    from .commands import compare, sample, train
    from .demo import demo

    return {"train": train, "sample": sample, "compare": compare, "demo": demo}
