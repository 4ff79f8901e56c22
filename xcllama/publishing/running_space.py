"""A Space in a process of its own, as the Hub runs it: started, waited for, asked, ended."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from gradio_client import Client

from xcllama.publishing.checking import clean_environment, clean_python

# what a clean process does with the folder of a Space, its argument
RUN = """
import importlib.util, runpy
assert importlib.util.find_spec("modeling_xcllama") is None
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[1] + "/app.py", run_name="__main__")
"""
# what a machine that does much else may take
PATIENCE_SECONDS = 1800.0


@contextmanager
def served(
    command: list[str], environment: dict[str, str], log: Path, folder: Path | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start a Gradio app and yield its address on loopback and its process, which ends with the block.

    Args:
        command: starts it on the port in GRADIO_SERVER_PORT.
        environment: of the process, save for that port.
        log: new file for what it prints.
        folder: where it runs; None: here.

    Raises:
        ValueError: it ended, or did not listen in time; the message ends with the last line of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = environment | {"GRADIO_SERVER_PORT": str(port)}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                reason = (log.read_text().strip().splitlines() or ["no message"])[-1]
                raise ValueError(f"the Space does not start: {reason}")
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served_clean(space: Path, model: Path, uploads: Path | None = None) -> Iterator[str]:
    """The address of the Space in a folder with the model in another, in a process with empty caches.

    Args:
        uploads: where it keeps files while it reads them; None: a folder that goes with it.

    Raises:
        ValueError: it does not start.
    """
    with tempfile.TemporaryDirectory() as home:
        environment = clean_environment(home) | {"XCLLAMA_MODEL": str(model.absolute())}
        environment |= {"GRADIO_TEMP_DIR": str(uploads or f"{home}/uploads")}
        command = [*clean_python(RUN), str(space.absolute())]
        with served(command, environment, Path(home) / "log", Path(home)) as (url, _):
            yield url


def ask(url: str, text: str, question: str) -> str:
    """What the Space answers to a question about a pasted text.

    Raises:
        ValueError: it refuses the text or the question, or shows no time or nothing of the text.
    """
    options = {"verbose": False, "analytics_enabled": False, "httpx_kwargs": {"timeout": PATIENCE_SECONDS}}
    try:
        client = Client(url, **options)
        status, chosen, *_ = client.predict("text", text, [], api_name="/add_text")
        answer, figures, _, places, *_ = client.predict(question, chosen["value"], api_name="/ask")
        client.close()
    except httpx.HTTPError as error:
        raise ValueError(f"the Space does not answer: {error}") from error
    if "first token" not in figures or ("<mark" not in places and "What was read" not in places):
        raise ValueError(f"the Space does not answer: it shows {status!r}, then {figures!r}.")
    return answer
