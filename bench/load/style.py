"""What all figures share: colours, lines, captions, files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display is needed or looked for
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.load.results import ServerInfo

COLD, RESUMED, DECODE = "#d1495b", "#edae49", "#30638e"
_KIND_COLORS = ("#30638e", "#d1495b", "#5c8001", "#8d5a97", "#c17817", "#3a7d7c")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "h", "p", "8")
"""All of them have room for a number."""


class Styles:
    """A colour for each kind of server, a line and a marker for each setting of a kind."""

    def __init__(self, servers: Sequence[ServerInfo]) -> None:
        self._kinds = list(dict.fromkeys(server.kind for server in servers))
        self._settings: dict[str, int] = {}
        for kind in self._kinds:
            for index, server in enumerate(s for s in servers if s.kind == kind):
                self._settings[server.name] = index

    def color(self, server: ServerInfo) -> str:
        return _KIND_COLORS[self._kinds.index(server.kind) % len(_KIND_COLORS)]

    def line(self, server: ServerInfo) -> str:
        return _LINES[self._settings[server.name] % len(_LINES)]

    def marker(self, server: ServerInfo) -> str:
        return _MARKERS[self._kinds.index(server.kind) % len(_MARKERS)]

    def alpha(self, server: ServerInfo) -> float:
        """Settings of a kind beyond the four lines get paler."""
        return max(0.35, 1.0 - 0.3 * (self._settings[server.name] // len(_LINES)))


def plain_numbers(axis: Axis, steps: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Labels such as 20, 50, 100, 1,000 on a logarithmic axis instead of powers of ten: `steps` in each decade."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def add_caption(figure: Figure, text: str) -> None:
    """The conditions, below the figure, in lines that fit its width."""
    width = int(figure.get_figwidth() * 16)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), fontsize=8, color="0.35")


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG and lets go of the figure."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def file_name(text: str) -> str:
    """The text in letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
