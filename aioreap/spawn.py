"""From Popen-style arguments to a child: what is checked, opened and fixed before the clone."""

from __future__ import annotations

import errno
import fcntl
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from aioreap import _clone, forking, hold, kernel
from aioreap.options import HasFileno, Options, Stdio, environment, group_id, groups_ids, user_id
from aioreap.surroundings import Surroundings


class Spawned:
    """A child that was just made.

    Attributes:
        reap: whether it has to be waited for.
        block: None if it has exec'ed already.
        status: where the init of a tree tells the program's wait status.
        is_child: else it was made by a process between, and is init's.
    """

    # No slots, and arguments by position: CPython 3.13 makes an object 40 % faster that way.
    def __init__(self, pid: int, pidfd: int, started_ns: int, reap: bool) -> None:  # noqa: FBT001
        self.pid = pid
        self.pidfd = pidfd
        self.started_ns = started_ns
        self.reap = reap
        self.pipe: int = -1
        self.block: _clone.Block | None = None
        self.shares_memory: bool = False
        self.closes_descriptors: bool = True
        self.held: hold.Held | None = None
        self.status: int = -1
        self.is_child: bool = True

    def holds_descriptors(self) -> bool:
        """Whether the child may still hold copies of all descriptors of this process."""
        if self not in in_flight or self.block is None:
            return False
        sees_steps = self.shares_memory and self.closes_descriptors
        return not sees_steps or _clone.step(self.block) <= _clone.STEP_DESCRIPTORS


# What is between its clone and its exec, in all threads; nothing in a forked copy.
in_flight: set[Spawned] = set()
os.register_at_fork(after_in_child=in_flight.clear)

# A forked copy of the program that holds the exec pipe's other end would keep
# it from reaching EOF, which is all that tells of the exec of a child with
# memory of its own.
_fork_lock = threading.RLock()


os.register_at_fork(
    before=_fork_lock.acquire,
    after_in_parent=_fork_lock.release,
    after_in_child=_fork_lock.release,
)

# Plans whose descriptors are open. A forked copy of the program closes its
# copies: a pipe of ours that it held would not reach EOF before its own end.
_open_plans: weakref.WeakSet[SpawnPlan] = weakref.WeakSet()


def _close_plans() -> None:
    for plan in list(_open_plans):
        plan.close()
        plan.close_pipes()


os.register_at_fork(after_in_child=_close_plans)

_PIPE_TO_BE: Final = -10  # less the child's descriptor: a source that is made at the clone
_NOT_OPEN: Final = -9  # a negative descriptor of the caller: EBADF, from the child
_LARGEST_INT: Final = 2**31 - 1
_NO_PIPES: Final[dict[int, int]] = {}
_PIPE_ENDS: Final = {0: (0, 1), 1: (1, 0), 2: (1, 0)}  # (child's, parent's) of os.pipe()


# What os.fsencode() does with a string, without the calls that it takes to find that it is one.
_ENCODING: Final = sys.getfilesystemencoding()
_ERRORS: Final = sys.getfilesystemencodeerrors()


class _Rung:
    """One way to clone, of those that are tried one after the other.

    Attributes:
        legacy: by clone, and not clone3.
    """

    def __init__(
        self, backend: kernel.Backend, *, legacy: bool, shares_memory: bool, autoreap: bool
    ) -> None:
        self.legacy = legacy
        self.shares_memory = shares_memory
        self.autoreap = autoreap
        self.flags = kernel.CLONE_PIDFD
        if shares_memory:
            self.flags |= kernel.CLONE_VM
        if autoreap:
            self.flags |= kernel.CLONE_AUTOREAP
        if not legacy and backend.features["clear_sighand"].available:
            self.flags |= kernel.CLONE_CLEAR_SIGHAND


