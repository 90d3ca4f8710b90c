"""What the kernel offers and says: its numbers, exit statuses from a pidfd, and the backend.

========================== ===== ==================================================
needed                     since for
========================== ===== ==================================================
pidfd from clone           5.2   a child that cannot be mistaken for another
waitid(P_PIDFD)            5.4   backends ``pidfd`` and ``popen``
CLONE_CLEAR_SIGHAND        5.5   default signal handlers in one step
CLONE_INTO_CGROUP          5.7   ``cgroup=`` without a window
SO_PASSPIDFD, SCM_PIDFD    6.5   (never asked for; closed where a socket brings one)
PIDFD_SIGNAL_PROCESS_GROUP 6.9   process groups, their leader gone or not
PIDFD_GET_INFO             6.13  the cgroup of a child
PIDFD_INFO_EXIT            6.15  statuses that nobody can steal
CLONE_AUTOREAP             7.1   backend ``autoreap``
CLONE_PIDFD_AUTOKILL       7.1   ``autokill=`` off the main thread too
========================== ===== ==================================================
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, cast

from aioreap import _clone

__all__ = ["Backend", "Feature", "backend"]

CLONE_VM: Final = 0x00000100
CLONE_PIDFD: Final = 0x00001000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_CLEAR_SIGHAND: Final = 1 << 32
CLONE_INTO_CGROUP: Final = 1 << 33
CLONE_AUTOREAP: Final = 1 << 34
CLONE_NNP: Final = 1 << 35
CLONE_PIDFD_AUTOKILL: Final = 1 << 36

PIDFD_SIGNAL_PROCESS_GROUP: Final = 1 << 2
SCM_PIDFD: Final = 0x04

PIDFD_INFO_EXIT: Final = _clone.PIDFD_INFO_EXIT
PIDFD_INFO_COREDUMP: Final = 1 << 4
PIDFD_INFO_SUPPORTED_MASK: Final = 1 << 5
_PIDFD_INFO_VER3: Final = struct.Struct("=Q72xQ")  # mask, ..., supported_mask
_PIDFD_GET_INFO_VER3: Final = 0xC058FF0B

# A call that a filter or an older kernel refuses; what else can be tried is tried then.
REFUSALS: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EINVAL})
_ASK_AGAIN_LATER: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EINTR}
)

PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36

BackendName = Literal["autoreap", "pidfd", "popen"]
FORCED: Final = "AIOREAP_BACKEND says so"


# What tests put something else in the place of.
_reap, _exit_info = _clone.reap, _clone.exit_info


# A wait status and the id of the cgroup that it was reached in, each None if nobody knows it.
ExitStatus: TypeAlias = tuple[int | None, int | None]
LOST: Final[ExitStatus] = None, None


def is_readable(descriptor: int) -> bool:
    """Whether poll() reports POLLIN now."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def exit_status(pidfd: int, *, reap: bool) -> ExitStatus | None:
    """Ask once, without waiting, how the process behind `pidfd` ended.

    `reap` says that it is this process's child and not an auto-reaped one.
    None means not yet, also for a pidfd that is readable already: POLLIN comes
    before the kernel stores the exit info, and while a tracer holds the dead
    child.

    Raises:
        OSError: ESRCH: the process is gone, and there is no exit info, or not yet;
            only time tells. EREMOTE: it is beyond this pid namespace.
    """
    if reap:
        try:
            return _reap(pidfd)
        except ChildProcessError:
            pass  # reaped by somebody else, or this is a forked copy of the parent
    try:
        return _exit_info(pidfd)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return LOST if is_readable(pidfd) else None


@dataclass(frozen=True, slots=True)
class Feature:
    """One question to the kernel: whether it can be used, and the answer in words."""

    available: bool
    answer: str


@dataclass(frozen=True, slots=True)
class Backend:
    """How children are made and watched here.

    Attributes:
        name: ``"autoreap"``, ``"pidfd"`` or ``"popen"``.
        reason: why this one, in a sentence.
        features: each probe's answer by the feature's name.
    """

    name: BackendName
    reason: str
    features: Mapping[str, Feature]

    @property
    def forced(self) -> bool:
        """Whether it is AIOREAP_BACKEND that chose it; then nothing else is fallen back to."""
        return self.reason == FORCED

    @property
    def legacy_clone(self) -> bool:
        """Whether clone3 cannot be used, but clone can."""
        return not self.features["clone3"].available


def _answer(error: int) -> Feature:
    if error in _ASK_AGAIN_LATER:
        raise OSError(error, os.strerror(error))
    if error in (0, errno.EFAULT):
        return Feature(True, "yes")
    name = errno.errorcode.get(error, str(error))
    why = (
        "unknown to this kernel" if error == errno.EINVAL else "no such call, or hidden by a filter"
    )
    return Feature(False, f"no ({name}: {why})")


def _errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def _descriptor_feature(call: Callable[[int], object]) -> Feature:
    # On a descriptor that cannot be open: EBADF says that the call is known.
    error = _errno_of(lambda: call(2**31 - 1))
    return _answer(0 if error == errno.EBADF else error)


def _clone_feature(flags: int, *, legacy: bool = False) -> Feature:
    return _answer(_clone.probe(flags, legacy))


