"""Processes that are given up: Detached with all that they have, spawn_detached() at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from dataclasses import dataclass, field
from typing import Any, Unpack, cast

from aioreap.killing import raise_again
from aioreap.launch import Launch, Launcher
from aioreap.options import Options, Stdio, StrOrBytesPath, take_binary
from aioreap.spawn import SpawnPlan
from aioreap.unowned import Heir, is_child
from aioreap.watcher import Child

__all__ = ["Detached", "spawn_detached"]


@dataclass(frozen=True, slots=True)
class Detached:
    """A process and what belongs to it, given up by whoever had it; nothing watches over these.

    Its descriptors belong to whoever has it. One made by hand, of a pidfd that came from
    elsewhere, is as good for attach() and ``aioreap.handover`` as that of Process.detach().

    Attributes:
        pid: its process id.
        pidfd: the pidfd that came from its clone. If the child was made with
            CLONE_PIDFD_AUTOKILL, the kernel kills it when the last copy of this is closed.
        stdin, stdout, stderr: our ends of its pipes, None where there is none or it has ended.
        unread_stdout, unread_stderr: what was read of them, and by nobody taken.
        autoreap: whether it is not for its holder to reap: it was made with CLONE_AUTOREAP, or
            is somebody else's child.
        leads_group: whether it was started as the leader of a process group of its own.
        started_ns: ``time.monotonic_ns()`` when it was cloned, None if nobody has said.
    """

    pid: int
    pidfd: int
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    unread_stdout: bytes = b""
    unread_stderr: bytes = b""
    started_ns: int | None = None
    autoreap: bool = False
    leads_group: bool = False
    # What goes on reaping it in this process: it knows the status after that.
    heir: Heir | None = field(default=None, repr=False, compare=False, kw_only=True)

    @property
    def descriptors(self) -> list[int]:
        """All that it has, the pidfd first."""
        stdio = (self.stdin, self.stdout, self.stderr)
        return [self.pidfd, *(d for d in stdio if d is not None)]


def _give_up(child: Child, loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        child.check_detachable()
        # Where this process is a subreaper: else init reaps it, or the kernel.
        heir = child.has_to_be_reaped and is_child(child.pidfd)
        if heir:
            Heir.of(child, loop)
        os.close(child.detach())


async def _run(launch: Launch, loop: asyncio.AbstractEventLoop) -> Child:
    try:
        return await launch.started()
    except BaseException as error:
        if loop.is_closed() or not isinstance(error, (Exception, asyncio.CancelledError)):
            launch.destroy()
        else:
            raise_again(await launch.abort())
        raise


async def spawn_detached(
    program: StrOrBytesPath,
    *args: StrOrBytesPath,
    stdin: Stdio = subprocess.DEVNULL,
    stdout: Stdio = subprocess.DEVNULL,
    stderr: Stdio = subprocess.DEVNULL,
    **options: Unpack[Options],
) -> int:
    """Start a program that is to be nobody's, and return its pid, for information.

    It leads a session of its own, unless ``start_new_session=False`` or a ``process_group`` is
    given, lives as long as it wants, and leaves no zombie: it is auto-reaped (Linux 7.1), and
    otherwise made by another child that ends at once, so that init reaps it, or the next
    subreaper. Where that is this very process, its loop does, and after that loop the next spawn.

    stdin, stdout and stderr are /dev/null unless given; None is inherited. `options` are
    those of create_subprocess_exec(), with its errors, which are raised as long as the
    program has not started; cancelled until then, the child is killed.

    Raises:
        ValueError: PIPE is given: nobody would have its other end; or autokill.
        OSError, ValueError, TypeError, LookupError, subprocess.SubprocessError: as
            create_subprocess_exec().
    """
    if subprocess.PIPE in (stdin, stdout, stderr):
        raise ValueError("PIPE cannot be used: nobody would have the other end")
    if options.get("autokill"):
        raise ValueError("autokill cannot be used: nobody would hold the process")
    given: dict[str, Any] = {"start_new_session": options.get("process_group") is None, **options}
    take_binary(given, shell=False)
    loop = asyncio.get_running_loop()
    plan = SpawnPlan.of(
        (program, *args),
        (stdin, stdout, stderr),
        cast("Options", given),
        shell=False,
    )
    plan.detached = True
    launch = Launcher.of(loop).begin(plan)
    child = await _run(launch, loop)
    _give_up(child, loop)
    return child.pid
