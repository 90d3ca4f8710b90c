"""How a child is held, so that it dies when this process does, however that happens.

By its pidfd, with CLONE_PIDFD_AUTOKILL, or by PR_SET_PDEATHSIG. That one is the end of the
*thread* that made the child, so it is refused where that is not the main one.

A tree is held by its init, process 1 of a pid namespace of its own, which _spawn.c has.
The kernel kills what is in there when the init ends. It cannot die by the program's
signal, and so sends the program's wait status through a socket. The other way come signals
for the group that the program leads.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
from typing import Final, Literal, NamedTuple, TypeAlias

from aioreap import _clone, kernel

Held: TypeAlias = Literal["autokill", "pdeathsig"]

_STATUS: Final = struct.Struct("=i")
_CAP_SYS_ADMIN: Final = 1 << 21


def check(wanted: object) -> bool | Literal["tree"]:
    """The option autokill, checked."""
    if wanted == "tree":
        return "tree"
    if wanted not in (True, False):
        raise ValueError(f"autokill must be True, False or 'tree', not {wanted!r}")
    return bool(wanted)


def held_by(backend: kernel.Backend, *, autoreap: bool) -> Held:
    """What holds a child that this thread is about to make.

    Raises:
        OSError: ENOSYS if nothing can.
    """
    if autoreap and backend.features["autokill"].available:
        return "autokill"
    if threading.get_native_id() != os.getpid():
        raise OSError(
            errno.ENOSYS,
            "autokill off the main thread needs CLONE_PIDFD_AUTOKILL: PR_SET_PDEATHSIG would kill "
            f"the child when this thread ends; this is {backend.name}: {backend.reason}",
        )
    return "pdeathsig"


class Hold(NamedTuple):
    """What one clone needs so that its child is held.

    Attributes:
        held: by what; None: it is not.
        clone_flags: what that adds to the clone's.
        status: our end of the socket that tells the status of a tree's program, or -1.
        status_there: its init's.
        parent: a pidfd of this process, for an init that is held by its parent's thread, or -1.
    """

    held: Held | None = None
    clone_flags: int = 0
    status: int = -1
    status_there: int = -1
    parent: int = -1

    @classmethod
    def of(cls, backend: kernel.Backend, *, autoreap: bool, tree: bool) -> Hold:
        """For a child that this thread is about to make. Its descriptors are the caller's."""
        held = held_by(backend, autoreap=autoreap)
        flags = kernel.CLONE_PIDFD_AUTOKILL if held == "autokill" else 0
        if not tree:
            return cls(held, flags)
        flags |= _namespaces()
        parent = os.pidfd_open(os.getpid()) if held == "pdeathsig" else -1
        try:
            ours, theirs = socket.socketpair()
        except BaseException:
            if parent >= 0:
                os.close(parent)
            raise
        return cls(held, flags, ours.detach(), theirs.detach(), parent)

    def descriptors(self) -> list[int]:
        """Those that are open."""
        return [d for d in (self.status, self.status_there, self.parent) if d >= 0]

    def lacks_capability(self, error: OSError, *, no_new_privs: bool) -> bool:
        """Whether the clone met `error` as the kernel has nobody else do without no_new_privs."""
        kills = self.clone_flags & kernel.CLONE_PIDFD_AUTOKILL
        return bool(kills) and not no_new_privs and error.errno == errno.EPERM

    def explain(self, error: OSError, *, no_new_privs: bool) -> OSError:
        """What the clone has met, and what was missing."""
        both = self.clone_flags & kernel.CLONE_NEWUSER
        namespaces = "pid and user namespaces" if both else "a pid namespace"
        if self.lacks_capability(error, no_new_privs=no_new_privs):
            why: str | None = "autokill and no_new_privs=False need CAP_SYS_ADMIN"
        elif self.clone_flags & kernel.CLONE_NEWPID:
            full = "there are as many as there may be, or they lie too deep"
            why = {
                errno.EPERM: "may not be made here (a filter of a container, a limit of its host)",
                errno.ENOSPC: full,
                errno.EUSERS: full,
                errno.EINVAL: "are unknown to this kernel",
            }.get(error.errno or 0)
            why = why and f"autokill='tree' needs {namespaces}: {why}"
        else:
            why = None
        return error if why is None else OSError(error.errno, f"{error.strerror}: {why}")