def _exit_info_feature(pidfd: int) -> Feature:
    info = bytearray(_PIDFD_INFO_VER3.size)
    _PIDFD_INFO_VER3.pack_into(info, 0, PIDFD_INFO_SUPPORTED_MASK | PIDFD_INFO_COREDUMP, 0)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO_VER3, info)
    except OSError as error:
        return _answer(error.errno or 0)
    mask, supported = _PIDFD_INFO_VER3.unpack(info)
    if mask & PIDFD_INFO_SUPPORTED_MASK:
        return Feature(
            bool(supported & PIDFD_INFO_EXIT), "yes" if supported & PIDFD_INFO_EXIT else "no"
        )
    if mask & PIDFD_INFO_COREDUMP:
        return Feature(True, "yes (PIDFD_INFO_COREDUMP is known, and came later)")
    return Feature(
        False, "unknown (the kernel does not say what it supports; none before Linux 6.15)"
    )


def _probe() -> dict[str, Feature]:
    features: dict[str, Feature] = {}
    features["waitid_pidfd"] = _descriptor_feature(
        lambda closed: os.waitid(os.P_PIDFD, closed, os.WEXITED | os.WNOHANG)
    )
    features["pidfd_send_signal"] = _descriptor_feature(
        lambda closed: signal.pidfd_send_signal(closed, 0)
    )
    features["signal_process_group"] = _descriptor_feature(
        lambda closed: signal.pidfd_send_signal(closed, 0, None, PIDFD_SIGNAL_PROCESS_GROUP)
    )
    try:
        own = os.pidfd_open(os.getpid())
    except OSError as error:
        features["pidfd_open"] = _answer(error.errno or 0)
        no_pidfd = Feature(False, "not asked (needs pidfd_open)")
        features.update(dict.fromkeys(("pidfd_get_info", "exit_info"), no_pidfd))
    else:
        try:
            features["pidfd_open"] = Feature(True, "yes")
            features["pidfd_get_info"] = _answer(_errno_of(lambda: _exit_info(own)))
            features["exit_info"] = _exit_info_feature(own)
        finally:
            os.close(own)
    if features["waitid_pidfd"].available:
        features["clone_pidfd"] = _clone_feature(0, legacy=True)
    else:  # a kernel before 5.2 ignores CLONE_PIDFD, and the probe would make a child
        features["clone_pidfd"] = Feature(False, "not asked (needs waitid_pidfd)")
    features["clone3"] = _clone_feature(0)
    features["clear_sighand"] = _clone_feature(CLONE_CLEAR_SIGHAND)
    features["into_cgroup"] = _clone_feature(CLONE_INTO_CGROUP)
    features["autoreap"] = _clone_feature(CLONE_AUTOREAP)
    features["nnp"] = _clone_feature(CLONE_NNP)
    features["autokill"] = _clone_feature(CLONE_AUTOREAP | CLONE_NNP | CLONE_PIDFD_AUTOKILL)
    return features


def _tracer_pid() -> int:
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"TracerPid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def _missing(name: str, features: Mapping[str, Feature]) -> str | None:
    """What `name` lacks here, or None."""
    needs = {
        "autoreap": ("autoreap",),
        "pidfd": ("waitid_pidfd", "clone3" if features["clone3"].available else "clone_pidfd"),
        "popen": ("waitid_pidfd", "pidfd_open"),
    }[name]
    for need in (*needs, "pidfd_send_signal"):  # what cannot be killed cannot be cancelled
        if not features[need].available:
            return f"{need}: {features[need].answer}"
    return None


def _choose(features: Mapping[str, Feature]) -> tuple[BackendName, str]:
    forced = os.environ.get("AIOREAP_BACKEND")
    if forced:
        if forced not in ("autoreap", "pidfd", "popen"):
            raise ValueError(f"AIOREAP_BACKEND must be autoreap, pidfd or popen, not {forced!r}")
        missing = _missing(forced, features)
        if missing is not None:
            raise OSError(errno.ENOSYS, f"AIOREAP_BACKEND={forced} cannot be had here; {missing}")
        return cast("BackendName", forced), FORCED
    lacks_autoreap = _missing("autoreap", features)
    tracer = _tracer_pid()
    if lacks_autoreap is None and not tracer:
        return "autoreap", "this kernel has CLONE_AUTOREAP"
    if lacks_autoreap is None:
        why = f"process {tracer} traces this one, and would take an auto-reaped child for a thread"
    else:
        why = f"no CLONE_AUTOREAP ({lacks_autoreap})"
    lacks_pidfd, lacks_popen = _missing("pidfd", features), _missing("popen", features)
    if lacks_pidfd is None:
        return "pidfd", why
    if lacks_popen is None:
        return "popen", f"{why}; {lacks_pidfd}"
    lacks = lacks_pidfd if lacks_pidfd == lacks_popen else f"{lacks_pidfd}; {lacks_popen}"
    raise OSError(errno.ENOSYS, f"aioreap needs pidfds (Linux 5.4); {lacks}")


_backend: Backend | None = None


def backend() -> Backend:
    """How children are made and watched in this process, and why.

    Probed at the first call, without making a process, and then kept. The
    environment variable AIOREAP_BACKEND forces one of ``autoreap``, ``pidfd``
    and ``popen``; it is read once.

    Raises:
        OSError: ENOSYS if there is no usable backend or not the one forced;
            EMFILE, ENOMEM and the like if probing has to wait for better times.
        ValueError: AIOREAP_BACKEND names no backend.
    """
    global _backend
    if _backend is None:
        features = _probe()
        name, reason = _choose(features)
        _backend = Backend(name, reason, MappingProxyType(features))
    return _backend
