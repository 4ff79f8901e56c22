"""`xcllama store`: documents encoded once, searched, asked, looked after, shared."""

import json
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from xcllama.commands.ask import ask, shown
from xcllama.commands.opening import CHECKPOINT, AsJson, K, Model, Namespace, Store, Where, load, open_store
from xcllama.progress import duration

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Documents encoded once, searched, asked, looked after, shared."""


@app.command()
def add(
    store: Store,
    paths: Annotated[list[Path], typer.Argument(help="Files and folders: txt, md, html, docx, epub, pdf, parquet.")],
    model: Model = None,
    namespace: Namespace = None,
    dtype: Annotated[
        str, typer.Option(help="Of the states at rest: auto, bfloat16, float16, int8, int4, ...")
    ] = "auto",
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bound; least recently used documents go first.")
    ] = None,
    ttl: Annotated[float | None, typer.Option(help="Seconds after which the documents are gone.")] = None,
    id_column: Annotated[str, typer.Option(help="Of Parquet files.")] = "id",
    text_column: Annotated[str, typer.Option(help="Of Parquet files.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Encode what is new or changed. Interrupted, it keeps what is done; run again, it goes on."""
    from xcllama.documents import ReadReport, find_files, read_documents
    from xcllama.store import ContextStore

    files = find_files(paths)
    size = sum(path.stat().st_size for path in files.values())
    typer.echo(f"{len(files)} files, {size / 1e6:,.1f} MB", err=True)
    encoder, processor, name = load(model, store, namespace, is_new=True)
    read = ReadReport()
    options = {"dtype": dtype, "max_bytes": max_bytes}
    with ContextStore(store, encoder, processor, namespace or "default", **options) as opened, _stoppable() as stopped:
        if not opened.catalogue.meta["model"]:
            opened.catalogue.set_meta("model", name)
        display = _AddDisplay(len(files), size, read, stopped)
        documents = read_documents(files, read, id_column=id_column, text_column=text_column)
        try:
            opened.add_documents(display.watched(documents), ttl=ttl, progress=display)
        except KeyboardInterrupt:
            pass
        finally:
            display.close()
        totals = {name: opened.stats()[name] for name in ("documents", "passages", "tokens", "state_bytes", "dtype")}
    figures = {"added": asdict(display.report), "files": asdict(read), "store": totals, "stopped": bool(stopped)}
    typer.echo(json.dumps(figures) if as_json else "\n".join(_added_lines(display.report, read, bool(stopped))))
    # as a shell says it of a process that a signal ended
    raise typer.Exit(128 + stopped[0] if stopped else int(bool(files) and not read.read))


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Gives a list that gets the number of the signal that asks to stop; a second signal does what it always does."""
    stopped: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame) -> None:
        stopped.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _AddDisplay:
    """What `add` shows while it works: files, tokens, tokens a second, time left."""

    def __init__(self, files: int, nbytes: int, read, stopped: list[int]):
        from xcllama.progress import Progress
        from xcllama.store import AddReport

        self.files, self.nbytes, self._read, self._stopped = files, nbytes, read, stopped
        self.bytes_read = self.characters_read = 0
        self.report, self._progress = AddReport(), Progress()
        self(self.report)

    def watched(self, documents: Iterable) -> Iterator:
        """The documents, counted."""
        for document in documents:
            self.bytes_read += document.nbytes
            self.characters_read += len(document.text)
            yield document

    def __call__(self, report) -> None:
        self.report = report
        # what is not read yet is taken to be like what was
        characters = self.characters_read / self.bytes_read if self.bytes_read else 1.0
        tokens = (report.tokens + report.waiting) / report.characters if report.characters else 0.25
        left = report.waiting + max(0, self.nbytes - self.bytes_read) * characters * tokens
        share = report.tokens / (report.tokens + left) if report.tokens else self.bytes_read / max(self.nbytes, 1)
        line = f"{self._read.read} of {self.files} files, {report.tokens:,} tokens"
        if report.seconds:
            rate = report.tokens / report.seconds
            line += f", {rate:,.0f} tokens/s, about {duration(left / rate)} left"
        self._progress.show(share, line)
        if self._stopped:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Take the bar away."""
        self._progress.close()


def _added_lines(report, read, stopped: bool) -> list[str]:
    speed = f", {report.tokens / report.seconds:,.0f} tokens/s" if report.seconds else ""
    lines = [f"{report.encoded} documents encoded ({report.tokens:,} tokens{speed}), {report.skipped} unchanged"]
    if stopped:
        lines[0] = f"stopped; kept: {lines[0]}. Run the same command again to go on."
    lines.append(f"files: {read.read} read, {len(read.skipped)} skipped, {len(read.empty)} empty")
    lines += [f"  skipped {name}: {reason}" for name, reason in read.skipped.items()]
    return lines + [f"  empty {name}" for name in read.empty]


