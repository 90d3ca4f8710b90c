"""``python -m aioreap``: which backend is in force here, why, and what the kernel offers.

``python -m aioreap init -- program``: a container's init. See init.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from aioreap import init
from aioreap.hold import ways
from aioreap.kernel import Backend, backend


def _table(found: Backend) -> str:
    rows = {**found.features, **ways(found)}
    width = max(map(len, rows))
    lines = [
        f"backend  {found.name}",
        f"reason   {found.reason}",
        f"kernel   {os.uname().release} {os.uname().machine}",
        "",
        f"{'feature':<{width}}  answer",
        f"{'-' * width}  ------",
    ]
    lines += [f"{name:<{width}}  {feature.answer}" for name, feature in rows.items()]
    return "\n".join(lines)


def _document(found: Backend) -> str:
    features = {name: asdict(feature) for name, feature in found.features.items()}
    held = {name: asdict(feature) for name, feature in ways(found).items()}
    return json.dumps(
        {
            "backend": found.name,
            "reason": found.reason,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "features": features,
            "ways": held,
        },
        indent=2,
    )


def _report(*, as_json: bool) -> int:
    try:
        found = backend()
    except (OSError, ValueError) as error:
        print(f"aioreap: {error}", file=sys.stderr)
        return 1
    print(_document(found) if as_json else _table(found))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Print the report, 1 if there is no usable backend; or be an init."""
    parser = argparse.ArgumentParser(
        prog="python -m aioreap",
        description="Print which backend is in force here, why, and what the kernel offers.",
    )
    parser.add_argument("--json", action="store_true", help="print it for a program")
    commands = parser.add_subparsers(dest="what", metavar="init")
    init_parser = commands.add_parser(
        "init",
        help="be a container's init",
        usage="%(prog)s [-h] [-g] [--] program [argument ...]",
        description="Run a program as a container's init: pass signals and its exit status on, "
        "and reap orphans.",
    )
    init_parser.add_argument(
        "-g", "--group", action="store_true", help="send signals to the program's process group"
    )
    init_parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.what is None:
        return _report(as_json=options.json)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        init_parser.error("a program to run is needed")
    return init.run(command, to_group=options.group)


if __name__ == "__main__":
    sys.exit(main())
