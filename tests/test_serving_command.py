"""`xcllama serve` as a process: refusals at the start, an answer that SIGTERM does not cut off."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from publishing_support import make_checkpoint
from typer.testing import CliRunner

from xcllama.commands.serve import app
from xcllama.serving.running import running

DEMO = Path(__file__).resolve().parent.parent / "scripts" / "serve_demo.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from elsewhere"),
        (["--host", "server.example"], "can be reached from elsewhere"),
        (["--max-replicas", "3"], "give --replicas too"),
    ],
)
def test_refusals(arguments, message, tmp_path):
    done = CliRunner().invoke(app, ["anything", "--store", str(tmp_path / "x.xcs"), *arguments])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_sigterm_lets_answers_end(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "cache", tmp_path / "tiny-checkpoint")
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    bounds = ["--max-prompt-tokens", "200", "--max-new-tokens", "400", "--rows", "2"]
    with running([str(checkpoint), "--store", str(tmp_path / "corpus.xcs"), *bounds]) as server:
        document = {"id": "a", "text": "The lamp was lit in August."}
        assert httpx.post(f"{server.url}/v1/contexts", json=document, timeout=60).status_code == 202
        while httpx.get(f"{server.url}/v1/contexts/a", timeout=60).json()["status"] == "encoding":
            time.sleep(0.5)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="tiny-checkpoint",
                messages=[{"role": "user", "content": "When?"}],
                # a random model that ends by itself when it draws its end token
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"contexts": ["a"]},
            )
            chunks = [next(stream)]
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            chunks += stream
        stopping.join()
        assert chunks[-2].choices[0].finish_reason in ("length", "stop")
        assert chunks[-1].usage.completion_tokens >= 1
        assert server.process.returncode == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/healthz")


def test_the_demo_answers_from_smollm2(smollm2_folder):
    """`make serve-demo`: three questions about the passages, answered, and a server that ends by itself."""
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("context tokens, first token after") == 3
    assert done.stdout.count("characters") == 3
    assert "the server has stopped" in done.stdout
