"""A live server with metrics for the tests of this folder, and what keeps it busy."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("KVSERVICE_BIN_DIR", ROOT / "build" / "bin")).resolve()
LIMIT_S = 90


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode()


class LiveServer:
    """With a disk tier, and every row audited."""

    def __init__(self, folder):
        self.folder = folder
        self.endpoint = f"unix:{folder}/socket"
        self.metrics = f"127.0.0.1:{free_port()}"
        self.processes = []
        self.start("server", [
            str(BIN / "kvservice"), "--listen", self.endpoint, "--pool-bytes", "256MiB",
            "--data-dir", f"{folder}/data", "--audit-rate", "1", "--slow-call", "1ms",
            "--metrics-listen", self.metrics])

    def start(self, name, command):
        """A process that ends with this object; what it prints is in NAME.log."""
        with open(self.folder / f"{name}.log", "w", encoding="utf-8") as log:
            self.processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def stop(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(timeout=30)

    def kvctl(self, *arguments):
        return subprocess.run([str(BIN / "kvctl"), "--endpoint", self.endpoint, *arguments],
                              capture_output=True, text=True, check=False)

    def load(self):
        """A second or so of it: chosen tokens, dense ones, and a call that fails."""
        for arguments in (["bench", "--policy=certified", "--tokens=4096", "--count=60"],
                          ["bench", "--policy=cis", "--tokens=4096", "--count=20"],
                          ["bench", "--policy=dense", "--tokens=512", "--count=60"]):
            outcome = self.kvctl(*arguments)
            assert outcome.returncode in (0, 4), outcome.stderr
        self.kvctl("sequence", "suspend", "0" * 32)

    @contextlib.contextmanager
    def under_load(self):
        """Calls of one sequence come all the while. It stays behind, for its lease."""
        before = self.number("kvservice_attend_rows_total")
        busy = subprocess.Popen([str(BIN / "kvctl"), "--endpoint", self.endpoint, "bench",
                                 "--policy=certified", "--tokens=4096", "--count=1000000"],
                                stdout=subprocess.DEVNULL)
        try:
            self.wait_until(lambda: self.number("kvservice_attend_rows_total") > before)
            yield
        finally:
            assert busy.poll() is None, "it has ended too early"
            busy.terminate()
            busy.wait(timeout=LIMIT_S)

    def number(self, name):
        """A metric without labels."""
        scrape = fetch(f"http://{self.metrics}/metrics")
        return float(re.search(rf"^{name} (\S+)$", scrape, re.MULTILINE).group(1))

    @staticmethod
    def wait_until(is_so):
        end = time.monotonic() + LIMIT_S
        while not is_so():
            assert time.monotonic() < end