def at_step(step: int, error: int, hold: Hold) -> str:
    """What to say of a child's error before its exec, if holding it has to do with it."""
    if step == _clone.STEP_PARENT_DEATH and error == errno.EREMOTE:
        return ": autokill: this process and its children are in different pid namespaces"
    if step == _clone.STEP_USER_NAMESPACE:
        return ": autokill='tree': the ids of its user namespace cannot be set"
    changes_ids = step in (_clone.STEP_GROUPS, _clone.STEP_GID, _clone.STEP_UID)
    if changes_ids and hold.clone_flags & kernel.CLONE_NEWUSER:
        return ": autokill='tree' without CAP_SYS_ADMIN: no other user or group is in its namespace"
    return ""


NOT_HELD: Final = Hold()


def _namespaces() -> int:
    """The clone flags of a tree: who may not make a pid namespace may in a user namespace."""
    return kernel.CLONE_NEWPID | (0 if _has_cap_sys_admin() else kernel.CLONE_NEWUSER)


def _has_cap_sys_admin() -> bool:
    try:
        with open("/proc/thread-self/status", "rb") as status:
            for line in status:
                if line.startswith(b"CapEff:"):
                    return bool(int(line.split()[1], 16) & _CAP_SYS_ADMIN)
    except OSError:
        pass
    return os.geteuid() == 0


def ways(backend: kernel.Backend) -> dict[str, kernel.Feature]:
    """What each kind of autokill would do here, with no process made; for a report."""
    if backend.name == "autoreap" and backend.features["autokill"].available:
        alone = kernel.Feature(True, "yes, by CLONE_PIDFD_AUTOKILL")
    else:
        alone = kernel.Feature(True, "yes, by PR_SET_PDEATHSIG: from the main thread")
    try:
        need_a_tree(backend, preexec_fn=False)
    except OSError as error:
        return {"autokill=True": alone, "autokill=tree": kernel.Feature(False, f"no ({error})")}
    flags = _namespaces()
    error_number = _clone.probe(flags, backend.legacy_clone)
    if error_number == errno.EFAULT:
        user = " and CLONE_NEWUSER" if flags & kernel.CLONE_NEWUSER else ""
        tree = kernel.Feature(True, f"{alone.answer}, with CLONE_NEWPID{user}")
    else:
        refused = OSError(error_number, os.strerror(error_number))
        why = Hold(None, flags).explain(refused, no_new_privs=True)
        tree = kernel.Feature(False, f"no ({why})")
    return {"autokill=True": alone, "autokill=tree": tree}


def status_of_program(descriptor: int, of_init: kernel.ExitStatus) -> kernel.ExitStatus:
    """How the program ended, if the init has told; else as the init, which was killed before.

    It can be asked again, in a forked copy of this process too.
    """
    told = socket.socket(fileno=descriptor)
    try:
        message = told.recv(_STATUS.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        message = b""
    finally:
        told.detach()
    if len(message) < _STATUS.size:
        return of_init
    return _STATUS.unpack(message)[0], of_init[1]


def signal_group(descriptor: int, pidfd: int, number: int) -> bool:
    """Have an init signal the group that its program leads; whether the init is there.

    Its pidfd reaches the init's own group alone.

    Raises:
        PermissionError: as for kill(2).
    """
    told = socket.socket(fileno=descriptor)
    try:
        told.send(_STATUS.pack(number), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        signal.pidfd_send_signal(pidfd, _clone.SIGNAL_GROUP)
    except (ConnectionError, ProcessLookupError):
        return False
    finally:
        told.detach()
    return True


def need_a_tree(backend: kernel.Backend, *, preexec_fn: bool) -> None:
    """Check that a tree can be made here.

    Raises:
        OSError: ENOSYS, as it cannot.
        ValueError: not with preexec_fn.
    """
    if preexec_fn:
        raise ValueError("preexec_fn is not supported with autokill='tree'")
    if backend.name == "popen":
        raise OSError(
            errno.ENOSYS,
            f"autokill='tree' needs backend autoreap or pidfd; this is popen: {backend.reason}",
        )
    if not _clone.CAN_SHARE_MEMORY:
        raise OSError(errno.ENOSYS, f"autokill='tree' is not there on {os.uname().machine}")