class _Ladder:
    """The rungs that there are with one backend, each worked out once."""

    def __init__(self, backend: kernel.Backend | None) -> None:
        self.backend = backend
        self._rungs: dict[tuple[bool | None, bool], tuple[_Rung, ...]] = {}
        self.usual: tuple[_Rung, ...] = ()  # those of a child without options
        if backend is not None:
            self.usual = self.rungs(asked=None, shares_memory=bool(_clone.CAN_SHARE_MEMORY))

    def rungs(self, *, asked: bool | None, shares_memory: bool) -> tuple[_Rung, ...]:
        """Those of a child with `asked` as its option autoreap."""
        rungs = self._rungs.get((asked, shares_memory))
        if rungs is None:
            rungs = tuple(self._work_out(asked=asked, shares_memory=shares_memory))
            self._rungs[asked, shares_memory] = rungs
        return rungs

    def _work_out(self, *, asked: bool | None, shares_memory: bool) -> Iterator[_Rung]:
        backend = self.backend
        assert backend is not None
        if not backend.legacy_clone:
            autoreap = backend.name == "autoreap" and asked is not False
            yield _Rung(backend, legacy=False, shares_memory=shares_memory, autoreap=autoreap)
        if not asked and (backend.name, backend.forced) != ("autoreap", True):
            if shares_memory:
                yield _Rung(backend, legacy=True, shares_memory=True, autoreap=False)
            yield _Rung(backend, legacy=True, shares_memory=False, autoreap=False)


_ladder = _Ladder(None)


def _ladder_of(backend: kernel.Backend) -> _Ladder:
    global _ladder
    if _ladder.backend is not backend:
        _ladder = _Ladder(backend)
    return _ladder


def _standard_output() -> int:
    return 1 if sys.__stdout__ is None else sys.__stdout__.fileno()


