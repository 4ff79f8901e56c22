"""Question sets for training and evaluation, one module a source, one row schema, one mix.

    from dataset_builders import SOURCES, build_mix, read_source

    rows = read_source("squad_sample", split="dev")           # an iterator of rows
    mix = build_mix(commercial_only=True, seed=0)             # PyPI sources, no benchmark context in training
    train = list(mix.rows("train"))
    table = mix.report()

To add a source: a module with `records` (path -> records) and `convert` (record -> rows), its terms in `TERMS`, an
entry in `SOURCES`, a fixture in its official format and a test of the exact rows.
"""

from dataset_builders.fields import Settings
from dataset_builders.files import SourceError
from dataset_builders.mix import OFFLINE_BENCHMARKS, OFFLINE_SOURCES, Mix, build_mix
from dataset_builders.reading import read_source
from dataset_builders.schema import FEATURES, NO_ANSWER, Drop, RecordError, Report, make_row, validate_row
from dataset_builders.sources import SOURCES, Source
from dataset_builders.splits import document_key, split_of

__all__ = [
    "FEATURES",
    "NO_ANSWER",
    "OFFLINE_BENCHMARKS",
    "OFFLINE_SOURCES",
    "SOURCES",
    "Drop",
    "Mix",
    "RecordError",
    "Report",
    "Settings",
    "Source",
    "SourceError",
    "build_mix",
    "document_key",
    "make_row",
    "read_source",
    "split_of",
    "validate_row",
]
