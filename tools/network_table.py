"""docs/networks.md, from the table of the plugin `network_presets`: python tools/network_table.py

A test holds the committed file to what this prints. benchmarks/networks.py measures the figures.
"""

from __future__ import annotations

from pathlib import Path

from sdeflow_plugins.networks.presets import NETWORK_PRESETS

FILE = Path(__file__).parents[1] / "docs" / "networks.md"
COLUMNS = ("preset", "network", "a sample", "parameters", "batch", "CPU", "GPU", "options", "for")
MARK = "<!-- presets -->"


def table() -> str:
    """A row for each preset, the columns padded to one width."""
    rows = [COLUMNS]
    for name, preset in NETWORK_PRESETS.items():
        kind = preset.network.__module__.rpartition(".")[2]
        options = ", ".join(f"{k}={v}" for k, v in preset.options.items())
        rows.append(
            (
                f"`{name}`",
                f"`{kind}`",
                " x ".join(map(str, preset.shape)),
                f"{preset.parameters:,}",
                str(preset.batch),
                _rate(preset.cpu),
                _rate(preset.gpu),
                f"`{options}`",
                preset.source,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    cells = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *lines[1:]])


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def page() -> str:
    """The whole of docs/networks.md: its text, and the table between the two marks."""
    head, _, rest = FILE.read_text(encoding="utf-8").partition(f"{MARK}\n")
    return f"{head}{MARK}\n{table()}\n{MARK}\n{rest.partition(f'{MARK}{chr(10)}')[2]}"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
