"""Every asynchronous test runs over both loops and every backend that this kernel offers.

With AIOREAP_TEST_BACKENDS, names with spaces between them, the tests fail where
the kernel does not offer just these, or where none has passed on one of them. With
AIOREAP_TEST_EMULATED, those that take too long on such a machine are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import platform
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from signals import restore_signals

from aioreap import _clone, kernel, watcher

_LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def backends_of_this_kernel() -> list[str]:
    """The names that AIOREAP_BACKEND can take here."""
    features = kernel._probe()
    return [name for name in ("autoreap", "pidfd", "popen") if not kernel._missing(name, features)]


restore_signals()
# libuv opens a pipe for itself at its first loop, and keeps it.
uvloop.new_event_loop().close()

BACKENDS = backends_of_this_kernel()
EXPECTED = os.environ.get("AIOREAP_TEST_BACKENDS", "").split()
EMULATED = bool(os.environ.get("AIOREAP_TEST_EMULATED"))
# On emulated kernels, so that each runs on one with CLONE_AUTOREAP or on one without.
_PAIRS_OF_OTHERS = (
    {("pidfd", "uvloop"), ("popen", "asyncio")}
    if "autoreap" in BACKENDS
    else {("pidfd", "asyncio"), ("popen", "uvloop")}
)


def force_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have `name` in force, as if AIOREAP_BACKEND had been set before the start."""
    monkeypatch.setenv("AIOREAP_BACKEND", name)
    monkeypatch.setattr(kernel, "_backend", None)
    assert kernel.backend().name == name


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return _LOOPS


# Each marker that leaves tests out, what it says of them, and whether that is so here.
_LEFT_OUT: Mapping[str, tuple[str, bool]] = {
    "main_thread": (
        "needs Python's main thread, as signal.signal() does",
        threading.current_thread() is not threading.main_thread(),
    ),
    "once": (
        "is long, and the same in any thread; a smaller twin runs here",
        threading.current_thread() is not threading.main_thread(),
    ),
    "autoreap": ("is about CLONE_AUTOREAP, and needs it", "autoreap" not in BACKENDS),
    "slow": (
        "takes too long when emulated; a twin runs there, if kernels differ in it",
        EMULATED,
    ),
    "newest_kernel": (
        "is about what all kernels do alike; of those that are emulated it runs on the newest",
        EMULATED and "autoreap" not in BACKENDS,
    ),
    "pair_of_others": ("has a loop and a backend that are tried on the other kernels", EMULATED),
}
_left_out: Counter[str] = Counter()
_selected: Counter[str] = Counter()
_passed: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    for name, (meaning, _) in _LEFT_OUT.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.addinivalue_line("markers", "any_backend: does not depend on the backend; runs on one")
    config.addinivalue_line(
        "markers",
        "own_backend(loop): an emulated kernel tries it with its own backend alone,"
        " and with this loop, if one is named",
    )
    config.addinivalue_line(
        "markers", "clone_backends: not for popen, where subprocess.Popen itself waits for the exec"
    )
    if EXPECTED and EXPECTED != BACKENDS:
        raise pytest.UsageError(
            f"meant to run on {', '.join(EXPECTED)}; this kernel offers {', '.join(BACKENDS)}"
        )


def _backend_of(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["backend"])


