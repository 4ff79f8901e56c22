"""A build: sources or the mix as a folder of Parquet files, with a card and the table of what was read and dropped.

DIR/README.md             the card; its header names the configurations
DIR/build.json            the table
DIR/SOURCE/SPLIT-00000.parquet
DIR/mix/SPLIT-00000.parquet
"""

import json
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from dataset_builders.card import render_card
from dataset_builders.files import file_records
from dataset_builders.mix import HELD_OUT, Mix, choose_sources
from dataset_builders.reading import read_source
from dataset_builders.schema import Report, Row
from dataset_builders.settings import Settings
from dataset_builders.sources import get_source, terms
from dataset_builders.splits import SPLITS
from dataset_builders.writing import TABLE, finished_folder, split_writers, write_text
from xcllama.provenance import provenance

MIX = "mix"
MEASURED = ("dataset_builders",)


def build_source(
    name: str,
    output: str,
    path: str | None = None,
    settings: Settings | None = None,
    on_error: str = "limit",
    num_proc: int = 1,
) -> dict[str, Any]:
    """Build one source into the new folder `output` and return the build table; arguments as for `read_source`."""
    get_source(name)
    settings = settings or Settings()
    with finished_folder(output) as folder:
        configs = {name: _write_source(name, folder, path, settings, on_error, num_proc)}
        return finish(folder, {"name": name, "default": name, "seed": settings.seed, "configs": configs})


def build_mix_folder(
    output: str,
    names: list[str] | None = None,
    paths: dict[str, str] | None = None,
    benchmarks: list[str] | None = None,
    settings: Settings | None = None,
    commercial_only: bool = False,
    on_error: str = "limit",
    num_proc: int = 1,
) -> dict[str, Any]:
    """Build every source and the mix, the default configuration, into the new folder `output`; return the build table.

    Arguments as for `build_mix` and `read_source`.
    """
    settings, paths = settings or Settings(), paths or {}
    names, benchmarks = choose_sources(names, benchmarks, commercial_only)
    with finished_folder(output) as folder:
        configs = {}
        for name in names + benchmarks:
            configs[name] = _write_source(name, folder, paths.get(name), settings, on_error, num_proc)

        def read(name: str, split: str, report: Report | None) -> Iterator[Row]:
            return built_rows(f"{folder}/{name}", split, configs[name]["splits"])

        mix = Mix(names, benchmarks, settings.seed, read)
        splits = {}
        # training last, when what it must not hold is known; its writers are closed one split at a time
        for split in reversed(HELD_OUT):
            with split_writers(f"{folder}/{MIX}") as writers:
                for row in _progress(mix.rows(split), f"{MIX} {split}"):
                    writers[split].write(row)
            if writers[split].rows:
                splits[split] = writers[split].table()
        report = mix.report()
        splits = {split: splits[split] for split in SPLITS if split in splits}
        configs[MIX] = {"splits": splits, "removal": report["mix"], "sources": names}
        table = {"name": MIX, "default": MIX, "seed": settings.seed, "configs": configs}
        return finish(folder, table | {"contexts_found_in_training": report["contexts_found_in_training"]})


def _write_source(
    name: str, folder: str, path: str | None, settings: Settings, on_error: str, num_proc: int
) -> dict[str, Any]:
    report, source = Report(), get_source(name)
    rows = read_source(name, path, "all", settings.seed, on_error, report, settings, num_proc)
    with split_writers(f"{folder}/{name}") as writers:
        for row in _progress(rows, name):
            writers[source.split(row)].write(row)
    splits = {split: writer.table() for split, writer in writers.items() if writer.rows}
    if not splits:
        raise ValueError(f"source {name!r} gave no row to write; dropped: {report.dropped}.")
    return report.as_dict() | {"path": path or "default", "splits": splits} | terms(name)


def built_rows(folder: str, split: str, splits: dict[str, Any]) -> Iterator[Row]:
    """The rows of a split ("all": of all) that a build has written."""
    for name in SPLITS:
        if name in splits and split in ("all", name):
            for record in file_records(f"{folder}/{name}-*.parquet"):
                yield record.value()


def _progress(rows: Iterator[Row], name: str) -> Iterator[Row]:
    # no bar where there is no terminal
    return iter(tqdm(rows, desc=name, unit=" rows", disable=None))


def finish(folder: str, table: dict[str, Any]) -> dict[str, Any]:
    """Write the card and then the table, which makes the folder a finished one."""
    table = table | {"provenance": provenance(MEASURED)}
    write_text(f"{folder}/README.md", render_card(table))
    write_text(f"{folder}/{TABLE}", json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    return table
