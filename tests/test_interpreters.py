"""Several interpreters in one process, and imports where the main thread is not."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest
from program import run_program


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 13), reason="asyncio itself is not for subinterpreters")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_interpreters_with_a_gil_of_their_own_have_children_at_once(
    loop: str, backend: str
) -> None:
    done = run_program("interpreters", loop)
    if backend == "popen":  # whose children run Python before their exec
        assert done.stdout.count("RuntimeError: ") == 2, done
        assert done.stdout.count("interpreters") >= 2, done
        assert done.stdout.endswith("\nboth have ended\n")
        assert done.status == 0
    else:
        done.expect("both have ended\n")


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "EventLoop", "UvloopEventLoop"])
def test_the_first_import_can_be_in_a_thread(loop: str) -> None:
    run_program("imports", loop).expect("first\nMainThread\nsecond\n")


@pytest.mark.any_backend
@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_a_free_threaded_python_stays_so() -> None:
    script = "import sys, aioreap; sys.exit(sys._is_gil_enabled())"
    assert (
        subprocess.run([sys.executable, "-W", "error", "-c", script], check=False).returncode == 0
    )
