"""`xcllama serve`: an OpenAI-compatible server over a context store."""

import ipaddress
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Added weights, model folder or Hub id.")],
    store: Annotated[str, typer.Option(help="Folder of a store, made if needed, or a snapshot: URL or Hub id.")],
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; default: that of its folder.")] = None,
    host: Annotated[str, typer.Option(help="Beyond loopback only with --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, a line each: KEY NAMESPACE [EXPIRES].")] = None,
    namespace: Annotated[str, typer.Option(help="Of the store, where there are no keys.")] = "default",
    max_rows: Annotated[int, typer.Option("--rows", min=1, help="Answers that are decoded together.")] = 16,
    max_waiting: Annotated[
        int, typer.Option("--waiting", min=0, help="Answers that wait; more are refused with 429.")
    ] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    max_context_tokens: Annotated[int, typer.Option(min=1, help="That one request reads.")] = 32_768,
    context_bytes: Annotated[int, typer.Option(min=1, help="Keys and values of contexts in memory.")] = 1 << 30,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 8 << 20,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Of a request.")] = 120.0,
    replicas: Annotated[int | None, typer.Option(min=1, help="On Ray Serve; default: one process, no Ray.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Up to which Ray Serve adds replicas.")] = None,
    cpus: Annotated[float, typer.Option(help="Of each replica.")] = 1,
    gpus: Annotated[float, typer.Option(help="Of each replica.")] = 0,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default: one on this machine.")] = None,
) -> None:
    """Serve until SIGTERM or SIGINT, which let running answers end."""
    bounds = {one: value for one, value in locals().items() if one.startswith(("max_", "context_"))}
    bounds.pop("max_replicas")
    if replicas is None and (max_replicas or address):
        raise ValueError("--max-replicas and --address are of Ray Serve: give --replicas too.")
    _check_host(host, keys)
    load, settings = _settings(model, store, name, bounds)
    if replicas is None:
        _serve_here(load, settings, keys, namespace, host, port)
    else:
        scale = (replicas, max(replicas, max_replicas or replicas))
        options = {"replicas": scale, "cpus": cpus, "gpus": gpus, "address": address, "keys": keys and keys.absolute()}
        _serve_on_ray(load, settings, namespace=namespace, host=host, port=port, **options)


def _settings(model: str, store: str, name: str | None, bounds: dict) -> tuple:
    from xcllama.models import load_for_command
    from xcllama.serving.engine import Settings
    from xcllama.store.manifest import is_snapshot

    # replicas run in folders of their own
    store = store if is_snapshot(store) and not Path(store).is_dir() else str(Path(store).absolute())
    load = partial(load_for_command, str(Path(model).absolute()) if Path(model).is_dir() else model)
    return load, Settings(store, name or Path(model).name, **bounds)


def _check_host(host: str, keys: Path | None) -> None:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and keys is None:
        raise ValueError(f"--host {host} can be reached from elsewhere: name a file of API keys with --keys.")


def _serve_here(load, settings, keys: Path | None, namespace: str, host: str, port: int) -> None:
    """One process: HTTP, scheduler and store."""
    import uvicorn

    from xcllama.serving.api import build_app
    from xcllama.serving.engine import Engine
    from xcllama.serving.tenants import Tenants

    tenants = Tenants(keys, namespace)
    engine = Engine(*load(), settings)
    for known in tenants.namespaces:
        # a store of another model is refused now, not at the first question
        engine.store(known)
    options = {"timeout_graceful_shutdown": int(settings.max_seconds) + 1, "log_level": "warning"}
    server = uvicorn.Server(uvicorn.Config(build_app(engine, settings, tenants), host=host, port=port, **options))
    typer.echo(f"serving {settings.model_name} at http://{host}:{port}/v1", err=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        # the server's own handlers drain it, and then raise the signal again: it has done what it was for
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    finally:
        engine.close()


def _serve_on_ray(load, settings, **options) -> None:
    from xcllama.serving.deployment import start, stop

    asked = threading.Event()
    start(load, settings, **options)
    # after Ray's own handlers, which end this process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    typer.echo(f"serving {settings.model_name} at http://{options['host']}:{options['port']}/v1", err=True)
    asked.wait()
    stop()