def _is_pair_of_others(item: pytest.Item) -> bool:
    own = item.get_closest_marker("own_backend")
    if own and _backend_of(item) != BACKENDS[0]:
        return True
    words = {*item.name.partition("[")[2].rstrip("]").split("-")}
    if own and own.args:
        return bool(words & {*_LOOPS} - {*own.args})
    uvloop_words = {"uvloop", "UvloopEventLoop"} & words
    asyncio_words = {"asyncio", "EventLoop"} & words
    if not uvloop_words:  # "installed-uvloop" is uvloop's
        asyncio_words |= {"installed"} & words
    return any(
        found and (_backend_of(item), loop) in _PAIRS_OF_OTHERS
        for found, loop in ((asyncio_words, "asyncio"), (uvloop_words, "uvloop"))
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_pair_of_others(item):
            item.add_marker("pair_of_others")
    for name, (_, is_so) in _LEFT_OUT.items():
        left_out = [item for item in items if is_so and item.get_closest_marker(name)]
        config.hook.pytest_deselected(items=left_out)
        _left_out[name] += len(left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    _selected.update(map(_backend_of, session.items))


def _where() -> str:
    thread = "" if threading.current_thread() is threading.main_thread() else ", another thread"
    strict = sys.flags.dev_mode and "error" in sys.warnoptions
    mode = ", development mode" if strict else ""
    return f"Python {platform.python_version()}, Linux {os.uname().release}{mode}{thread}"


def pytest_report_header(config: pytest.Config) -> str:
    return f"aioreap: {_where()}, backends {', '.join(BACKENDS)}"


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "call" and call.excinfo is None:
        _passed[_backend_of(item)] += 1


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Have what follows a failure end too: pytest looks at the time no longer, for a debugger.

    uvloop's close() waits for ever where a transport was left open and warnings are errors.
    """
    config = node.config
    plugin = config.pluginmanager.getplugin("faulthandler")
    if plugin is None or not isinstance(node, pytest.Item):
        return
    timeout = plugin.get_timeout_config_value(config)
    if timeout > 0 and config.getini("faulthandler_exit_on_timeout"):
        stderr = config.stash[plugin.fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(timeout, file=stderr, exit=True)


def _did_not_run() -> list[str]:
    return [name for name in EXPECTED if _selected[name] and not _passed[name]]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and _did_not_run():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in _did_not_run():
        terminalreporter.write_line(f"FAILED: no test passed on {name}, meant to run here")
    for name, count in _left_out.items():
        if count:
            terminalreporter.write_line(f"{count} tests left out: each {_LEFT_OUT[name][0]}")
    counts = ", ".join(f"{name} {_passed[name]}" for name in BACKENDS)
    terminalreporter.write_line(f"aioreap tests: {_where()}: passed {counts}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = BACKENDS
        if metafunc.definition.get_closest_marker("autoreap"):
            names = ["autoreap"]
        if metafunc.definition.get_closest_marker("clone_backends"):
            names = [name for name in names if name != "popen"]
        if metafunc.definition.get_closest_marker("any_backend"):
            names = names[:1]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend in force for this test."""
    # On a busy machine what is killed can take long to die, and a test asks whether it is gone.
    monkeypatch.setattr(watcher, "_DEATH_PATIENCE_MS", 60_000)
    force_backend(monkeypatch, request.param)
    return str(request.param)


def open_descriptors() -> dict[int, str]:
    """What this process has open, by number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def children() -> list[int]:
    """The pids of this process's children, zombies included, of all its threads.

    Without those that nobody can wait for any more: they are dead, and about to be gone.
    """
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends
            found += map(int, (task / "children").read_text().split())
    return [pid for pid in found if _state(pid) not in ("X", None)]


def _state(pid: int) -> str | None:
    """The letter of its state, None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.fixture(autouse=True)
def _nothing_left(backend: str) -> Iterator[None]:
    """After each test: no child, no descriptor and no block more than before."""
    gc.collect()
    gc.freeze()  # what is older than the test stays: the collections in it pass it by
    before, blocks, family = open_descriptors(), _clone.blocks(), children()
    yield
    gc.collect()
    left = {n: what for n, what in open_descriptors().items() if n not in before}
    strangers = [pid for pid in children() if pid not in family]
    for pid in strangers:
        with contextlib.suppress(ProcessLookupError):  # auto-reaped
            os.kill(pid, signal.SIGKILL)
    for pid in strangers:  # all are killed by now: one of them may trace another
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    assert not strangers, f"children left: {strangers}"
    assert not left, f"descriptors left: {left}"
    assert _clone.blocks() <= blocks
