"""Ray Serve: two replicas under many clients, one of them killed, uploads meanwhile; a snapshot on S3 behind them."""

import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from serving_support import KEYS, TEXTS, answer_of, load_tiny

pytest.importorskip("ray.serve", reason="the extra `serving` is not installed")

import ray
from ray import serve

from xcllama.models import load_model
from xcllama.serving.deployment import APP, start, stop
from xcllama.serving.engine import Settings
from xcllama.store import ContextStore

MODEL, CLIENTS, NUM_TOKENS = "tiny", 32, 8
QUESTIONS = [(f"Question {n}?", sorted({f"manual-{n % 8}", f"manual-{n * 5 % 8}"})) for n in range(16)]


class Cluster:
    """Two replicas over a store, and what `generate` answers to `QUESTIONS`."""

    def __init__(self, folder: Path):
        # as a user's: replicas import nothing of the tests
        self.load_model = partial(load_model, str(folder / "model"))
        self.model, self.processor = self.load_model()
        self.url = f"http://127.0.0.1:{free_port()}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="sk-alpha", max_retries=0, timeout=120)
        path = folder / "corpus.xcs"
        self.deploy(str(path), folder / "keys")
        with ContextStore(path, self.model, self.processor, "alpha") as store:
            self.expected = [answer_of(self.model, self.processor, store, *one, NUM_TOKENS) for one in QUESTIONS]

    def deploy(self, store: str, keys, **options) -> None:
        """Serve `store`, instead of what is served now."""
        bounds = {"max_rows": 8, "max_prompt_tokens": 200, "max_new_tokens": 60, "context_bytes": 4 << 20}
        settings = Settings(store, MODEL, max_context_tokens=1000, max_seconds=60.0, **bounds, **options)
        start(self.load_model, settings, replicas=(2, 2), cpus=0.5, keys=keys, port=int(self.url.rpartition(":")[2]))

    def ask(self, number: int, stream: bool) -> str:
        question, documents = QUESTIONS[number]
        fields = {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": NUM_TOKENS}
        fields |= {"stream": stream, "extra_body": {"contexts": documents}}
        answer = self.client.chat.completions.create(**fields)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    def load(self, seconds: float, meanwhile: Callable[[], None] | None = None) -> tuple[int, list[Exception]]:
        """32 clients for so long; every answer is compared. How many there were, and what failed."""
        counts, failed, end = [0] * CLIENTS, [], time.monotonic() + seconds

        def run(own: int) -> None:
            while not counts[own] or time.monotonic() < end:
                number = (own * 7 + counts[own]) % len(QUESTIONS)
                counts[own] += 1
                try:
                    answer = self.ask(number, stream=own % 2 == 0)
                except openai.APIError as error:
                    failed.append(error)
                else:
                    assert answer == self.expected[number], QUESTIONS[number]

        results = []
        threads = [threading.Thread(target=lambda own=own: results.append(run(own))) for own in range(CLIENTS)]
        for thread in threads:
            thread.start()
        if meanwhile is not None:
            meanwhile()
        for thread in threads:
            thread.join()
        # a wrong answer would have ended its thread
        assert len(results) == CLIENTS
        return sum(counts), failed

    def replicas(self) -> set[str]:
        """The names of the actors."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in actors if "#replica#" in actor["name"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    (folder / "keys").write_text(KEYS)
    model, processor = load_tiny()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with ContextStore(folder / "corpus.xcs", model, processor, "alpha") as store:
        store.add(list(TEXTS), list(TEXTS.values()))
    return folder


@pytest.fixture(scope="module")
def cluster(folder):
    yield Cluster(folder)
    stop()


def test_many_clients_over_two_replicas(cluster):
    answered, failed = cluster.load(3)
    assert answered >= CLIENTS
    assert failed == []


def test_an_upload_while_questions_run(cluster):
    http = httpx.Client(base_url=cluster.url, headers={"Authorization": "Bearer sk-alpha"}, timeout=120)
    seen = []

    def upload() -> None:
        body = {"id": "uploaded", "text": "The new part turns twice. " * 20}
        assert http.post("/v1/contexts", json=body).status_code == 202
        while (status := http.get("/v1/contexts/uploaded").json()["status"]) != "ready":
            seen.append(status)
            time.sleep(0.05)

    _, failed = cluster.load(0, upload)
    assert failed == []
    assert set(seen) <= {"encoding"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "contexts": ["uploaded"], "max_tokens": 3}
    # whichever replica encoded it, each reads it
    for _ in range(4):
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_question_goes_where_its_contexts_are(cluster):
    """A new set of contexts, asked for six times: one replica has it, not both."""

    def resident() -> int:
        # replicas that are idle differ in what they did, and stay as they are
        calls = [handle.call.remote("stats") for _ in range(40)]
        distinct = {tuple(call.result()["result"].items()) for call in calls}
        assert len(distinct) == 2
        return sum(dict(one)["resident_contexts"] + dict(one)["context_evictions"] for one in distinct)

    handle = serve.get_deployment_handle("replica", APP)
    before = resident()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
    body["contexts"] = ["manual-0", "manual-6", "manual-7"]
    for _ in range(6):
        response = httpx.post(
            f"{cluster.url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer sk-alpha"}, timeout=120
        )
        assert response.status_code == 200
        # the front learns within moments who holds what
        time.sleep(0.5)
    assert resident() == before + 1


def test_errors_come_through(cluster):
    http = httpx.Client(base_url=cluster.url, headers={"Authorization": "Bearer sk-beta"}, timeout=120)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "contexts": ["manual-1"]}
    for stream in (False, True):
        error = http.post("/v1/chat/completions", json=body | {"stream": stream})
        assert (error.status_code, error.json()["error"]["code"]) == (404, "context_not_found")
    assert http.get("/v1/contexts").json()["data"] == []
    assert http.delete("/v1/contexts/manual-1").status_code == 404
    assert httpx.get(f"{cluster.url}/healthz").json() == {"status": "ok"}


def test_a_replica_that_is_killed_comes_back_and_loses_no_request(cluster):
    before = cluster.replicas()
    assert len(before) == 2

    def kill() -> None:
        time.sleep(0.5)
        # ends its process, as a lost machine would
        ray.kill(ray.get_actor(min(before), namespace="serve"))

    answered, failed = cluster.load(3, kill)
    # every request was answered, or failed with an error that says why
    assert len(failed) < answered
    for error in failed:
        assert "replica" in str(error), error
    end = time.monotonic() + 120
    while len(cluster.replicas()) < 2 or min(before) in cluster.replicas():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert cluster.load(0)[1] == []


def test_a_snapshot_on_s3_behind_two_replicas(cluster, folder, bucket, tmp_path):
    """The same server over a snapshot, of which each replica fetches what it serves; it takes no documents."""
    with ContextStore(folder / "corpus.xcs", cluster.model, cluster.processor, "alpha") as local:
        local.snapshot(f"{bucket}/corpus")
    access = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}}
    options = {"cache_folder": str(tmp_path), "storage_options": access}
    (folder / "alpha").write_text("sk-alpha alpha")
    cluster.deploy(f"{bucket}/corpus", folder / "alpha", store_options=options)
    answered, failed = cluster.load(1)
    assert answered >= CLIENTS
    assert failed == []
    http = httpx.Client(base_url=cluster.url, headers={"Authorization": "Bearer sk-alpha"}, timeout=120)
    assert http.post("/v1/contexts", json={"id": "x", "text": "x"}).json()["error"]["code"] == "read_only"
    assert http.delete("/v1/contexts/manual-1").status_code == 403
    assert len(http.get("/v1/contexts").json()["data"]) >= len(TEXTS)


@pytest.mark.slow
def test_a_minute_of_many_clients(cluster):
    answered, failed = cluster.load(60)
    assert answered > 10 * CLIENTS
    assert failed == []
