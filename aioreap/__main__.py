"""``python -m aioreap``: which backend is in force here, why, and what the kernel offers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from aioreap.kernel import Backend, backend


def _table(found: Backend) -> str:
    width = max(map(len, found.features))
    lines = [
        f"backend  {found.name}",
        f"reason   {found.reason}",
        f"kernel   {os.uname().release} {os.uname().machine}",
        "",
        f"{'feature':<{width}}  answer",
        f"{'-' * width}  ------",
    ]
    lines += [f"{name:<{width}}  {feature.answer}" for name, feature in found.features.items()]
    return "\n".join(lines)


def _document(found: Backend) -> str:
    features = {name: asdict(feature) for name, feature in found.features.items()}
    return json.dumps(
        {
            "backend": found.name,
            "reason": found.reason,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "features": features,
        },
        indent=2,
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if there is no usable backend."""
    parser = argparse.ArgumentParser(prog="python -m aioreap", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for a program")
    options = parser.parse_args(arguments)
    try:
        found = backend()
    except (OSError, ValueError) as error:
        print(f"aioreap: {error}", file=sys.stderr)
        return 1
    print(_document(found) if options.json else _table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
