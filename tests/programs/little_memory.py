"""Collects more than there is memory for."""

import asyncio
import itertools
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import aioreap
from aioreap._clone import Output

MIB = 2**20


@contextmanager
def little_memory(more: int = 100 * MIB) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


async def raises(call: object) -> str:
    try:
        await call  # type: ignore[misc]
    except MemoryError:
        return "MemoryError"
    return "nothing"


async def end(process: aioreap.Process) -> None:
    process._transport.close()
    await process.wait()
    await process._transport.let_pipes_close()


async def communicate() -> None:
    process = await aioreap.create_subprocess_exec("yes", stdout=aioreap.PIPE)
    with little_memory():
        print(await raises(process.communicate()))
    print(process.poll())
    assert process.stdout is not None
    print(await raises(process.stdout.read(1)))
    await end(process)


async def cancel() -> None:
    """The output is there, and there is no memory to have it in the reader as well."""
    script = "head -c 60000000 /dev/zero; read line; echo tail"
    process = await aioreap.create_subprocess_shell(script, stdin=aioreap.PIPE, stdout=aioreap.PIPE)
    call = asyncio.ensure_future(process.communicate())
    await asyncio.sleep(0)
    collected = process._transport.get_protocol()._output  # type: ignore[attr-defined]
    while len(collected[1]) < 60_000_000:
        await asyncio.sleep(0)
    with little_memory(40 * MIB):
        call.cancel()
        await asyncio.wait([call])
    print(call.cancelled())
    print(await raises(process.communicate()))
    await end(process)


async def run() -> None:
    with little_memory():
        print(await raises(aioreap.run_process(["yes"], stdout=aioreap.PIPE)))


async def run_with_a_limit() -> None:
    call = aioreap.run_process(["yes"], stdout=aioreap.PIPE, output_limit=200 * MIB)
    with little_memory():
        print(await raises(call))


async def output() -> None:
    collected = Output()
    chunk = bytes(MIB)
    with little_memory():
        try:
            for number in itertools.count(1):
                assert collected.write(chunk) == number * MIB
        except MemoryError:
            print(len(collected))
    for again in (lambda: collected.write(b"x"), collected.take):
        try:
            again()
        except MemoryError:
            print("MemoryError")
    print(collected.write(b"x"), collected.take())


async def main() -> None:
    await (await aioreap.create_subprocess_exec("true")).wait()  # what is imported on demand
    await globals()[sys.argv[1]]()


asyncio.run(main())
