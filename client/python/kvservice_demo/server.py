"""A server of the demo's own, on Unix sockets in a temporary folder and stopped at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from kvservice import Client

_PROGRAM = "kvservice"
_READY_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.01

# Room for the longest prompt of the demo's model (23 KB per token) several times over.
_POOL_BYTES = 1 << 30
_LOG_LINES_SHOWN = 20


class ServerFailedError(RuntimeError):
    """The server could not be found, did not start, or ended by itself."""


def find_program() -> Path:
    """The server's program: in $KVSERVICE_BIN_DIR, in this checkout's build/bin, or on the path."""
    folders = [Path(__file__).resolve().parents[3] / "build" / "bin"]
    if folder := os.environ.get("KVSERVICE_BIN_DIR"):
        folders.insert(0, Path(folder))
    for candidate in folders:
        if os.access(candidate / _PROGRAM, os.X_OK):
            return candidate / _PROGRAM
    if found := shutil.which(_PROGRAM):
        return Path(found)
    raise ServerFailedError("no kvservice program found: run `make build`, or name an --endpoint")


def describe_server(admin_endpoint: str) -> str:
    """Version and device of the server behind an admin listener."""
    with Client(admin_endpoint) as client:
        info = client.server_info()
    parts = [f"kvservice {info.version}", f"{info.device} device", info.instruction_set]
    return " · ".join(part for part in parts if part)


class OwnServer:
    """Runs a server for as long as the `with` block lasts."""

    def __init__(self, *flags: str, pool_bytes: int = _POOL_BYTES) -> None:
        """`flags` are more of the program's own."""
        self._program = find_program()
        self._flags = [*flags, f"--pool-bytes={pool_bytes}"]
        self._folder = tempfile.TemporaryDirectory(prefix="kvservice-")
        self._log_path = Path(self._folder.name) / "server.log"
        self._ready_path = Path(self._folder.name) / "ready"
        self.endpoint = f"unix:{self._folder.name}/data.sock"
        self.admin_endpoint = f"unix:{self._folder.name}/admin.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OwnServer:
        command = [
            str(self._program),
            f"--listen={self.endpoint}",
            f"--admin-listen={self.admin_endpoint}",
            f"--ready-file={self._ready_path}",
            *self._flags,
        ]
        with self._log_path.open("wb") as log:
            # A session of its own, so that Ctrl-C reaches the demo first and the server by SIGTERM.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        # Connecting before the server listens would cost a second of the channel's backoff.
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while not self._ready_path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ServerFailedError(f"{self._program} did not start:\n{self._log_tail()}")
            time.sleep(_POLL_S)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])
