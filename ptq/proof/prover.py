"""A process that has never imported ptq, and loads folders there."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ptq.proof import loader

__all__ = ["StockProver"]

_PATIENCE = 300  # seconds for a start on a busy machine and one small model
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONWARNINGS")
_SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class StockProver:
    """Loads folders in a process of its own, with the transformers that is installed here and without ptq.

    The process starts with the first request, which takes seconds; use the object as a context manager to end it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StockProver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a later request starts another one."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()  # it has nothing to lose, and its regular end takes a second
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()

    def try_to_load(self, **request: Any) -> dict[str, Any]:
        """`ptq.proof.loader.try_to_load` in the other process; a process that dies or hangs is a problem like others.

        Args:
            request: the arguments.
        """
        try:
            process = self._started()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and the answer says so
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            return self._answer(process)
        except OSError as error:
            self.close()
            return {"problem": f"no process could be started to try it: {error}", "forward": "not run"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(loader.__file__).resolve())],  # -P: modules beside it are no packages
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment | _SETTINGS,
            )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert process.stdout is not None
        limit, read = time.monotonic() + _PATIENCE, b""
        while not read.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, limit - time.monotonic()))
            more = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not more:
                self.close()
                ended = f"ended with exit code {process.returncode}" if ready else f"took more than {_PATIENCE} seconds"
                return {"problem": f"the process that loaded it {ended}", "forward": "not run"}
            read += more
        answer: dict[str, Any] = json.loads(read.decode().removeprefix(loader.ANSWER))
        return answer
