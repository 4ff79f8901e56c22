"""The server on Ray Serve: replicas that each hold the model, and a front that sends a question to its contexts."""

import asyncio
import hashlib
import hmac
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from xcllama.store import Hit

from .api import build_app
from .engine import Engine, Settings
from .protocol import ApiError, ChatRequest
from .tenants import Tenants

APP = "xcllama"
# sets of contexts that the front believes a replica to hold; what is really there is bounded in bytes
HELD = 256
ATTEMPTS = 4


class Replica:
    """One engine.

    Args:
        load: gives model and processor.
        settings: of the server.
    """

    def __init__(self, load: Callable[[], tuple], settings: Settings):
        self.engine = Engine(*load(), settings)

    @serve.multiplexed(max_num_models_per_replica=HELD)
    async def hold(self, name: str) -> str:
        """Tell the front that contexts are read here."""
        return name

    async def chat(self, namespace: str, chat: ChatRequest, documents: Sequence) -> AsyncIterator[dict]:
        """`Engine.chat`; what it raises comes as an event."""
        try:
            if name := serve.get_multiplexed_model_id():
                await self.hold(name)
            async for event in self.engine.chat(namespace, chat, documents):
                yield event
        except ApiError as error:
            yield {"error": astuple(error)}

    async def call(self, method: str, *arguments):
        """Another method of the engine: its result, or what it raises, as one key of a dict."""
        try:
            return {"result": await getattr(self.engine, method)(*arguments)}
        except ApiError as error:
            return {"error": astuple(error)}

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if not self.engine.running:
            raise RuntimeError("the scheduler has stopped.")

    def __del__(self):
        # its questions are answered by now: Ray Serve waits for them
        if hasattr(self, "engine"):
            self.engine.close()


class Replicas:
    """All replicas as one backend of the API.

    Args:
        handle: of the deployment of `Replica`.
    """

    def __init__(self, handle: DeploymentHandle):
        self._handle, self._secret = handle, secrets.token_bytes(16)

    async def chat(self, namespace: str, chat: ChatRequest, documents: Sequence[str | Hit]) -> AsyncIterator[dict]:
        """`Engine.chat` on a replica that holds the documents; another one, where it dies before the first event."""
        method = self._handle.options(stream=True, multiplexed_model_id=self._name(namespace, documents)).chat
        for _ in range(ATTEMPTS):
            begun, events = False, method.remote(namespace, chat, documents)
            try:
                async for event in events:
                    begun = True
                    yield _result(event, event)
                return
            except RayActorError:
                if begun:
                    message = "the replica that wrote this answer was lost; ask again."
                    raise ApiError(503, message, code="replica_lost", kind="server_error") from None
            except BackPressureError:
                message = "too many questions wait; try again."
                raise ApiError(429, message, code="queue_full", kind="rate_limit_error") from None
            except DeploymentUnavailableError:
                break
            finally:
                events.cancel()
        raise _unavailable()

    async def search(self, namespace: str, question: str, k: int) -> list[Hit]:
        """See `Engine.search`."""
        return await self._call("search", namespace, question, k)

    async def add(self, namespace: str, name: str, text: str, metadata: dict, ttl: float | None) -> None:
        """See `Engine.add`; where its replica dies another one does it."""
        await self._call("add", namespace, name, text, metadata, ttl)

    async def contexts(self, namespace: str, name: str | None, after: str, limit: int) -> list[dict]:
        """See `Engine.contexts`."""
        return await self._call("contexts", namespace, name, after, limit)

    async def delete(self, namespace: str, name: str) -> bool:
        """See `Engine.delete`."""
        return await self._call("delete", namespace, name)

    async def stats(self) -> dict[str, int]:
        """Nothing: Ray's own metrics have what replicas do."""
        return {}

    async def alive(self) -> bool:
        """Whether a replica answers."""
        try:
            return await asyncio.wait_for(self._call("alive"), 5)
        except (ApiError, TimeoutError):
            return False

    async def _call(self, method: str, *arguments):
        for _ in range(ATTEMPTS):
            try:
                answer = await self._handle.call.remote(method, *arguments)
            except RayActorError:
                continue
            except DeploymentUnavailableError:
                break
            return _result(answer, answer.get("result"))
        raise _unavailable()

    def _name(self, namespace: str, documents: Sequence[str | Hit]) -> str:
        """Names documents to Ray, whose logs and metrics show it: nobody else can tell what it stands for."""
        if not documents:
            return ""
        names = sorted((one, -1) if isinstance(one, str) else (one.id, one.position) for one in documents)
        return hmac.new(self._secret, repr((namespace, names)).encode(), hashlib.sha256).hexdigest()[:24]


def _result(answer: dict, result):
    if "error" in answer:
        raise ApiError(*answer["error"])
    return result


def _unavailable() -> ApiError:
    return ApiError(503, "no replica is there; try again.", code="unavailable", kind="server_error")


class Front:
    """The HTTP side, one for all replicas: it holds no model.

    Args:
        handle: of the replicas.
        settings: of the server.
        keys, namespace: of `Tenants`.
    """

    def __init__(self, handle: DeploymentHandle, settings: Settings, keys: Path | None, namespace: str):
        self._handle, self._settings, self._tenants = handle, settings, Tenants(keys, namespace)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(Replicas(self._handle), self._settings, self._tenants)


def start(
    load: Callable[[], tuple],
    settings: Settings,
    *,
    replicas: tuple[int, int] = (1, 1),
    cpus: float = 1,
    gpus: float = 0,
    keys: Path | None = None,
    namespace: str = "default",
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
) -> None:
    """Serve on a Ray cluster; returns when questions can be answered.

    Args:
        load: gives model and processor in each replica; pickled by Ray.
        settings: of the server.
        replicas: the least and the most; between them Ray Serve follows the number of questions.
        cpus, gpus: of each replica.
        keys, namespace: of `Tenants`.
        host, port: of HTTP, on the head node.
        address: of a Ray cluster; None: one on this machine that ends with this process.
    """
    if not ray.is_initialized():
        # by default Ray's workers give way to everything else on the machine: a server's should not
        os.environ.setdefault("RAY_worker_niceness", "0")
        local = {} if address else {"include_dashboard": False, "object_store_memory": 200 << 20}
        ray.init(address=address, log_to_driver=False, **local)
    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    engines = _engines(settings, replicas, {"num_cpus": cpus, "num_gpus": gpus}).bind(load, settings)
    front = serve.deployment(serve.ingress()(Front), name="front").options(
        max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}, **_patience(settings)
    )
    serve.run(front.bind(engines, settings, keys, namespace), name=APP, route_prefix="/")


def _engines(settings: Settings, replicas: tuple[int, int], resources: dict) -> serve.Deployment:
    scaling = dict(zip(("min_replicas", "max_replicas"), replicas, strict=True))
    return serve.deployment(Replica, name="replica").options(
        autoscaling_config=scaling | {"target_ongoing_requests": settings.max_rows},
        # as many as its scheduler takes: what is beyond goes to another replica
        max_ongoing_requests=settings.max_rows + settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        ray_actor_options=resources,
        health_check_period_s=2,
        **_patience(settings),
    )


def _patience(settings: Settings) -> dict:
    return {"graceful_shutdown_timeout_s": settings.max_seconds + 5, "graceful_shutdown_wait_loop_s": 0.2}


def stop() -> None:
    """Answer what was asked, take no more, and end."""
    serve.shutdown()
    ray.shutdown()
