"""The build of one source on a cluster, through datatrove: a task a share of the records, then one that finishes.

Tasks that are done are not done again: after a failure, run the same command. Where there are at least as many files
    as
tasks, a task takes whole files, else every so manieth record of each file.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import fsspec
import pyarrow.parquet
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from dataset_builders.building import check_output, finish, finished_folder, split_writers, write_text
from dataset_builders.fields import Settings
from dataset_builders.files import Record, expand_paths, parse_hub_id
from dataset_builders.reading import UniqueNames, check_on_error, checked_rows, readable_records, too_many_failed
from dataset_builders.schema import Report
from dataset_builders.sources import Source, get_source, terms
from dataset_builders.splits import SPLITS

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}


class BuildShare(PipelineStep):
    """Writes the rows of one task's share of the records to `{work}/parts/{rank}/`, its table last."""

    name, type = "rows", "dataset builder"

    def __init__(self, source: str, path: str, work: str, settings: Settings, on_error: str):
        super().__init__()
        self.source, self.path, self.work, self.settings, self.on_error = source, path, work, settings, on_error

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        source, report = get_source(self.source), Report()
        folder = f"{self.work}/parts/{rank:05}"
        filesystem, _, (local,) = fsspec.get_fs_token_paths(folder)
        if filesystem.exists(local):
            # what a task that failed left behind
            filesystem.rm(local, recursive=True)
        records = share(source, self.path, rank, world_size, self.on_error, report)
        with self.track_time(), split_writers(folder) as writers:
            # how many may fail is known once all shares are read
            on_error = "drop" if self.on_error == "limit" else self.on_error
            for row in checked_rows(source, records, self.settings, on_error, report):
                writers[source.split(row)].write(row)
                self.stat_update("rows")
        splits = {split: writer.table() for split, writer in writers.items() if writer.rows}
        write_text(f"{folder}/part.json", json.dumps(report.as_dict() | {"splits": splits}))
        yield from data or ()


def share(source: Source, path: str, rank: int, world_size: int, on_error: str, report: Report) -> Iterator[Record]:
    """The records of task `rank` of `world_size`."""
    files = [path] if parse_hub_id(path) else expand_paths(path)
    if len(files) >= world_size:
        for file in files[rank::world_size]:
            yield from readable_records(source, file, on_error, report)
        return
    for number, file in enumerate(files):
        # each task sees a broken file; one counts it
        seen = report if (number + rank) % world_size == 0 else Report()
        yield from islice(readable_records(source, file, on_error, seen), rank, None, world_size)


class FinishBuild(PipelineStep):
    """Puts the parts of all tasks together in `output`, with card and table."""

    name, type = "finish", "dataset builder"

    def __init__(self, source: str, path: str, work: str, output: str, settings: Settings, tasks: int, on_error: str):
        super().__init__()
        self.source, self.path, self.work, self.output = source, path, work, output
        self.settings, self.tasks, self.on_error = settings, tasks, on_error

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        report, splits, names = Report(), {}, UniqueNames()
        with finished_folder(self.output) as folder:
            for part in (f"{self.work}/parts/{task:05}" for task in range(self.tasks)):
                with fsspec.open(f"{part}/part.json") as stream:
                    table = json.load(stream)
                report.add(Report(*(table[name] for name in ("read", "kept", "dropped", "repaired"))))
                for split, counts in table["splits"].items():
                    check_names(names, f"{part}/{split}-*.parquet")
                    merged = splits.setdefault(split, {"rows": 0, "content": 0, "shards": 0})
                    merged["shards"] += copy_shards(part, f"{folder}/{self.source}", split, merged["shards"])
                    merged["rows"] += counts["rows"]
                    merged["content"] = (merged["content"] + int(counts["content"], 16)) % 2**128
            if self.on_error == "limit" and (problem := too_many_failed(report)):
                way_out = f"mend the files or pass on_error='drop', and name another work folder than {self.work}"
                raise ValueError(f"{problem} ({report.dropped}); {way_out}.")
            counts = {
                split: {"rows": splits[split]["rows"], "content": f"{splits[split]['content']:032x}"}
                for split in SPLITS
                if split in splits
            }
            config = report.as_dict() | {"path": self.path, "splits": counts} | terms(self.source)
            seed = self.settings.seed
            finish(
                folder, {"name": self.source, "default": self.source, "seed": seed, "configs": {self.source: config}}
            )
        yield from data or ()