class SpawnPlan:
    """All that a spawn needs, checked and encoded; the owner of its descriptors.

    Made by ``SpawnPlan.of``. ``pipes`` are the parent's ends by the child's descriptor,
    from the clone on, if it wants any; all others are closed by close(). ``by_fork`` says that
    subprocess.Popen makes the child, on the loop's thread and time. ``program`` is as the
    caller named it, for errors.
    """

    backend: kernel.Backend
    arguments: list[Any]
    program: Any
    argv: tuple[bytes, ...]
    paths: tuple[bytes, ...]
    envp: tuple[bytes, ...] | None
    cwd: bytes | None
    by_fork: bool
    # What is looked at only where there are options, or the plan was frozen, is not stored in each.
    # All else is: on Python 3.12 and 3.13, a default of the class makes each access slower.
    cwd_descriptor: int = -1
    close_fds: bool = True
    restore_signals: bool = True
    new_session: bool = False
    process_group: int = -1
    no_new_privs: bool = False
    umask: int = -1
    uid: int = -1
    gid: int = -1
    groups: tuple[int, ...] | None = None
    cgroup: int = -1
    autokill: bool | Literal["tree"] = False
    detached: bool = False
    _null: int = -1
    _hold: hold.Hold = hold.NOT_HELD

    def __init__(self, options: Options) -> None:
        self.options = options
        self.descriptors: tuple[tuple[int, int], ...] = ()
        self.wants_pipes: bool = False
        self.pipes: dict[int, int] = _NO_PIPES
        self._own: tuple[int, ...] = ()
        self._surroundings: Surroundings | None = None

    @classmethod
    def of(
        cls,
        command: Sequence[Any],
        stdio: tuple[Stdio, Stdio, Stdio],
        options: Options,
        *,
        shell: bool,
    ) -> SpawnPlan:
        """Check and encode the arguments, raise the audit event, and open the descriptors.

        `stdio` is stdin, stdout and stderr.

        Raises:
            TypeError, ValueError, LookupError: as subprocess.Popen does.
            OSError: a descriptor cannot be opened or does not exist.
        """
        if options and (unknown := options.keys() - Options.__annotations__.keys()):
            raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
        arguments = ["/bin/sh", "-c", *command] if shell else list(command)
        if shell and options.get("executable"):
            arguments[0] = options["executable"]
        plan = cls._encode(arguments, options)
        if options:
            plan._check(options)
        elif stdio[0] is None and stdio[1] is None and stdio[2] is None:
            return plan
        _open_plans.add(plan)
        try:
            plan._open(stdio, options)
        except BaseException:
            plan.close()
            plan.close_pipes()
            raise
        return plan

    @classmethod
    def _encode(cls, arguments: list[Any], options: Options) -> SpawnPlan:
        executable = cwd = env = preexec_fn = None
        if options:
            executable, preexec_fn = options.get("executable"), options.get("preexec_fn")
            cwd, env = options.get("cwd"), options.get("env")
        plan = cls(options)
        plan.arguments = arguments
        plan.program = arguments[0] if executable is None else executable
        plan.backend = kernel.backend()
        plan.by_fork = preexec_fn is not None or plan.backend.name == "popen"
        if not plan.by_fork:  # else Popen raises it
            sys.audit("subprocess.Popen", plan.program, arguments, cwd, env)

        plan.envp = None if env is None else environment(env)
        plan.argv = tuple(
            [a.encode(_ENCODING, _ERRORS) if type(a) is str else os.fsencode(a) for a in arguments]
        )
        path = plan.argv[0] if executable is None else os.fsencode(executable)
        if b"/" in path:
            plan.paths = (path,)
        else:
            plan.paths = tuple(os.path.join(os.fsencode(d), path) for d in os.get_exec_path(env))  # type: ignore[arg-type]
        plan.cwd = None if cwd is None else os.fsencode(cwd)
        return plan

    def _check(self, options: Options) -> None:
        if options.get("startupinfo") is not None:
            raise ValueError("startupinfo is only supported on Windows platforms")
        if not isinstance(options.get("pipesize", -1), int):
            raise TypeError("pipesize must be an integer")
        if options.get("creationflags", 0) != 0:
            raise ValueError("creationflags is only supported on Windows platforms")
        self.close_fds = bool(options.get("close_fds", True))
        self.restore_signals = bool(options.get("restore_signals", True))
        self.new_session = bool(options.get("start_new_session", False))
        self.autokill = hold.check(options.get("autokill", False))
        no_new_privs = options.get("no_new_privs")
        self.no_new_privs = bool(self.autokill if no_new_privs is None else no_new_privs)
        self.umask = operator.index(options.get("umask", -1))
        process_group = options.get("process_group")
        if process_group is not None:
            self.process_group = operator.index(process_group)
            if self.process_group < 0:
                raise ValueError(f"process_group cannot be negative, got {process_group}")
        self._check_ids(options)

    def _check_ids(self, options: Options) -> None:
        if options.get("group") is not None:
            self.gid = group_id(options["group"])
        extra_groups = options.get("extra_groups")
        if extra_groups is not None:
            self.groups = groups_ids(extra_groups)
        if options.get("user") is not None:
            self.uid = user_id(options["user"])

    def _open(self, given_stdio: tuple[Stdio, Stdio, Stdio], options: Options) -> None:
        passed = {operator.index(d) for d in options.get("pass_fds", ())}
        if any(not 0 <= d <= _LARGEST_INT for d in passed):
            raise ValueError("bad value(s) in fds_to_keep")
        for descriptor in passed:
            os.get_inheritable(descriptor)  # EBADF, while none of ours can have its number
        if passed and not self.close_fds:
            warnings.warn("pass_fds overriding close_fds.", RuntimeWarning, stacklevel=2)
            self.close_fds = True
        cgroup = options.get("cgroup")
        if isinstance(cgroup, int):
            os.fstat(cgroup)  # EBADF
            self.cgroup = cgroup
        elif cgroup is not None:
            self.cgroup = self._keep(os.open(cgroup, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if subprocess.STDOUT in given_stdio[:2]:
            raise ValueError("STDOUT can only be used for stderr")
        stdio: dict[int, int] = {}
        for target, given in enumerate(given_stdio):
            if given == subprocess.STDOUT:
                stdio[target] = stdio[1] if 1 in stdio else _standard_output()
            elif given is not None:
                stdio[target] = self._open_stdio(target, given)
        self.descriptors = (
            *((source, target) for target, source in stdio.items()),
            *((d, d) for d in passed if d not in stdio),
        )

    def _open_stdio(self, target: int, given: int | HasFileno) -> int:
        if given == subprocess.PIPE:
            self.wants_pipes = True
            return _PIPE_TO_BE - target
        if given == subprocess.DEVNULL:
            if self._null < 0:
                self._null = self._keep(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            return self._null
        return max(given if isinstance(given, int) else given.fileno(), _NOT_OPEN)

    def _keep(self, descriptor: int) -> int:
        self._own += (descriptor,)
        return descriptor

    def _open_pipes(self) -> None:
        """Make the pipes: at the clone, as a spawn that waits for its turn needs none."""
        wanted = {source for source, _ in self.descriptors if source <= _PIPE_TO_BE}
        if not wanted:  # another try has made them
            return
        size = self.options.get("pipesize", -1)
        self.pipes = {}
        made = {source: self._open_pipe(_PIPE_TO_BE - source, size) for source in wanted}
        self.descriptors = tuple((made.get(s, s), target) for s, target in self.descriptors)

    def _open_pipe(self, target: int, size: int) -> int:
        ends = os.pipe()
        child, parent = _PIPE_ENDS[target]
        self._keep(ends[child])
        self.pipes[target] = ends[parent]
        if size > 0:
            fcntl.fcntl(ends[parent], fcntl.F_SETPIPE_SZ, size)
        return ends[child]

    def freeze(self) -> None:
        """Make the plan independent of what this process does before it is carried out.

        The environment, the working directory, the umask and all descriptors
        named or inherited as 0 to 2 are kept as they are now. (With
        close_fds=False, other inheritable descriptors are not.)
        """
        if self.envp is None:
            self.envp = _clone.environment()
        _open_plans.add(self)
        self._surroundings = Surroundings.now()
        if self.umask < 0:
            self.umask = self._surroundings.umask()
        copies: dict[int, int] = {}
        for source, _ in self.descriptors:
            if source >= 0 and source not in copies and source not in self._own:
                copies[source] = self._keep(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 3))
        self.cwd_descriptor = self._surroundings.directory
        targets = {target for _, target in self.descriptors}
        self.descriptors = (
            *((copies.get(s, s), target) for s, target in self.descriptors),
            *((s, t) for t, s in self._surroundings.streams.items() if t not in targets),
        )
        if self.cgroup >= 0 and self.cgroup not in self._own:
            self.cgroup = self._keep(fcntl.fcntl(self.cgroup, fcntl.F_DUPFD_CLOEXEC, 3))

    def close(self) -> None:
        """Close the child's ends and all else that only the clone needs."""
        self._surroundings = None
        while self._own:
            *others, descriptor = self._own
            self._own = tuple(others)
            os.close(descriptor)

    def close_pipes(self) -> None:
        """Close the parent's ends that nobody has taken."""
        while self.pipes:
            os.close(self.pipes.popitem()[1])

    @property
    def leads_group(self) -> bool:
        """Whether the child becomes the leader of a process group of its own."""
        return self.new_session or self.process_group == 0

    @property
    def shares_memory(self) -> bool:
        """Whether the child may use this process's memory until its exec.

        A change of uid or gid would clear this process's dumpable flag for good,
        and in another cgroup an OOM kill would take all that share the memory.
        """
        changes_credentials = self.uid >= 0 or self.gid >= 0 or self.groups is not None
        copies = changes_credentials or self.cgroup >= 0 or self.autokill == "tree"
        return bool(_clone.CAN_SHARE_MEMORY) and not copies

    def clone(self) -> Spawned:
        """Make the child, in the best way that the kernel permits now.

        Raises:
            OSError: there is no child, as the clone failed (EAGAIN, ENOMEM, EMFILE)
                or the kernel lacks what was asked for (ENOSYS).
        """
        if self.wants_pipes:
            self._open_pipes()
        backend = self.backend
        ladder = _ladder if _ladder.backend is backend else _ladder_of(backend)
        rungs = self._rungs(ladder, backend) if self.options else ladder.usual
        if self.by_fork:
            return self._fork(backend)
        refused: OSError | None = None
        for rung in rungs:
            if self.options and self.autokill:
                try:
                    self._hold = self._new_hold(backend, autoreap=rung.autoreap)
                except OSError as error:
                    raise refused or error from None
            try:
                return self._clone(backend, rung)
            except OSError as error:
                explained = self._hold.explain(error, no_new_privs=self.no_new_privs)
                lacks = self._hold.lacks_capability(error, no_new_privs=self.no_new_privs)
                if error.errno not in kernel.REFUSALS or lacks:
                    raise explained from None
                refused = refused or explained
        asked = self.options.get("autoreap")
        if refused is not None and (asked or backend.forced):
            why = "autoreap=True" if asked else kernel.FORCED
            message = f"{refused.strerror}: the clone is refused, and nothing else tried, as {why}"
            raise OSError(refused.errno, message)
        if refused is not None and self.autokill == "tree":
            raise refused
        return self._fork(backend)

    def _fork(self, backend: kernel.Backend) -> Spawned:
        held = hold.held_by(backend, autoreap=False) if self.autokill else None
        started_ns = time.monotonic_ns()
        _open_plans.discard(self)  # this copy of the program needs its descriptors
        pid, pidfd = forking.spawn(self)
        spawned = Spawned(pid, pidfd, started_ns, True)
        spawned.held, spawned.is_child = held, not self.detached
        return spawned

    def _rungs(self, ladder: _Ladder, backend: kernel.Backend) -> tuple[_Rung, ...]:
        """Those by the options, if the backend has what was asked for."""
        given = self.options.get("autoreap")
        asked = None if given is None else bool(given)
        if asked and backend.name != "autoreap":
            raise OSError(
                errno.ENOSYS,
                f"autoreap=True needs backend autoreap; this is {backend.name}: {backend.reason}",
            )
        if self.autokill == "tree":
            hold.need_a_tree(backend, preexec_fn=self.options.get("preexec_fn") is not None)
        return ladder.rungs(asked=asked, shares_memory=self.shares_memory)

    def _new_hold(self, backend: kernel.Backend, *, autoreap: bool) -> hold.Hold:
        new = hold.Hold.of(backend, autoreap=autoreap, tree=self.autokill == "tree")
        for descriptor in new.descriptors():
            self._keep(descriptor)
        return new

    def give(self, descriptor: int) -> int:
        """Have close() spare one, which is the caller's from here on."""
        self._own = tuple(own for own in self._own if own != descriptor)
        return descriptor

    def _clone(self, backend: kernel.Backend, rung: _Rung) -> Spawned:
        flags, autoreap = rung.flags, rung.autoreap
        more: tuple[Any, ...] = ()
        if self.options or self._surroundings is not None:
            flags, more = self._more(backend, rung)
        started_ns = time.monotonic_ns()
        with _fork_lock:
            pid, pidfd, pipe, block = _clone.spawn(
                self.paths,
                self.argv,
                self.envp,
                self.descriptors,
                flags,
                0 if autoreap else signal.SIGCHLD,
                rung.legacy,
                *more,
            )
        spawned = Spawned(pid, pidfd, started_ns, not autoreap)
        spawned.pipe, spawned.block, spawned.shares_memory = pipe, block, rung.shares_memory
        if self.options:
            spawned.closes_descriptors = self.close_fds
            spawned.is_child = autoreap or not self.detached
            spawned.held, spawned.status = self._hold.held, self._hold.status
        in_flight.add(spawned)
        return spawned

    def _more(self, backend: kernel.Backend, rung: _Rung) -> tuple[int, tuple[Any, ...]]:
        """The flags, and what else _clone.spawn() is to know of a child that is not as most are."""
        held, flags, cgroup_procs = self._hold, rung.flags | self._hold.clone_flags, -1
        if self.no_new_privs and rung.autoreap:
            flags |= kernel.CLONE_NNP
        if self.cgroup >= 0 and backend.features["into_cgroup"].available and not rung.legacy:
            flags |= kernel.CLONE_INTO_CGROUP
        elif self.cgroup >= 0:
            cgroup_procs = self.open_cgroup_procs()
        return flags, (
            self.cwd,
            self.cwd_descriptor,
            self.close_fds,
            self.restore_signals,
            self.new_session,
            self.process_group,
            self.no_new_privs and not rung.autoreap,
            self.umask,
            self.uid,
            self.gid,
            self.groups,
            self.cgroup,
            cgroup_procs,
            held.held == "pdeathsig",
            held.status >= 0,
            held.status_there,
            held.parent,
            self.detached and not rung.autoreap,
        )

    def open_cgroup_procs(self) -> int:
        """cgroup.procs of the cgroup asked for, open for writing until close()."""
        flags = os.O_WRONLY | os.O_CLOEXEC
        return self._keep(os.open("cgroup.procs", flags, dir_fd=self.cgroup))

    def error_for(self, step: int, error: int) -> Exception:
        """What subprocess.Popen raises for a child that failed before or in its exec."""
        if not error:
            return subprocess.SubprocessError(
                f"the child was killed before it could run {self.program!r}"
            )
        message = os.strerror(error)
        if step == _clone.STEP_START and error in kernel.REFUSALS:
            return OSError(error, f"{message}: pidfd_open, which backend popen and preexec_fn need")
        if step == _clone.STEP_EXEC:
            return OSError(error, message, self.program)
        message += hold.at_step(step, error, self._hold)
        if step == _clone.STEP_CHDIR and self.cwd is not None:
            return OSError(error, message, self.options.get("cwd"))
        return OSError(error, message)
