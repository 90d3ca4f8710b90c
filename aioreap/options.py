"""What the creating functions take by keyword, and what of it stands by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, Protocol, TypeAlias, TypedDict

StrOrBytesPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class HasFileno(Protocol):
    """A file, a socket, or what else has a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


Stdio: TypeAlias = int | HasFileno | None


class Options(TypedDict, total=False):
    """What create_subprocess_exec and all that is like it take by keyword.

    Those up to ``preexec_fn`` are subprocess.Popen's, with its meaning, its
    defaults and its errors. ``preexec_fn`` takes that one spawn through
    subprocess.Popen, which holds the event loop until the program has started.
    ``user``, ``group``, ``extra_groups``, ``cgroup`` and ``autokill="tree"`` make the
    kernel copy the page tables of this process (some 20 ms per GiB of heap) instead
    of sharing its memory with the child until it runs the program.

    Attributes:
        autoreap: True demands CLONE_AUTOREAP (Linux 7.1), False does without it,
            for a program that itself clones with CLONE_PARENT. None takes what
            there is.
        no_new_privs: set the child's no_new_privs: it can gain no privilege by exec. None does
            so with ``autokill``.
        cgroup: the cgroup v2 that the child starts in, as the path or a descriptor
            of its directory.
        autokill: kill the child when this process ends, however it ends. By
            CLONE_PIDFD_AUTOKILL (backend ``autoreap``) that is the last close of the child's
            pidfd: an exec of this process closes it as well, and a copy of this process that was
            forked while the child ran keeps it open. By PR_SET_PDEATHSIG elsewhere it is the end
            of the thread, which so has to be the main one, else OSError (ENOSYS); exec and copies
            do not matter. What the child starts is not killed. ``no_new_privs=False`` lets it
            run set-user-ID programs: the first way needs CAP_SYS_ADMIN then, else OSError (EPERM),
            and by the second one such a program is no longer held.
            ``"tree"`` takes along all that the child starts, whatever becomes of it: the program
            runs in a pid namespace of its own, below an init, which is the child that is held.
            It needs CAP_SYS_ADMIN, or user namespaces (else OSError: EPERM, ENOSPC), and not
            backend ``popen``. See the README for what a program sees there.
    """

    cwd: StrOrBytesPath | None
    env: Mapping[str, str] | Mapping[bytes, bytes] | Mapping[Any, Any] | None
    executable: StrOrBytesPath | None
    close_fds: bool
    pass_fds: Iterable[int]
    restore_signals: bool
    start_new_session: bool
    process_group: int | None
    user: str | int | None
    group: str | int | None
    extra_groups: Iterable[str | int] | None
    umask: int
    pipesize: int
    preexec_fn: Callable[[], object] | None
    startupinfo: None
    creationflags: int
    autoreap: bool | None
    no_new_privs: bool | None
    cgroup: StrOrBytesPath | int | None
    autokill: bool | Literal["tree"]


# What asyncio's loops refuse unless it is this, and say so.
_BINARY: Final = {
    "universal_newlines": False,
    "text": False,
    "bufsize": 0,
    "encoding": None,
    "errors": None,
}


def take_binary(options: dict[str, Any], *, shell: bool) -> None:
    """Take the options out that could only ask for text or buffers.

    Raises:
        ValueError: they do.
    """
    if not options:
        return
    if bool(options.pop("shell", shell)) is not shell:
        raise ValueError(f"shell must be {shell}")
    for name, only in _BINARY.items():
        given = options.pop(name, only)
        if given if only is False else given != only:
            raise ValueError(f"{name} must be {only}")


_LARGEST_ID: Final = 2**32 - 2  # all ones mean "none" to the kernel


def _id(kind: str, name: str | int, look_up: Callable[[str], int]) -> int:
    number = look_up(name) if isinstance(name, str) else name
    if number < 0:
        raise ValueError(f"{kind} ID cannot be negative, got {number}")
    if number > _LARGEST_ID:
        raise OverflowError(f"{kind.lower()} ID is greater than maximum")
    return number


def _gid(name: str) -> int:
    import grp  # noqa: PLC0415 - few programs need it, and all would wait for it

    return grp.getgrnam(name).gr_gid


def _uid(name: str) -> int:
    import pwd  # noqa: PLC0415 - the same

    return pwd.getpwnam(name).pw_uid


def group_id(group: object) -> int:
    """The number of `group`, given by name or number, with subprocess's errors."""
    if not isinstance(group, str | int):
        raise TypeError(f"Group must be a string or an integer, not {type(group)}")
    return _id("Group", group, _gid)


def groups_ids(groups: Iterable[object]) -> tuple[int, ...]:
    """The numbers of `groups`, given by name or number, with subprocess's errors."""
    if isinstance(groups, str):
        raise ValueError("Groups must be a list, not a string")  # noqa: TRY004 - as subprocess
    numbers = []
    for group in groups:
        if not isinstance(group, str | int):
            raise TypeError(f"Items in extra_groups must be a string or integer, not {type(group)}")
        try:
            numbers.append(_id("Group", group, _gid))
        except OverflowError:
            raise ValueError("invalid group id") from None
    if len(numbers) > os.sysconf("SC_NGROUPS_MAX"):
        raise ValueError("too many groups")
    return tuple(numbers)


def user_id(user: object) -> int:
    """The number of `user`, given by name or number, with subprocess's errors."""
    if not isinstance(user, str | int):
        raise TypeError("User must be a string or an integer")
    return _id("User", user, _uid)


def environment(env: Mapping[Any, Any]) -> tuple[bytes, ...]:
    """The environment as execve() takes it."""
    variables = []
    for key, value in env.items():
        name = os.fsencode(key)
        if b"=" in name:
            raise ValueError("illegal environment variable name")
        variables.append(name + b"=" + os.fsencode(value))
    return tuple(variables)
