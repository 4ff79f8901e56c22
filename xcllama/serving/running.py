"""A server in a process of its own: started, awaited, and ended as an operator would end it."""

import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# what a machine that does much else may take
PATIENCE_SECONDS = 900.0


@dataclass
class Running:
    """A server: its address and its process."""

    url: str
    process: subprocess.Popen

    def stop(self) -> int:
        """Let it answer what was asked and end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[Running]:
    """`xcllama serve` with `arguments` on a free port of loopback, until the block ends.

    Raises:
        ValueError: it ended, or did not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "xcllama", "serve", *arguments, "--port", str(port)]
    server = Running(f"http://127.0.0.1:{port}", subprocess.Popen(command))
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _answers(port):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the server does not answer: {' '.join(command)}")
            time.sleep(0.3)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
