"""A run's results as Markdown, which a terminal shows as well: targets first, then each table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Final

from benchmarks.catalogue import TITLES, Table, Workload, catalogue
from benchmarks.scale import Scale
from benchmarks.targets import Rounds, Target, targets

__all__ = ["number", "ratios", "report"]

_WHOLE: Final = 1000  # from here on a number has no decimals
_FOR_THE_FULL: Final = "The targets are meant for the sizes of a full run."


def number(value: float) -> str:
    """With three digits, or whole and with commas."""
    return f"{value:,.0f}" if abs(round(value)) >= _WHOLE else f"{value:.3g}"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))}–{number(max(values))})"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"| {' | '.join('-' * width for width in widths)} |"


def _conditions(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield (
        f"Linux {machine['kernel']}, {machine['architecture']}, {machine['processors']} processors"
        f" ({machine['model']}), {machine['memory_gib']} GiB; load {machine['load_before']} before"
        f" and {machine['load_after']} after; backend `{results['backend']['name']}`"
        f" ({results['backend']['reason']})."
    )
    yield ""
    yield ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + "."
    yield ""
    yield f"Scale {results['scale']['name']}, {results['seconds']:.0f} s, on {results['date']}."


def _target(target: Target, rounds: Rounds) -> list[str]:
    what = target.what
    for peer, title in TITLES.items():
        if what.endswith(f": {peer}"):
            what = what.removesuffix(peer) + title
    is_ratio = target.against is not None and target.relation == "×"
    unit = "×" if is_ratio else f" {target.unit}"
    bound = f"{target.sign} {number(target.bound)}{unit}"
    values = target.values(rounds)
    if not values:
        return [target.item, what, "not measured", bound, ""]
    verdict = "met" if target.is_met(values) else "missed"
    return [target.item, what, f"{_spread(values)}{unit}", bound, verdict]


def _table(workload: Workload, table: Table, rounds: Rounds) -> Iterator[str]:
    measured = rounds.get(workload.name, {})
    ours = measured.get("aioreap", {})
    rows = [[table.unit, *table.columns.values()]]
    for peer in workload.peers:
        row = [TITLES[peer]]
        for name in table.columns:
            values = measured.get(peer, {}).get(name)
            if not values:
                row.append("–")
                continue
            ratios = [
                mine / other
                for mine, other in zip(ours.get(name, []), values, strict=False)
                if other
            ]
            against = (
                f"{number(statistics.median(ratios))}×: " if ratios and peer != "aioreap" else ""
            )
            row.append(against + _spread(values))
        rows.append(row)
    yield f"### ({workload.item}) {table.title}"
    yield ""
    yield from _aligned(rows)
    yield ""


def ratios(results: Mapping[str, Any]) -> str:
    """Those targets that are ratios, for a machine whose times mean nothing."""
    scale = Scale(**results["scale"])
    rows = [["", "aioreap's figure against that of", "median (least–most)", "target", ""]]
    rows += [
        _target(target, results["rounds"])
        for target in targets(scale)
        if target.against is not None and target.relation == "×"
    ]
    return "\n".join([*_conditions(results), "", *_aligned(rows), "", _FOR_THE_FULL, ""])


def report(results: Mapping[str, Any]) -> str:
    """All of it."""
    scale = Scale(**results["scale"])
    rounds: Rounds = results["rounds"]
    lines = [*_conditions(results), "", "### Targets", ""]
    rows = [["", "aioreap's figure against that of", "median (least–most)", "target", ""]]
    rows += [_target(target, rounds) for target in targets(scale)]
    lines += [*_aligned(rows), ""]
    if scale.name != "full":
        lines += [_FOR_THE_FULL, ""]
    lines += [
        "In the tables: the median of the rounds (least–most), and before it by how much aioreap's",
        "figure is that of the peer.",
        "",
    ]
    for workload in catalogue(scale):
        for table in workload.tables:
            lines += _table(workload, table, rounds)
    for what, reason in results["unavailable"].items():
        lines.append(f"Not measured: {what}: {reason}.")
    return "\n".join(lines).rstrip("\n") + "\n"
