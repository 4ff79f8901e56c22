"""Start `xcllama serve`, add documents through its API, ask three questions with the `openai` client, stop it.

python scripts/serve_demo.py [--checkpoint FOLDER] [--replicas N]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import httpx
import openai
from load_model import CHECKPOINT

from xcllama.serving.running import running

PASSAGES = Path(__file__).parent / "passages"


def add(url: str) -> dict[str, str]:
    """Add every document; ids and a question each, when all are encoded."""
    questions = {}
    for path in sorted(PASSAGES.glob("*.json")):
        document = json.loads(path.read_text())
        httpx.post(f"{url}/v1/contexts", json={"id": path.stem, "text": document["text"]}).raise_for_status()
        questions[path.stem] = document["questions"][0][0]
    while any(one["status"] == "encoding" for one in httpx.get(f"{url}/v1/contexts").json()["data"]):
        time.sleep(0.1)
    return questions


def ask(client: openai.OpenAI, model: str, document: str, question: str) -> None:
    """Stream an answer; say what was read and what was attended to."""
    begin, first = time.perf_counter(), None
    print(f"\n{question}\n  ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=24,
        extra_body={"contexts": [document], "evidence": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            first = first or time.perf_counter() - begin
            print(choice.delta.content or "", end="", flush=True)
            if choice.finish_reason:
                evidence = choice.evidence[:1]
        usage = chunk.usage
    print(f"\n  {usage.prompt_tokens_details.cached_tokens} context tokens, first token after {1e3 * first:.0f} ms")
    for span in evidence:
        print(f"  from {span['document']}, characters {span['start']} to {span['end']}: {span['text']!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--replicas", help="on Ray Serve; default: one process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--replicas", arguments.replicas] if arguments.replicas else []
        command = [arguments.checkpoint, "--store", f"{scratch}/corpus.xcs", *options]
        with running(command) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            model = client.models.list().data[0].id
            for document, question in list(add(server.url).items())[:3]:
                ask(client, model, document, question)
            if status := server.stop():
                raise SystemExit(f"the server ended with status {status}")
    print("\nthe server has stopped")


if __name__ == "__main__":
    main()