@app.command("list")
def list_documents(store: Store, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """List the documents: id, passages, tokens."""
    with open_store(store, namespace) as opened:
        rows = opened.catalogue.rows(
            "SELECT id, COUNT(*), SUM(tokens), metadata FROM documents JOIN passages USING (document) "
            "JOIN states USING (state) WHERE expires > unixepoch() GROUP BY document ORDER BY document"
        )
    names = ("id", "passages", "tokens")
    if as_json:
        typer.echo(
            json.dumps([dict(zip(names, row, strict=False)) | {"metadata": json.loads(row[3])} for row in rows])
        )
    else:
        typer.echo("\n".join(f"{tokens:>9,} tokens {count:>5} passages  {name}" for name, count, tokens, _ in rows))


@app.command()
def search(
    store: Store, words: str, k: K = 4, where: Where = None, namespace: Namespace = None, as_json: AsJson = False
) -> None:
    """Print the passages that match words best."""
    with open_store(store, namespace) as opened:
        hits = opened.search(words, k, json.loads(where) if where else None)
    if as_json:
        typer.echo(json.dumps([asdict(hit) | {"page": hit.page} for hit in hits], ensure_ascii=False))
    else:
        typer.echo("\n".join(map(shown, hits)) if hits else "nothing found")


app.command("ask")(ask)


@app.command()
def get(
    store: Store,
    ids: list[str],
    output: Annotated[Path | None, typer.Option(help="Write the states to this cache file.")] = None,
    namespace: Namespace = None,
) -> None:
    """Read documents' states, one row each."""
    with open_store(store, namespace) as opened:
        cache = opened.get(ids)
        if output:
            cache.save(output)
        typer.echo(cache)


@app.command()
def stats(
    store: Store,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="In Prometheus text form.")] = False,
    namespace: Namespace = None,
) -> None:
    """Print sizes and counters."""
    with open_store(store, namespace) as opened:
        typer.echo(opened.prometheus() if prometheus else json.dumps(opened.stats(), indent=1, ensure_ascii=False))


@app.command()
def verify(
    store: Store,
    repair: Annotated[bool, typer.Option("--repair", help="Encode damaged documents again.")] = False,
    model: Model = None,
    namespace: Namespace = None,
) -> None:
    """Read everything; exit status 1 if something is damaged and stays so."""
    loaded = load(model, store, namespace)[:2] if repair else (None, None)
    with open_store(store, namespace, *loaded) as opened:
        report = opened.verify(repair=repair)
    for name in report.damaged:
        typer.echo(f"damaged: {name}" + (" (encoded again)" if name in report.repaired else ""))
    typer.echo(
        f"{report.checked} contexts read, {len(report.damaged)} documents damaged, {len(report.repaired)} mended"
    )
    raise typer.Exit(int(len(report.repaired) < len(report.damaged)))


@app.command()
def compact(store: Store, namespace: Namespace = None) -> None:
    """Join small shards, drop what dead documents hold."""
    with open_store(store, namespace) as opened:
        typer.echo(f"{opened.compact():,} bytes won back")


@app.command()
def evict(
    store: Store,
    ids: Annotated[list[str] | None, typer.Argument(help="Documents to remove; none: those that are over.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=0, help="Also the least recently used, down to this.")] = None,
    namespace: Namespace = None,
) -> None:
    """Remove documents."""
    with open_store(store, namespace) as opened:
        typer.echo(f"{opened.evict(ids or None, max_bytes)} documents removed")


def _said(manifest, where: object) -> None:
    shards = f"{manifest.nbytes:,} bytes of {manifest.dtype} in {len(manifest.shards)} shards"
    typer.echo(f"{manifest.documents} documents, {manifest.tokens:,} tokens, {shards}: {where}")


Title = Annotated[str, typer.Option(help="Of the card.")]
License = Annotated[str, typer.Option("--license", help="Of the texts.")]


@app.command()
def push(
    store: Store,
    url: Annotated[str, typer.Argument(help="Folder, s3://..., hf://datasets/org/name.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the snapshot that is there.")] = False,
    title: Title = "Encoded contexts",
    license_id: License = "other",
    namespace: Namespace = None,
) -> None:
    """Publish a snapshot, which `ask`, `search` and `pull` read where it is."""
    with open_store(store, namespace) as opened:
        _said(opened.snapshot(url, overwrite=overwrite, title=title, license_id=license_id), url)


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="Snapshot: folder, URL or Hub id.")],
    folder: Annotated[Path, typer.Argument()],
) -> None:
    """Copy a snapshot to a folder; run again, it goes on."""
    from xcllama.store import pull as copy

    _said(copy(url, folder), folder)


@app.command()
def encode(
    source: Annotated[str, typer.Argument(help="Parquet file, folder, glob, URL, or data set id on the Hub.")],
    output: Annotated[str, typer.Argument(help="Folder or fsspec URL of the snapshot.")],
    model: Annotated[str, typer.Option(help="Added weights, model folder or Hub id.")] = CHECKPOINT,
    engine: Annotated[str, typer.Option(help="local (also under `accelerate launch -m xcllama`), or ray.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Actors of the engine ray.")] = 1,
    gpus: Annotated[float, typer.Option(help="Of each worker; 0: CPU.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the states at rest.")] = "auto",
    id_column: str = "id",
    text_column: str = "text",
    namespace: str = "default",
    characters_per_shard: Annotated[int, typer.Option(min=1)] = 200_000,
    title: Title = "Encoded contexts",
    license_id: License = "other",
) -> None:
    """Encode a large corpus straight into a snapshot, on one machine or many; run again, it goes on."""
    from functools import partial

    from xcllama.models import load_for_command
    from xcllama.store.bulk import Settings, encode_here, finish, load_plan, run_on_ray

    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray, got {engine!r}.")
    settings = Settings(output, dtype, id_column, text_column, namespace, Path(model).name)
    plan, load = partial(load_plan, source, settings, characters_per_shard), partial(load_for_command, model)
    if engine == "ray":
        tasks = plan()
        fingerprint = run_on_ray(tasks, load, settings, concurrency=workers, num_gpus=gpus)
    else:
        tasks, fingerprint = encode_here(plan, load, settings, cpu=not gpus)
    if fingerprint is not None:
        _said(finish(tasks, settings, fingerprint, title=title, license_id=license_id), output)