def copy_shards(part: str, folder: str, split: str, first: int) -> int:
    """Copy the Parquet files of a split into `folder`, numbered from `first`; return how many."""
    filesystem, _, (path,) = fsspec.get_fs_token_paths(part)
    names = sorted(
        name for name in filesystem.ls(path, detail=False) if name.rsplit("/", 1)[-1].startswith(f"{split}-")
    )
    for number, name in enumerate(names, start=first):
        with filesystem.open(name, "rb") as source:
            with fsspec.open(f"{folder}/{split}-{number:05}.parquet", "wb", auto_mkdir=True) as target:
                while block := source.read(1 << 22):
                    target.write(block)
    return len(names)


def check_names(names: UniqueNames, files: str) -> None:
    """Raise where an id in the Parquet `files` was in another task's share: each task makes its own ids unique."""
    for file in expand_paths(files):
        with fsspec.open(file, "rb") as stream:
            table = pyarrow.parquet.read_table(stream, columns=["dataset", "sample_idx"])
        for row in table.to_pylist():
            if names.unique(row["dataset"], row["sample_idx"]) != row["sample_idx"]:
                rule = "appears in the shares of two tasks; build this source in one process, which makes ids unique"
                raise ValueError(f"`sample_idx` {row['sample_idx']!r} of {row['dataset']} {rule}.")


def keep_request(work: str, request: dict[str, Any]) -> None:
    """Note in `work` what is built there; raise when it is something else than before."""
    path = f"{work}/request.json"
    filesystem, _, (local,) = fsspec.get_fs_token_paths(path)
    if not filesystem.exists(local):
        write_text(path, json.dumps(request, indent=2))
    elif (before := json.loads(filesystem.cat_file(local))) != request:
        changed = ", ".join(
            f"{name} {before[name]!r} -> {request[name]!r}" for name in request if request[name] != before[name]
        )
        raise ValueError(f"{work} belongs to another build ({changed}); name another `work` folder, or remove it.")


def cluster_build(
    name: str,
    path: str,
    output: str,
    work: str,
    tasks: int,
    executor: str = "local",
    settings: Settings | None = None,
    on_error: str = "limit",
    workers: int = -1,
    **options: Any,
) -> Any:
    """The executor that builds a source into `output`; `.run()` starts it.

    Args:
        name, path, settings, on_error: as for `read_source`.
        output: new folder for the build; the rows are those of one machine, split over more files.
        work: folder that all tasks see, for parts and logs; the same one again resumes.
        tasks: number of shares.
        executor: "local" (processes of this machine), "slurm" or "ray".
        workers: tasks at a time; -1: all.
        options: further arguments of datatrove's executor, e.g. `partition` and `time` for Slurm.

    Raises:
        ValueError: an unknown source or executor, an output that exists, or a `work` folder of another build.
    """
    get_source(name)
    check_on_error(on_error)
    check_output(output)
    if executor not in EXECUTORS:
        raise ValueError(f"`executor` must be one of {', '.join(EXECUTORS)}, got {executor!r}.")
    if tasks < 1:
        raise ValueError(f"`tasks` must be at least 1, got {tasks}.")
    settings = settings or Settings()
    keep_request(
        work, {"source": name, "path": path, "tasks": tasks, "on_error": on_error, "settings": settings.digest()}
    )
    share_step = BuildShare(name, path, work, settings, on_error)
    finish_step = FinishBuild(name, path, work, output, settings, tasks, on_error)
    kind = EXECUTORS[executor]
    rows = kind([share_step], tasks=tasks, workers=workers, logging_dir=f"{work}/logs/rows", **options)
    # always done again: its result is the output, which is not there yet
    logs = f"{work}/logs/finish"
    return kind([finish_step], tasks=1, logging_dir=logs, depends=rows, skip_completed=False, **options)
