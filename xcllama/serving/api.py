"""The routes of OpenAI's API that a context store can answer, over an engine in this process or behind Ray Serve."""

import asyncio
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from modeling_xcllama.answer_scores import NOT_FOUND
from xcllama.documents import read_file
from xcllama.store import Hit

from .engine import Settings, usage
from .limits import Limits
from .metrics import Metrics
from .protocol import ApiError, ChatRequest, ContextRequest, event, invalid, parse
from .tenants import Tenants
from .uploads import Uploads

LISTED = 1000
# no text has as many: what has more is refused before its tokens are counted
CHARACTERS_PER_TOKEN = 32


class Backend(Protocol):
    """What answers: see `Engine`."""

    async def search(self, namespace: str, question: str, k: int) -> list[Hit]: ...

    def chat(self, namespace: str, chat: ChatRequest, documents: list) -> AsyncIterator[dict]: ...

    async def add(self, namespace: str, name: str, text: str, metadata: dict, ttl: float | None) -> None: ...

    async def contexts(self, namespace: str, name: str | None, after: str, limit: int) -> list[dict]: ...

    async def delete(self, namespace: str, name: str) -> bool: ...

    async def stats(self) -> dict[str, int]: ...

    async def alive(self) -> bool: ...


async def _tenant(request: Request) -> str:
    return request.app.state.tenants.namespace_of(request.headers.get("authorization"))


Namespace = Annotated[str, Depends(_tenant)]
routes = APIRouter()


def build_app(backend: Backend, settings: Settings, tenants: Tenants) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.uploads.start()
        yield
        await app.state.uploads.stop()

    # no pages of documentation: they load code from elsewhere
    app = FastAPI(title="xcllama", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(routes)
    waiting = None if settings.read_only else Path(settings.store) / "uploads"
    app.state.backend, app.state.settings, app.state.tenants = backend, settings, tenants
    app.state.uploads, app.state.metrics = Uploads(waiting, backend.add, settings.max_uploads), Metrics()
    app.state.created = int(time.time())
    bounds = {"max_bytes": settings.max_body_bytes, "max_seconds": settings.max_seconds}
    app.add_middleware(Limits, **bounds, metrics=app.state.metrics)
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _refusal)
    return app


async def _refusal(request: Request, error: Exception) -> Response:
    """Any error as OpenAI's API says it; what was not foreseen says nothing of itself."""
    if isinstance(error, HTTPException):
        messages = {404: "no such route.", 405: "this route has no such method."}
        error = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed at this request.", code="internal_error", kind="server_error")
    return JSONResponse(error.body(), error.status, error.headers)


# chat


@routes.post("/v1/chat/completions")
async def chat_completions(request: Request, namespace: Namespace) -> Response:
    """Answer the last question from the contexts that are named or found."""
    state, begin = request.app.state, time.monotonic()
    chat = parse(ChatRequest, await request.body())
    if chat.model != state.settings.model_name:
        message = f"there is no model `{chat.model:.80}`, only `{state.settings.model_name}`."
        raise ApiError(404, message, code="model_not_found", param="model")
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": chat.model}
    documents: list = chat.contexts or []
    if chat.retrieve is not None:
        _, _, question = chat.turns()
        documents = await state.backend.search(namespace, question, chat.retrieve)
        head["retrieved"] = [
            {"document": hit.id, "start": hit.start, "end": hit.stop, "score": hit.score} for hit in documents
        ]
    nothing = chat.retrieve is not None and not documents
    events = _nothing_found(chat) if nothing else state.backend.chat(namespace, chat, documents)
    events = _timed(_while_wanted(request, events), state.metrics, begin)
    if not chat.stream:
        return JSONResponse(await _completion(head, chat, events))
    # what is refused is refused with a status: the first event comes before the response begins
    first = await anext(events)
    return StreamingResponse(_chunks(head, chat, first, events), media_type="text/event-stream", headers=NO_CACHE)


NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _nothing_found(chat: ChatRequest) -> AsyncIterator[dict]:
    """An answer without a document: no word of the question stands in the store."""
    for choice in range(chat.n):
        ended = {"logprobs": None, "finish_reason": "stop", "score": 0.0, "found": False}
        yield {"index": choice, "text": NOT_FOUND, **ended} | ({"evidence": []} if chat.evidence else {})
    yield {"usage": usage(0, 0, 0)}


async def _while_wanted(request: Request, events: AsyncIterator[dict]) -> AsyncIterator[dict]:
    """The events until the client goes away, which ends the rows that write them."""
    gone = asyncio.ensure_future(_gone(request))
    upcoming = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(events, None))
            await asyncio.wait({upcoming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                raise ApiError(499, "the client went away.", code="client_closed_request")
            if upcoming.result() is None:
                return
            yield upcoming.result()
    finally:
        gone.cancel()
        if upcoming is not None and not upcoming.done():
            upcoming.cancel()
            await asyncio.wait({upcoming})
        await events.aclose()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _timed(events: AsyncIterator[dict], metrics: Metrics, begin: float) -> AsyncIterator[dict]:
    """The events, counted."""
    first = True
    try:
        async for one in events:
            if first:
                metrics.first_token.observe(time.monotonic() - begin)
                first = False
            if "usage" in one:
                metrics.count(one["usage"])
                metrics.seconds.observe(time.monotonic() - begin)
            yield one
    finally:
        await events.aclose()


EXTRA = ("score", "found", "evidence")


async def _completion(head: dict, chat: ChatRequest, events: AsyncIterator[dict]) -> dict:
    choices: dict[int, dict] = {}
    used = None
    async for one in events:
        used = one.get("usage", used)
        if "index" not in one:
            continue
        choice = choices.setdefault(one["index"], {"text": "", "logprobs": []})
        choice["text"] += one["text"]
        choice["logprobs"] += one["logprobs"] or []
        choice |= {name: one[name] for name in ("finish_reason", *EXTRA) if name in one}
    finished = []
    for index, choice in sorted(choices.items()):
        logprobs = {"content": choice.pop("logprobs"), "refusal": None} if chat.logprobs else None
        message = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
        finished.append({"index": index, "message": message, **choice, "logprobs": logprobs})
    return head | {"object": "chat.completion", "choices": finished, "usage": used}


async def _chunks(head: dict, chat: ChatRequest, first: dict, events: AsyncIterator[dict]) -> AsyncIterator[str]:
    head = head | {"object": "chat.completion.chunk"}
    begun: set[int] = set()
    wants_usage = chat.stream_options is not None and chat.stream_options.include_usage

    def chunk(one: dict) -> str | None:
        if "usage" in one:
            return event(head | {"choices": [], "usage": one["usage"]}) if wants_usage else None
        delta = {"content": one["text"]} if one["text"] else {}
        if one["index"] not in begun:
            begun.add(one["index"])
            delta = {"role": "assistant", "content": one["text"]}
        elif not (delta or one["logprobs"] or one["finish_reason"]):
            return None
        logprobs = {"content": one["logprobs"] or [], "refusal": None} if chat.logprobs else None
        choice = {"index": one["index"], "delta": delta, "finish_reason": one["finish_reason"], "logprobs": logprobs}
        return event(head | {"choices": [choice | {name: one[name] for name in EXTRA if name in one}]})

    try:
        yield chunk(first)
        async for one in events:
            if text := chunk(one):
                yield text
        yield "data: [DONE]\n\n"
    except ApiError as error:
        # the status is sent already
        yield event(error.body())
    finally:
        await events.aclose()


# contexts


@routes.post("/v1/contexts", status_code=202)
async def add_context(request: Request, namespace: Namespace) -> Response:
    """Accept a text (JSON) or a file (a form with `file` and, if it is to have another name, `id`)."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        wanted = await _uploaded(request)
    else:
        wanted = parse(ContextRequest, await request.body())
    most = CHARACTERS_PER_TOKEN * request.app.state.settings.max_context_tokens
    if len(wanted.text) > most:
        message = f"the text has {len(wanted.text)} characters, at most {most} are taken: split it."
        raise ApiError(400, message, code="context_length_exceeded", param="text")
    request.app.state.uploads.submit(namespace, wanted)
    body = _context({"id": wanted.id, "status": "encoding", "error": None})
    return JSONResponse(body, 202)


async def _uploaded(request: Request) -> ContextRequest:
    async with request.form(max_files=1, max_fields=2) as form:
        file, name = form.get("file"), form.get("id")
        if unknown := sorted(set(form) - {"file", "id"}):
            raise ApiError(400, f"`{unknown[0]:.80}` is not supported by this server: leave it out.", param=unknown[0])
        if not isinstance(file, UploadFile) or not file.filename or isinstance(name, UploadFile):
            raise ApiError(400, "the form needs a `file` with a name.", code="invalid_value", param="file")
        data = await file.read()
    try:
        text, metadata = await asyncio.to_thread(_read, data, file.filename)
        return ContextRequest(id=name or file.filename, text=text, metadata=metadata)
    except ValidationError as error:
        raise invalid(error) from None
    except ValueError as error:
        raise ApiError(400, f"{error}.", code="unreadable_file", param="file") from None


def _read(data: bytes, name: str) -> tuple[str, dict]:
    with tempfile.NamedTemporaryFile() as scratch:
        scratch.write(data)
        scratch.flush()
        # what the client calls it says how it is read, and is no path
        return read_file(scratch.name, PurePosixPath(name).name)


def _context(fields: dict) -> dict:
    return {"object": "context", **fields}


@routes.get("/v1/contexts/{name:path}")
async def get_context(request: Request, name: str, namespace: Namespace) -> Response:
    """Whether a context is being encoded, could not be, or is ready."""
    waiting = request.app.state.uploads.status(namespace, name)
    if waiting is None:
        found = await request.app.state.backend.contexts(namespace, name, "", 1)
        if not found:
            raise _no_context(name)
        waiting = found[0] | {"status": "ready", "error": None}
    return JSONResponse(_context(waiting))


@routes.get("/v1/contexts")
async def list_contexts(request: Request, namespace: Namespace, after: str = "", limit: int = 100) -> Response:
    """Those that wait, and those that are ready, in the order of their ids."""
    if not 1 <= limit <= LISTED:
        raise ApiError(400, f"`limit` must be in [1, {LISTED}].", code="invalid_value", param="limit")
    waiting = [] if after else request.app.state.uploads.listed(namespace)
    found = await request.app.state.backend.contexts(namespace, None, after, limit + 1)
    ready = [one | {"status": "ready", "error": None} for one in found[:limit]]
    names = {one["id"] for one in waiting}
    data = [_context(one) for one in (*waiting, *(one for one in ready if one["id"] not in names))]
    return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})


@routes.delete("/v1/contexts/{name:path}")
async def delete_context(request: Request, name: str, namespace: Namespace) -> Response:
    """Remove a context."""
    if request.app.state.settings.read_only:
        raise ApiError(403, "this server's store is a snapshot: its contexts stay.", code="read_only")
    forgotten = request.app.state.uploads.forget(namespace, name)
    if not await request.app.state.backend.delete(namespace, name) and not forgotten:
        raise _no_context(name)
    return JSONResponse({"id": name, "object": "context", "deleted": True})


def _no_context(name: str) -> ApiError:
    return ApiError(404, f"no context {json.dumps(name)}.", code="context_not_found", param="id")


# the server


@routes.get("/v1/models")
async def list_models(request: Request, namespace: Namespace) -> dict:
    """The one model."""
    return {"object": "list", "data": [_model(request)]}


@routes.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str, namespace: Namespace) -> dict:
    """The model, by its name."""
    if name != request.app.state.settings.model_name:
        raise ApiError(404, "there is no such model.", code="model_not_found", param="model")
    return _model(request)


def _model(request: Request) -> dict:
    state = request.app.state
    return {"id": state.settings.model_name, "object": "model", "created": state.created, "owned_by": "xcllama"}


@routes.get("/healthz")
async def healthz(request: Request) -> Response:
    """200 as long as questions can be answered."""
    alive = await request.app.state.backend.alive()
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus text form."""
    state = request.app.state
    return Response(state.metrics.text(await state.backend.stats()), media_type="text/plain; version=0.0.4")
