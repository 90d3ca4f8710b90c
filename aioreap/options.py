"""What the creating functions take by keyword, and what of it stands by name."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, TypeAlias, TypedDict

StrOrBytesPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Stdio: TypeAlias = int | IO[Any] | None


class Options(TypedDict, total=False):
    """What create_subprocess_exec and all that is like it take by keyword.

    Those up to ``preexec_fn`` are subprocess.Popen's, with its meaning, its
    defaults and its errors. ``preexec_fn`` takes that one spawn through
    subprocess.Popen, which holds the event loop until the program has started.
    ``user``, ``group``, ``extra_groups`` and ``cgroup`` make the kernel copy the
    page tables of this process (some 20 ms per GiB of heap) instead of sharing
    its memory with the child until it runs the program.

    autoreap: True demands CLONE_AUTOREAP (Linux 7.1), False does without it, for
        a program that itself clones with CLONE_PARENT. None takes what there is.
    no_new_privs: set the child's no_new_privs: it can gain no privilege by exec.
    cgroup: the cgroup v2 that the child starts in, as the path or a descriptor of
        its directory.
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
    no_new_privs: bool
    cgroup: StrOrBytesPath | int | None


def _number(what: str, name: object, look_up: Callable[[str], int]) -> int:
    if isinstance(name, str):
        return look_up(name)
    if not isinstance(name, int):
        raise TypeError(f"{what} must be a string or an integer, not {type(name)}")
    if name < 0:
        raise ValueError(f"{what} ID cannot be negative, got {name}")
    if name >= 2**32 - 1:
        raise OverflowError(f"{what.lower()} ID is greater than maximum")
    return name


def group_id(group: object) -> int:
    """The number of a group given by name or number, with subprocess's errors."""
    return _number("Group", group, lambda name: grp.getgrnam(name).gr_gid)


def user_id(user: object) -> int:
    """The number of a user given by name or number, with subprocess's errors."""
    return _number("User", user, lambda name: pwd.getpwnam(name).pw_uid)


def environment(env: Mapping[Any, Any]) -> tuple[bytes, ...]:
    """The environment as execve() takes it."""
    variables = []
    for key, value in env.items():
        name = os.fsencode(key)
        if b"=" in name:
            raise ValueError("illegal environment variable name")
        variables.append(name + b"=" + os.fsencode(value))
    return tuple(variables)
