"""``python -m benchmarks.publish [RESULTS]``: docs/performance.svg and the tables beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.plot import draw
from benchmarks.report import ratios, report

_ROOT: Final = Path(__file__).parent.parent
_LATEST: Final = _ROOT / "benchmarks" / "results" / "latest.json"
_EMULATED: Final = _LATEST.with_name("emulated.json")
_DOCUMENT: Final = _ROOT / "docs" / "performance.md"
_MARK: Final = "<!-- From here on written by `make bench-plot`. -->\n"


def main(file: Path) -> None:
    """Draw the plot of one run, and put its report behind the mark in docs/performance.md.

    With it go the ratios of the last run on an emulated kernel, if there is one.
    """
    if not file.exists():
        raise SystemExit(f"there is no {file}: make bench writes it")
    results: dict[str, Any] = json.loads(file.read_text())
    draw(results, _DOCUMENT.with_suffix(".svg"))
    before, mark, _ = _DOCUMENT.read_text().partition(_MARK)
    if not mark:
        raise SystemExit(f"{_DOCUMENT} has no line {_MARK}")
    text = f"{before}{mark}\n{report(results)}"
    if _EMULATED.exists():
        emulated = ratios(json.loads(_EMULATED.read_text()))
        text += f"\n### On an emulated kernel with CLONE_AUTOREAP\n\n{emulated}"
    _DOCUMENT.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else _LATEST)
