"""The routes, through HTTP on loopback with the `openai` client; every answer is compared with `generate`."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from serving_support import KEYS, TEXTS, answer_of, load_tiny, served

from xcllama.serving.api import build_app
from xcllama.serving.engine import Engine, Settings
from xcllama.serving.tenants import Tenants
from xcllama.store import ContextStore

MODEL = "xc-smollm2-135m"


ALPHA = {"Authorization": "Bearer sk-alpha"}


class Served:
    """A server over one store with the tenants alpha (all of `TEXTS`) and beta (one text)."""

    def __init__(self, folder, **bounds):
        self.model, self.processor = load_tiny(cross_attention_mode="joint", context_layer=2)
        self.model.config.answer_threshold = 0.999
        self.path = folder / "corpus.xcs"
        with ContextStore(self.path, self.model, self.processor, "alpha") as store:
            store.add(list(TEXTS), list(TEXTS.values()))
        with ContextStore(self.path, self.model, self.processor, "beta") as store:
            store.add("secret-plan", "Beta turns the valve left at dawn.")
        (folder / "keys").write_text(KEYS)
        bounds = {"max_rows": 4, "max_prompt_tokens": 200, "max_new_tokens": 60, "context_bytes": 4 << 20} | bounds
        bounds = {"max_context_tokens": 1000, "max_body_bytes": 40_000, "max_seconds": 60.0} | bounds
        self.engine = Engine(self.model, self.processor, Settings(str(self.path), MODEL, **bounds))
        self.app = build_app(self.engine, self.engine.settings, Tenants(folder / "keys"))

    def client(self, key: str = "sk-alpha") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, body, key: str = "sk-alpha", **options) -> httpx.Response:
        content = body if isinstance(body, bytes | str) else json.dumps(body)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return httpx.post(f"{self.url}/v1/chat/completions", content=content, headers=headers, timeout=120, **options)

    def expected(self, question: str, documents: list[str], num_tokens: int, **turns) -> str:
        store = self.engine.store("alpha")
        return answer_of(self.model, self.processor, store, question, documents, num_tokens, **turns)

    def wait_for(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served_app = Served(tmp_path_factory.mktemp("serving"))
    with served(served_app.app) as served_app.url:
        yield served_app
    served_app.engine.close()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(question: str, **fields) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": 12} | fields


def test_answers_equal_those_of_generate(server, client):
    documents = ["manual-3", "manual-1"]
    body = {"extra_body": {"contexts": documents, "evidence": True}}
    answer = client.chat.completions.create(**ask("Which way?"), **body)
    choice = answer.choices[0]
    assert choice.message.content == server.expected("Which way?", documents, 12)
    assert (choice.finish_reason, choice.message.role, answer.object) == ("length", "assistant", "chat.completion")
    tokens = sum(server.engine.store("alpha").get(documents).lengths)
    own = len(server.processor(text=["Which way?"])["input_ids"][0])
    assert answer.usage.prompt_tokens_details.cached_tokens == tokens
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens + own, 12)
    assert answer.usage.total_tokens == tokens + own + 12
    for span in choice.evidence:
        assert span["document"] in documents
        assert TEXTS[span["document"]][span["start"] : span["end"]] == span["text"] != ""
    assert 0 < sum(span["weight"] for span in choice.evidence) <= 1.001
    assert (choice.found, 0 < choice.score < 1) == (False, True)
    # in any order, and from what is resident
    again = client.chat.completions.create(**ask("Which way?"), extra_body={"contexts": documents[::-1]})
    assert again.choices[0].message.content == choice.message.content
    # without a context
    alone = client.chat.completions.create(**ask("Which way?")).choices[0]
    assert alone.message.content == server.expected("Which way?", [], 12) != choice.message.content


def test_a_stream_of_several_turns(server, client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which way?"},
        {"role": "assistant", "content": "Left."},
        {"role": "user", "content": [{"type": "text", "text": "Are you"}, {"type": "text", "text": " sure?"}]},
    ]
    fields = ask("", messages=messages, stream=True, stream_options={"include_usage": True}, max_tokens=20)
    fields |= {"logprobs": True, "top_logprobs": 2, "extra_body": {"contexts": ["manual-2"], "evidence": True}}
    chunks = list(client.chat.completions.create(**fields))
    turns = {"history": [("Which way?", "Left.")], "system": "Be brief."}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == server.expected("Are you sure?", ["manual-2"], 20, **turns)
    assert len(chunks) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-2].choices[0].evidence[0]["document"] == "manual-2"
    assert chunks[-1].usage.completion_tokens == 20
    logprobs = [entry for chunk in chunks[:-1] for entry in chunk.choices[0].logprobs.content]
    assert len(logprobs) == 20
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in logprobs)


def test_choices_seeds_and_stops(client):
    fields = ask("Which way?", n=3, temperature=1.2, seed=5) | {"extra_body": {"contexts": ["manual-1"]}}
    first, again = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 36
    greedy = client.chat.completions.create(**ask("Which way?"), extra_body={"contexts": ["manual-1"]})
    text = greedy.choices[0].message.content
    stopped = client.chat.completions.create(
        **ask("Which way?", stop=text[4:6]), extra_body={"contexts": ["manual-1"]}
    )
    assert stopped.choices[0].message.content == text[: text.find(text[4:6])]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12


def test_retrieve_says_what_it_took(server, client):
    fields = ask("Part 3 turns at 111 degrees?") | {"extra_body": {"retrieve": 2, "evidence": True}}
    answer = client.chat.completions.create(**fields)
    taken = [one["document"] for one in answer.retrieved]
    assert taken[0] == "manual-3"
    assert len(taken) == 2
    assert answer.choices[0].message.content == server.expected("Part 3 turns at 111 degrees?", taken, 12)
    assert {span["document"] for span in answer.choices[0].evidence} <= set(taken)
    nothing = client.chat.completions.create(**ask("Xylophone?"), extra_body={"retrieve": 2})
    assert nothing.retrieved == []
    assert (nothing.choices[0].message.content, nothing.choices[0].found) == ("not found in these documents", False)
    assert nothing.usage.total_tokens == 0


def test_an_unsure_answer_is_declined_where_asked_for(client):
    for stream in (False, True):
        fields = ask("Which way?", stream=stream) | {"extra_body": {"contexts": ["manual-1"], "decline": True}}
        answer = client.chat.completions.create(**fields)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text == "not found in these documents"


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "xcllama"
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    client.chat.completions.create(**ask("Which way?"), extra_body={"contexts": ["manual-1"]})
    text = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['xcllama_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(values['xcllama_tokens_total{kind="context"}']) >= len(TEXTS["manual-1"])
    assert float(values["xcllama_resident_contexts"]) >= 1
    assert float(values["xcllama_steps"]) >= 11
    for word in ("alpha", "beta", "manual", "secret"):
        assert word not in text


REFUSED = {
    "no json": (b"{", 400, "invalid_json", None),
    "no unicode": (b'{"model": "\xff"}', 400, "invalid_json", None),
    "a list": (b"[]", 400, "invalid_value", None),
    "another model": (ask("?", model="gpt-5"), 404, "model_not_found", "model"),
    "tools": (ask("?", tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools"),
    "json mode": (ask("?", response_format={"type": "json_object"}), 400, "unsupported_parameter", "response_format"),
    "a penalty": (ask("?", presence_penalty=0.5), 400, "unsupported_parameter", "presence_penalty"),
    "a bias": (ask("?", logit_bias={"5": 1}), 400, "unsupported_parameter", "logit_bias"),
    "a misspelled field": (ask("?", max_token=5), 400, "unsupported_parameter", "max_token"),
    "a namespace": (ask("?", namespace="beta"), 400, "unsupported_parameter", "namespace"),
    "an image": (
        ask("?", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "invalid_value",
        None,
    ),
    "a tool's answer": (ask("?", messages=[{"role": "tool", "content": "x"}]), 400, "invalid_value", None),
    "no question": (ask("?", messages=[]), 400, "invalid_value", "messages"),
    "no user last": (ask("?", messages=[{"role": "assistant", "content": "x"}]), 400, "invalid_value", None),
    "a string for a number": (ask("?", temperature="1"), 400, "invalid_value", "temperature"),
    "a bool for a number": (ask("?", n=True), 400, "invalid_value", "n"),
    "not a number": (json.dumps(ask("?", temperature=float("nan"))), 400, "invalid_value", "temperature"),
    "too hot": (ask("?", temperature=3), 400, "invalid_value", "temperature"),
    "too many choices": (ask("?", n=9), 400, "invalid_value", "n"),
    "too long an answer": (ask("?", max_tokens=61), 400, "invalid_value", "max_tokens"),
    "no answer": (ask("?", max_tokens=0), 400, "invalid_value", "max_tokens"),
    "an empty stop": (ask("?", stop=""), 400, "invalid_value", None),
    "logprobs of nothing": (ask("?", top_logprobs=2), 400, "invalid_value", None),
    "both": (ask("?", contexts=["manual-1"], retrieve=1), 400, "invalid_value", None),
    "twice": (ask("?", contexts=["manual-1", "manual-1"]), 400, "invalid_value", None),
    "evidence of nothing": (ask("?", evidence=True), 400, "invalid_value", None),
    "no words": (ask(" ", retrieve=1), 400, "invalid_value", "messages"),
    "an unknown context": (ask("?", contexts=["manual-99"]), 404, "context_not_found", "contexts"),
    "a context of beta": (ask("?", contexts=["secret-plan"]), 404, "context_not_found", "contexts"),
    "a long question": (ask("x" * 300), 400, "context_length_exceeded", "messages"),
    "a huge body": (ask("x" * 50_000), 413, "body_too_large", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(server, name):
    body, status, code, param = REFUSED[name]
    response = server.post(body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error["message"].endswith(".")
    if param is not None:
        assert error["param"] == param
    # neither paths nor other tenants
    assert str(server.path) not in response.text
    assert "beta" not in response.text
    if isinstance(body, dict) and "stream" not in body:
        assert server.post(body | {"stream": True}).status_code == status


def test_neutral_values_are_taken(server):
    body = ask("?", presence_penalty=0, tools=[], response_format={"type": "text"}, logit_bias=None, stop=None)
    assert server.post(body).status_code == 200


def test_the_client_raises_its_own_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="no context 'manual-99'"):
        client.chat.completions.create(**ask("?"), extra_body={"contexts": ["manual-99"]})
    with pytest.raises(openai.BadRequestError, match="`tools` is not supported"):
        client.chat.completions.create(**ask("?"), tools=[{"type": "function", "function": {"name": "f"}}])
    for key, message in (("sk-wrong", "not known"), ("sk-old", "expired")):
        with pytest.raises(openai.AuthenticationError, match=message):
            server.client(key).models.list()
    assert httpx.get(f"{server.url}/v1/models").headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "no such route."
    assert httpx.delete(f"{server.url}/v1/models").json()["error"]["type"] == "invalid_request_error"


def test_tenants_do_not_see_each_other(server):
    alpha, beta = (
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer sk-{name}"}, timeout=120)
        for name in ("alpha", "beta")
    )
    listed = [one["id"] for one in beta.get("/v1/contexts").json()["data"]]
    assert listed == ["secret-plan"]
    assert "secret-plan" not in alpha.get("/v1/contexts").text
    missing, theirs = (alpha.get(f"/v1/contexts/{name}") for name in ("missing-doc", "secret-plan"))
    assert (missing.status_code, missing.text.replace("missing-doc", "secret-plan")) == (404, theirs.text)
    assert dict(missing.headers).keys() == dict(theirs.headers).keys()
    assert alpha.delete("/v1/contexts/secret-plan").status_code == 404
    found = alpha.post("/v1/chat/completions", json=ask("valve at dawn", retrieve=3)).json()
    assert found["retrieved"] == []
    # an id of one's own by the same name stays one's own
    assert alpha.post("/v1/contexts", json={"id": "secret-plan", "text": "Alpha's."}).status_code == 202
    server.wait_for(lambda: alpha.get("/v1/contexts/secret-plan").json()["status"] == "ready")
    assert beta.get("/v1/contexts/secret-plan").json()["tokens"] == len("Beta turns the valve left at dawn.")
    assert alpha.delete("/v1/contexts/secret-plan").json()["deleted"] is True
    assert len(beta.get("/v1/contexts").json()["data"]) == 1


def test_documents_come_and_go(server):
    http = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer sk-alpha"}, timeout=120)
    taken = http.post("/v1/contexts", json={"id": "new/ä", "text": "The new part turns twice.", "metadata": {"a": 1}})
    assert (taken.status_code, taken.json()["status"]) == (202, "encoding")
    server.wait_for(lambda: http.get("/v1/contexts/new/ä").json()["status"] == "ready")
    assert http.get("/v1/contexts/new%2F%C3%A4").json()["passages"] == 1
    answer = http.post("/v1/chat/completions", json=ask("?", contexts=["new/ä"])).json()
    assert answer["choices"][0]["message"]["content"] == server.expected("?", ["new/ä"], 12)
    # a replaced text is read, not what was resident
    http.post("/v1/contexts", json={"id": "new/ä", "text": "The new part turns thrice. " * 3})
    server.wait_for(lambda: http.get("/v1/contexts/new/ä").json()["status"] == "ready")
    again = http.post("/v1/chat/completions", json=ask("?", contexts=["new/ä"])).json()
    assert again["choices"][0]["message"]["content"] == server.expected("?", ["new/ä"], 12)
    assert again["usage"] != answer["usage"]
    page = "<html><body><h1>Pump</h1><p>It turns left.</p></body></html>"
    sent = http.post("/v1/contexts", files={"file": ("pump.html", page)}, data={"id": "pump"})
    assert sent.status_code == 202, sent.text
    server.wait_for(lambda: http.get("/v1/contexts/pump").json()["status"] == "ready")
    assert server.engine.store("alpha").text("pump")[0].startswith("# Pump")
    ids = [one["id"] for one in http.get("/v1/contexts?limit=3").json()["data"]]
    assert ids == sorted([*TEXTS, "new/ä", "pump"])[:3]
    rest = http.get(f"/v1/contexts?after={ids[-1]}").json()
    assert [one["id"] for one in rest["data"]] == sorted([*TEXTS, "new/ä", "pump"])[3:]
    assert rest["has_more"] is False
    for name in ("new/ä", "pump"):
        assert http.delete(f"/v1/contexts/{name}").json() == {"id": name, "object": "context", "deleted": True}
        assert http.get(f"/v1/contexts/{name}").status_code == 404
        assert http.post("/v1/chat/completions", json=ask("?", contexts=[name])).status_code == 404
    refused = {
        "a kind of file": ({"files": {"file": ("x.exe", b"MZ")}}, "unreadable_file"),
        "no pdf": ({"files": {"file": ("x.pdf", b"MZ")}}, "unreadable_file"),
        "no file": ({"files": {"other": ("x.txt", b"MZ")}}, None),
        "no text": ({"json": {"id": "x", "text": ""}}, "invalid_value"),
        "a number": ({"json": {"id": 5, "text": "x"}}, "invalid_value"),
        "half a character": ({"content": b'{"id": "x", "text": "\\ud800"}'}, "invalid_json"),
        "a long text": ({"json": {"id": "x", "text": "x" * 33_000}}, "context_length_exceeded"),
        "a namespace": ({"json": {"id": "x", "text": "x", "namespace": "beta"}}, "unsupported_parameter"),
    }
    for name, (body, code) in refused.items():
        response = http.post("/v1/contexts", **body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, code), name
        assert "/tmp" not in response.text


def test_what_cannot_be_encoded_says_so_until_it_is_deleted(server):
    http = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer sk-beta"}, timeout=120)
    http.post("/v1/contexts", json={"id": "long", "text": "x" * 1500})
    server.wait_for(lambda: http.get("/v1/contexts/long").json()["status"] == "failed")
    assert "at most 1000" in http.get("/v1/contexts/long").json()["error"]
    assert [one["status"] for one in http.get("/v1/contexts").json()["data"]] == ["failed", "ready"]
    assert http.delete("/v1/contexts/long").status_code == 200
    assert http.get("/v1/contexts/long").status_code == 404


def test_a_full_queue_is_refused_and_a_client_that_goes_away_frees_its_row(server):
    scheduler = server.engine.scheduler
    server.wait_for(lambda: not scheduler.running)
    scheduler.max_waiting, held = -scheduler.max_rows, scheduler.max_waiting
    try:
        response = server.post(ask("?"))
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1"
    finally:
        scheduler.max_waiting = held
    for stream in (True, False):
        steps, body = scheduler.steps, json.dumps(ask("?", max_tokens=60, n=4, stream=stream)).encode()
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-alpha\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            server.wait_for(lambda: scheduler.running)
        server.wait_for(lambda: not scheduler.running)
        assert scheduler.steps < steps + 59


def test_many_clients_get_their_own_answers(server, client):
    """More than there are rows, each on contexts of its own; some read slowly."""
    questions = [(f"Question {n}?", sorted({f"manual-{n % 8}", f"manual-{n * 3 % 8}"})) for n in range(24)]
    answers: dict[int, str] = {}

    def run(number: int) -> None:
        question, documents = questions[number]
        fields = ask(question, stream=True) | {"extra_body": {"contexts": documents}}
        text = ""
        for chunk in client.chat.completions.create(**fields):
            text += chunk.choices[0].delta.content or ""
            if number % 6 == 0:
                time.sleep(0.02)
        answers[number] = text

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (question, documents) in enumerate(questions):
        assert answers[number] == server.expected(question, documents, 12)


def test_slow_readers_keep_nobody_waiting(server, client):
    """200 clients that ask and do not read: another one is answered, and they are when they read."""
    scheduler = server.engine.scheduler
    scheduler.max_waiting, held = 400, scheduler.max_waiting
    body = json.dumps(ask("?", max_tokens=2, stream=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer sk-alpha\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = client.chat.completions.create(**ask("Which way?"), extra_body={"contexts": ["manual-1"]})
        assert answer.choices[0].message.content == server.expected("Which way?", ["manual-1"], 12)
        for connection in slow:
            text = b""
            while part := connection.recv(64):
                text += part
            assert text.startswith(b"HTTP/1.1 200")
            assert b"data: [DONE]" in text
    finally:
        scheduler.max_waiting = held
        for connection in slow:
            connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path):
    one = Served(tmp_path, max_seconds=0.3)
    with served(one.app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-alpha\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        # an answer that takes longer than a request may
        headers = {"Authorization": "Bearer sk-alpha"}
        one.engine.scheduler.step = lambda step=one.engine.scheduler.step: (time.sleep(0.1), step())
        late = httpx.post(f"{url}/v1/chat/completions", json=ask("?", max_tokens=60), headers=headers, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    one.engine.close()


def test_a_stopped_server_goes_on_with_what_it_accepted(tmp_path):
    one = Served(tmp_path)
    encode, blocked = one.engine.add, threading.Event()

    async def wait(*args) -> None:
        blocked.set()
        await asyncio.sleep(600)

    one.engine.add = wait
    app = build_app(one.engine, one.engine.settings, Tenants(tmp_path / "keys"))
    headers = {"Authorization": "Bearer sk-alpha"}
    with served(app) as url:
        assert httpx.post(f"{url}/v1/contexts", json={"id": "late", "text": "It turns."}, headers=headers).is_success
        again = httpx.post(f"{url}/v1/contexts", json={"id": "late", "text": "It turns."}, headers=headers)
        assert again.json()["error"]["code"] == "encoding"
        assert httpx.delete(f"{url}/v1/contexts/late", headers=headers).status_code == 409
        assert blocked.wait(60)
    one.engine.add = encode
    app = build_app(one.engine, one.engine.settings, Tenants(tmp_path / "keys"))
    with served(app) as url:
        one.wait_for(lambda: httpx.get(f"{url}/v1/contexts/late", headers=headers).json()["status"] == "ready")
    assert not list((one.path / "uploads").iterdir())
    # a failed scheduler is no healthy server
    one.engine.close()
    with served(app) as url:
        assert httpx.get(f"{url}/healthz").status_code == 503


def test_the_examples_of_the_documentation_run(server, client, tmp_path, capsys):
    """Python as it is written; curl too, with the test's address and key."""
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    here = [("http://127.0.0.1:8000", server.url), ('api_key="none"', 'api_key="sk-alpha"')]
    for before, after in here:
        page = page.replace(before, after)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert "manual-3" in capsys.readouterr().out
    if shutil.which("curl") is None:
        pytest.skip("the Python example ran; there is no curl")
    (tmp_path / "valve.md").write_text("# Valve\n\nIt turns right.")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    printed = []
    for line in block.splitlines():
        line = line.replace("curl ", 'curl -H "Authorization: Bearer sk-alpha" ')
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert '"error": {' not in done.stdout
        assert '"error":{' not in done.stdout, done.stdout
        printed.append(done.stdout)
        if "-d" in line or "-F" in line:
            server.wait_for(
                lambda: "encoding" not in str(httpx.get(f"{server.url}/v1/contexts", headers=ALPHA).json())
            )
    assert '"deleted":true' in printed[-2]
    assert "xcllama_requests_total" in printed[-1]
    httpx.delete(f"{server.url}/v1/contexts/valve", headers=ALPHA)


def test_keys(tmp_path):
    path = tmp_path / "keys"
    wrong = {
        "sk-one": "got 1 words",
        "sk a soon": "no ISO 8601 date",
        "# none": "no keys",
        "sk a\nsk b": "a key twice",
    }
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            Tenants(path)
        assert "sk-one" not in str(error.value)
    path.write_text("sk-a a 2999-01-01T00:00\n\n# comment\nsk-b b\n")
    assert Tenants(path).namespaces == ["a", "b"]
    assert Tenants(path).namespace_of("bearer sk-a") == "a"
    assert Tenants(None, "own").namespace_of(None) == "own"
