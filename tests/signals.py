"""What a test run does with the signals that it was started with."""

from __future__ import annotations

import signal
import threading


def restore_signals() -> None:
    """Give SIGHUP, SIGINT and SIGQUIT their defaults again, where this is Python's main thread.

    A background job is started with these ignored, and so would be the children of the tests.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
