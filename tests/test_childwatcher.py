"""AsyncioChildWatcher: asyncio's own children, as its policy's child watcher sees them end."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from test_copies import in_a_copy_by_c

import aioreap
from aioreap import kernel
from aioreap.exitinfo import ExitStatusLost

pytestmark = pytest.mark.any_backend

if sys.version_info >= (3, 14):

    def test_there_is_none_any_more() -> None:
        with pytest.raises(ImportError, match=r"no child watchers since Python 3\.14"):
            importlib.import_module("aioreap.childwatcher")
        assert not hasattr(aioreap, "AsyncioChildWatcher")

else:

    @pytest.fixture
    def watcher() -> Iterator[aioreap.AsyncioChildWatcher]:
        made = aioreap.AsyncioChildWatcher()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            before = asyncio.get_child_watcher()
            asyncio.set_child_watcher(made)
            yield made
            asyncio.set_child_watcher(before)

    def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(main())

    async def create(script: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec("sh", "-c", script, stdin=-1, stdout=-1)
        assert not isinstance(process._transport, aioreap.transport.SubprocessTransport)  # type: ignore[attr-defined]
        return process

    def lose(monkeypatch: pytest.MonkeyPatch) -> None:
        def exit_status(pidfd: int, *, reap: bool) -> kernel.ExitStatus | None:
            known = real(pidfd, reap=reap)
            return known and kernel.LOST

        real = kernel.exit_status
        monkeypatch.setattr(kernel, "exit_status", exit_status)

    def test_asyncios_own_children_are_heard_of(watcher: aioreap.AsyncioChildWatcher) -> None:
        async def main() -> None:
            threads = threading.active_count()
            processes = [await create(f"read line; exit {n}") for n in range(4)]
            assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
            assert threading.active_count() == threads
            for process in processes:
                await process.communicate(b"")
            assert [process.returncode for process in processes] == [0, 1, 2, 3]
            assert not watcher._children

        run(main)

    def test_any_threads_loop_can_have_children(watcher: aioreap.AsyncioChildWatcher) -> None:
        codes = []

        async def main() -> None:
            process = await create("read line; exit 3")
            await process.communicate(b"x\n")
            codes.append(process.returncode)

        threads = [threading.Thread(target=run, args=(main,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [3, 3]

    def test_a_stolen_status_is_right_or_an_error(watcher: aioreap.AsyncioChildWatcher) -> None:
        async def main() -> None:
            process = await create("read line; exit 3")
            process.kill()
            assert os.waitpid(process.pid, 0) == (process.pid, signal.SIGKILL)
            if kernel.backend().features["exit_info"].available:
                assert await process.wait() == -signal.SIGKILL
            else:
                with pytest.raises(ExitStatusLost):
                    await process.wait()

        run(main)

    def test_a_lost_status_is_an_error_at_each_question(
        watcher: aioreap.AsyncioChildWatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lose(monkeypatch)

        async def main() -> None:
            process = await create("read line")
            waiting = [asyncio.create_task(process.wait()) for _ in range(2)]
            await asyncio.sleep(0)
            process.kill()
            for ended in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(ended, ExitStatusLost)
            for _ in range(2):
                with pytest.raises(ExitStatusLost):
                    await process.wait()
            with pytest.raises(ExitStatusLost):
                process.returncode  # noqa: B018
            await process.stdout.read()  # type: ignore[union-attr]

        run(main)

    def test_a_child_that_was_reaped_before_it_was_heard_of_is_lost(
        watcher: aioreap.AsyncioChildWatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pidfd_open(pid: int) -> int:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise ProcessLookupError

        async def main() -> None:
            monkeypatch.setattr(os, "pidfd_open", pidfd_open)
            process = await create("read line")
            with pytest.raises(ExitStatusLost):
                await process.wait()

        run(main)

    def test_what_popen_has_reaped_itself_is_known(
        watcher: aioreap.AsyncioChildWatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lose(monkeypatch)

        async def main() -> None:
            process = await create("read line")
            popen = process._transport.get_extra_info("subprocess")  # type: ignore[attr-defined]
            process.kill()
            popen.wait()
            assert await process.wait() == -signal.SIGKILL

        run(main)

    def test_callbacks_are_replaced_and_removed(watcher: aioreap.AsyncioChildWatcher) -> None:
        async def main() -> None:
            called: asyncio.Future[tuple[object, ...]] = asyncio.get_running_loop().create_future()
            pid = os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "exit 3")
            with watcher:
                assert watcher.is_active()
                watcher.add_child_handler(pid, lambda *_: pytest.fail("called"))
                watcher.add_child_handler(pid, lambda *given: called.set_result(given), "x")
            assert await called == (pid, 3, "x")
            assert not watcher.remove_child_handler(pid)
            assert not watcher._children

            pid = os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "exit 4")
            watcher.add_child_handler(pid, lambda *_: pytest.fail("called"))
            assert watcher.remove_child_handler(pid)
            assert not watcher.remove_child_handler(pid)
            watcher.attach_loop(None)
            watcher.close()
            assert os.waitpid(pid, 0) == (pid, 4 << 8)

        run(main)

    def test_a_copy_by_c_that_lets_go_of_a_child_leaves_it_to_the_parent(
        watcher: aioreap.AsyncioChildWatcher,
    ) -> None:
        async def main() -> None:
            called: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            pid = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000")
            watcher.add_child_handler(pid, lambda _, code: called.set_result(code))
            in_a_copy_by_c(lambda: watcher.remove_child_handler(pid))
            os.kill(pid, signal.SIGKILL)
            assert await called == -signal.SIGKILL

        run(main)

    def test_a_callback_is_given_no_number_for_a_lost_status(
        watcher: aioreap.AsyncioChildWatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lose(monkeypatch)

        async def main() -> None:
            called: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            pid = os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "exit 3")
            watcher.add_child_handler(pid, lambda _, code: called.set_result(code))
            assert isinstance(await called, ExitStatusLost)

        run(main)

    def test_a_closed_loop_leaves_asyncios_children_alone(
        watcher: aioreap.AsyncioChildWatcher,
    ) -> None:
        pid = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000")

        async def main() -> None:
            watcher.add_child_handler(pid, lambda *_: pytest.fail("called"))
            assert watcher._children

        for factory in (aioreap.EventLoop, asyncio.SelectorEventLoop):
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(main())
            del runner
            gc.collect()
            assert not watcher._children  # and so no descriptor
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def test_it_has_to_have_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
        def pidfd_open(pid: int) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "pidfd_open", pidfd_open)
        with pytest.raises(PermissionError):
            aioreap.AsyncioChildWatcher()
