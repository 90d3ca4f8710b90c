"""A program that first imports aioreap in a thread, and then has children everywhere.

imports.py LOOP
"""

from __future__ import annotations

import sys
import threading


def use() -> None:
    import asyncio  # noqa: PLC0415

    from loops import LOOPS  # noqa: PLC0415

    import aioreap  # noqa: PLC0415

    async def main() -> None:
        process = await aioreap.create_subprocess_exec(
            "sh", "-c", "cat; exit 3", stdin=-1, stdout=-1
        )
        assert await process.communicate(b"in") == (b"in", None)
        assert process.returncode == 3

    with asyncio.Runner(loop_factory=LOOPS[sys.argv[1]]) as runner:
        runner.run(main())
    print(threading.current_thread().name)


assert not {"asyncio", "aioreap"} & sys.modules.keys()
for name in ("first", "second"):
    thread = threading.Thread(target=use, name=name)
    thread.start()
    thread.join()
    if name == "first":
        use()
