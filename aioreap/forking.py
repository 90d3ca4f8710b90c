"""The backend ``popen``: a child made by subprocess.Popen, which hands its own pidfd over.

A pidfd opened by the parent, from a pid, could belong to a stranger: a stray
``waitpid(-1)`` or an ignored SIGCHLD frees the pid as soon as the child exits.
So the child opens it, before its exec, and sends it through a socket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from aioreap import _clone

if TYPE_CHECKING:
    from aioreap.spawn import SpawnPlan

_REPORT: Final = struct.Struct("iii")  # step, errno, pid; that one comes with the pidfd


class _Popen(subprocess.Popen[bytes]):
    """A Popen that leaves its child alone once the pidfd stands for it."""

    def __del__(self) -> None:
        pass


def _lead(plan: SpawnPlan) -> None:
    if plan.new_session:
        os.setsid()
    if plan.process_group == 0:
        os.setpgid(0, 0)


def _in_child(plan: SpawnPlan, channel: socket.socket, cgroup_procs: int) -> Callable[[], None]:
    preexec_fn = plan.options.get("preexec_fn")
    parent = os.getpid() if plan.autokill else 0

    def prepare() -> None:
        step = _clone.STEP_START
        try:
            if plan.detached and os.fork():
                os._exit(0)
            step = _clone.STEP_SESSION
            if plan.detached:
                _lead(plan)
            step = _clone.STEP_START
            pid = os.getpid()
            pidfd = os.pidfd_open(pid)
            step = _clone.STEP_CGROUP
            if cgroup_procs >= 0:
                os.write(cgroup_procs, b"0")
            step = _clone.STEP_NO_NEW_PRIVS
            if plan.no_new_privs:
                _clone.set_no_new_privs()
            step = _clone.STEP_PARENT_DEATH
            if plan.autokill:
                _clone.set_pdeathsig(parent)
        except OSError as error:
            channel.send(_REPORT.pack(step, error.errno or 0, 0))
            raise
        socket.send_fds(channel, [_REPORT.pack(0, 0, pid)], [pidfd])
        if preexec_fn is not None:
            preexec_fn()
            if plan.autokill:  # a change of the user clears it
                _clone.set_pdeathsig(parent)

    return prepare


def _popen_arguments(plan: SpawnPlan) -> dict[str, Any]:
    sources = {target: source for source, target in plan.descriptors}
    cwd: Any = plan.options.get("cwd")
    if plan.cwd_descriptor >= 0:
        cwd = os.path.join(b"/proc/self/fd/%d" % plan.cwd_descriptor, plan.cwd or b"")
    env = plan.options.get("env")
    if env is None and plan.envp is not None:  # frozen
        env = dict(variable.split(b"=", 1) for variable in plan.envp)
    return {
        "args": plan.arguments,
        "executable": plan.program,
        "stdin": sources.get(0),
        "stdout": sources.get(1),
        "stderr": sources.get(2),
        "close_fds": plan.close_fds,
        "pass_fds": [target for _, target in plan.descriptors if target not in (0, 1, 2)],
        "cwd": cwd,
        "env": env,
        "restore_signals": plan.restore_signals,
        "start_new_session": plan.new_session and not plan.detached,
        "process_group": None if plan.process_group < int(plan.detached) else plan.process_group,
        "user": None if plan.uid < 0 else plan.uid,
        "group": None if plan.gid < 0 else plan.gid,
        "extra_groups": plan.groups,
        "umask": plan.umask,
    }


def spawn(plan: SpawnPlan) -> tuple[int, int]:
    """Make the child of SpawnPlan.clone(), and return its pid and pidfd when its program runs.

    A detached one is made by another child, which is gone at the return.

    Raises:
        OSError, subprocess.SubprocessError: as subprocess.Popen; there is no child.
    """
    cgroup_procs = plan.open_cgroup_procs() if plan.cgroup >= 0 else -1
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with ours, theirs:
        room = os.dup(ours.fileno())  # for the pidfd: EMFILE while there is no child
        prepare = _in_child(plan, theirs, cgroup_procs)
        try:
            process = _Popen(preexec_fn=prepare, **_popen_arguments(plan))
        except subprocess.SubprocessError:
            step, number = _report_of_failure(ours, reap=plan.detached)
            if number:
                raise plan.error_for(step, number) from None
            raise
        except OSError as error:
            _report_of_failure(ours, reap=plan.detached)
            if error.filename is not None and plan.cwd_descriptor >= 0:
                error.filename = plan.options.get("cwd", error.filename)
            raise
        finally:
            os.close(room)
        theirs.close()
        ours.setblocking(False)
        message, pidfds, _, _ = socket.recv_fds(ours, _REPORT.size, 1)
        if not pidfds:  # killed before it could send it, or another thread took the room
            process.kill()
            process.wait()
            raise plan.error_for(_clone.STEP_START, errno.EMFILE if message else 0)
        os.set_inheritable(pidfds[0], False)
        if plan.detached:
            process.wait()
    return _REPORT.unpack(message)[2], pidfds[0]


def _report_of_failure(channel: socket.socket, *, reap: bool) -> tuple[int, int]:
    """The step and the errno of a child that could not be started, zeros if it did not say.

    With `reap`, it is waited for, if it came to this process as a subreaper.
    """
    channel.setblocking(False)
    try:
        message, pidfds, _, _ = socket.recv_fds(channel, _REPORT.size, 1)
    except BlockingIOError:  # it failed before it could send it
        return 0, 0
    for pidfd in pidfds:
        with contextlib.suppress(ChildProcessError):
            if reap:
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
    step, error, _ = _REPORT.unpack(message)
    return step, error
