"""A seccomp filter as a container has it: python tests/seccomp.py clone3=ENOSYS -- command ..."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final, NamedTuple

_CLONE_VM: Final = 0x00000100
_CLONE_PIDFD: Final = 0x00001000
_CLONE_VFORK: Final = 0x00004000
_CLONE_THREAD: Final = 0x00010000

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_SECCOMP_RET_KILL_PROCESS: Final = 0x80000000
_SECCOMP_RET_ERRNO: Final = 0x00050000
_SECCOMP_RET_ALLOW: Final = 0x7FFF0000

# Offsets in struct seccomp_data; the low half of the first argument comes first
# on both of the architectures.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_FIRST_ARGUMENT: Final = 16

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_INSTRUCTION: Final = struct.Struct("=HBBI")  # code, jt, jf, k


class _Machine(NamedTuple):
    audit_arch: int
    clone: int
    madvise: int


class _Call(NamedTuple):
    """A system call: refused where its first argument, masked, is `value`."""

    number: int
    mask: int = 0
    value: int = 0


_MACHINES: Final = {
    "x86_64": _Machine(0xC000003E, 56, 28),
    "aarch64": _Machine(0xC00000B7, 220, 233),
}
IS_POSSIBLE: Final = platform.machine() in _MACHINES


def _calls(machine: _Machine) -> dict[str, _Call]:
    return {
        "clone3": _Call(435),
        # clone() that makes a pidfd
        "clone_pidfd": _Call(machine.clone, _CLONE_PIDFD, _CLONE_PIDFD),
        # clone() of a process that shares memory and does not suspend its parent
        "clone_vm": _Call(machine.clone, _CLONE_VM | _CLONE_VFORK | _CLONE_THREAD, _CLONE_VM),
        "madvise": _Call(machine.madvise),
        "pidfd_send_signal": _Call(424),
        "pidfd_open": _Call(434),
        "close_range": _Call(436),
    }


def _program(rules: tuple[str, ...]) -> list[bytes]:
    machine = _MACHINES[platform.machine()]
    calls = _calls(machine)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, machine.audit_arch),
        (_RETURN, 0, 0, _SECCOMP_RET_KILL_PROCESS),
    ]
    for rule in rules:
        name, _, error = rule.partition("=")
        call, number = calls[name], getattr(errno, error)
        program += [
            (_LOAD, 0, 0, _NUMBER),
            (_JUMP_IF_EQUAL, 0, 4, call.number),
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_AND, 0, 0, call.mask),
            (_JUMP_IF_EQUAL, 0, 1, call.value),
            (_RETURN, 0, 0, _SECCOMP_RET_ERRNO | number),
        ]
    program.append((_RETURN, 0, 0, _SECCOMP_RET_ALLOW))
    return [_INSTRUCTION.pack(*instruction) for instruction in program]


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(*rules: str) -> None:
    """Have the kernel refuse calls of this thread and of all that it starts, for good.

    A rule is ``name=errno``: ``pidfd_open=EPERM``. All else is allowed.
    """
    program = _program(rules)
    filter_ = _SockFprog(len(program), b"".join(program))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    end_of_rules = sys.argv.index("--")
    install(*sys.argv[1:end_of_rules])
    command = sys.argv[end_of_rules + 1 :]
    os.execvp(command[0], command)
