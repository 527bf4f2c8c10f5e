# SPDX-License-Identifier: MIT OR Apache-2.0
"""The parent's side of gpu_worker.py: a process that times cases, and that a peer may end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SCRIPT = Path(__file__).with_name("gpu_worker.py")


class Worker:
    """Started at the first question, and again at the first after its end."""

    def __init__(self, cache: str):
        self.environment = os.environ | {"TRITON_CACHE_DIR": cache}
        self.process: subprocess.Popen | None = None
        self.deaths = 0

    def ask(self, request: dict, seconds: float) -> dict:
        """The answer to a request, or {"failed": why} if the process ended or time ran out."""
        process = self.process or self._start()
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("@"):
                    return json.loads(line[1:])
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self.deaths += 1
        return {"failed": self._cause(seconds)}

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.process:
            self._kill()
            self.process.wait()
            self.process = None

    def _start(self) -> subprocess.Popen:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=self.environment,
            start_new_session=True,  # compilers that it starts are to end with it
        )
        return self.process

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _cause(self, seconds: float) -> str:
        code = self.process.wait()
        self.process = None
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if re.search("Assertion|Error", line)]
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{cause}: {lines[-1][-200:] if lines else f'no answer in {seconds:.0f} s'}"
