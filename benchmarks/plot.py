"""The plot that the README shows: a run's main figures, peer by peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.catalogue import TITLES
from benchmarks.report import number
from benchmarks.scale import Scale
from benchmarks.targets import Rounds

__all__ = ["draw"]

_OURS: Final = "#1b7f79"
_OTHERS: Final = "#b4bcc4"
_INK: Final = "#30363d"
_STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "aioreap",  # the same results, the same file
    "svg.fonttype": "path",  # the same everywhere
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _OTHERS,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class _Panel:
    """One figure of one workload, the best peer on top: bars, or points on a log scale.

    Attributes:
        without: a peer whose figure cannot be compared.
    """

    title: str
    workload: str
    name: str
    more_is_better: bool = False
    without: str = ""


def _panels(scale: Scale) -> list[_Panel]:
    most, heap = max(scale.levels), max(scale.heaps)
    return [
        _Panel("children per second, 16 at a time", "spawn", "16", more_is_better=True),
        _Panel("the same, stdout captured", "capture", "16", more_is_better=True),
        _Panel(f"captured output, MiB/s, {scale.output} MiB", "communicate", "rate", True),
        # uvloop's timers can be early by more than aioreap's lag.
        _Panel(
            f"lag of a 1 ms timer, ms, {most} at a time, p50",
            "lag",
            "p50",
            without="aioreap-uvloop",
        ),
        _Panel(f"loop held by an exec of {scale.exec_seconds:g} s, ms", "slow_exec", "max"),
        _Panel(f"ms per child, {heap:g} GiB of heap", "heap", f"{heap:g}"),
    ]


def _draw_panel(axes: Axes, panel: _Panel, rounds: Rounds) -> None:
    # "calls" is a limit, and nobody's library.
    measured = {
        peer: figures[panel.name]
        for peer, figures in rounds.get(panel.workload, {}).items()
        if figures.get(panel.name) and peer not in ("calls", panel.without)
    }
    medians = {peer: statistics.median(values) for peer, values in measured.items()}
    peers = sorted(medians, key=medians.__getitem__, reverse=not panel.more_is_better)
    values = [medians[peer] for peer in peers]
    spread = [
        [medians[peer] - min(measured[peer]) for peer in peers],
        [max(measured[peer]) - medians[peer] for peer in peers],
    ]
    colors = [_OURS if peer.startswith("aioreap") else _OTHERS for peer in peers]
    titles = [TITLES[peer] for peer in peers]
    if panel.more_is_better:
        axes.barh(titles, values, color=colors)
        better = "more is better"
    else:
        axes.set_xscale("log")
        axes.grid(axis="x", color=_OTHERS, linewidth=0.4)
        axes.scatter(values, titles, s=60, c=colors, zorder=2)
        better = "less is better, log scale"
    axes.errorbar(values, titles, xerr=spread, fmt="none", ecolor=_INK, elinewidth=0.8, capsize=2)
    axes.set_title(f"{panel.title}\n({better})", fontsize=9, loc="left")
    # Behind the longest whisker there is room for the number.
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (1.25 if panel.more_is_better else (high / low) ** 0.25))
    for row, peer in enumerate(peers):
        axes.annotate(
            number(medians[peer]),
            (max(measured[peer]), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Draw one run's results into `file`, an SVG or a PNG."""
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(12, 6.6), layout="constrained", facecolor="white")
        panels = _panels(Scale(**results["scale"]))
        for axes, panel in zip(canvas.subplots(2, 3).flat, panels, strict=True):
            _draw_panel(axes, panel, results["rounds"])
        machine, versions = results["machine"], results["versions"]
        canvas.supxlabel(
            f"Medians of the rounds, whiskers from the least to the most."
            f" Linux {machine['kernel']}, {machine['processors']} processors,"
            f" CPython {versions['Python']}, backend {results['backend']['name']}.",
            fontsize=8,
        )
        canvas.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
