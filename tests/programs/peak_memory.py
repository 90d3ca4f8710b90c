"""Says how much memory it takes to collect an output, as a multiple of that."""

import asyncio
import re

import aioreap

SIZE = 128 * 2**20


def peak() -> int:
    with open("/proc/self/status") as file:
        found = re.search(r"VmHWM:\s*(\d+) kB", file.read())
    assert found is not None
    return int(found[1]) * 1024


async def main() -> None:
    writer = ["head", "-c", str(SIZE), "/dev/zero"]
    process = await aioreap.create_subprocess_exec(*writer, stdout=aioreap.PIPE)
    before = peak()
    output, _ = await process.communicate()
    assert len(output) == SIZE
    print((peak() - before) / SIZE)


asyncio.run(main())
