"""Runs pytest in a thread that is not the main one: nothing here may need the main thread."""

from __future__ import annotations

import sys
import threading

import pytest
from signals import restore_signals

restore_signals()
status: list[int] = []
runner = threading.Thread(target=lambda: status.append(int(pytest.main(sys.argv[1:]))))
runner.start()
runner.join()
sys.exit(status[0] if status else 1)
