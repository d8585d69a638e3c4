"""Training by denoising score matching: the command train.

The heavy libraries are imported when a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdeflow.plugins import Factory, hookimpl


@hookimpl
def sdeflow_commands() -> Mapping[str, Factory]:
    from .command import train

    return {"train": train}
