"""The card of a published data set, filled from its build table: no number is typed by hand."""

from importlib.resources import files
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from dataset_builders.features import FEATURES

TEMPLATE = files("xcllama.templates") / "dataset_card.md.jinja"
_SIZES = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
_KNOWN_LICENCES = {
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-SA 3.0": "cc-by-sa-3.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "CC BY-NC 3.0": "cc-by-nc-3.0",
    "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
}


def card_data(table: dict[str, Any]) -> DatasetCardData:
    """The header of the card: licence, tasks, sizes and configurations, whose rows `load_dataset` counts."""
    sources = source_configs(table)
    licences = {source["licence"] for source in sources.values()}
    known = _KNOWN_LICENCES.get(next(iter(licences))) if len(licences) == 1 else None
    rows = sum(split["rows"] for split in table["configs"][table["default"]]["splits"].values())
    configs = [
        {
            "config_name": name,
            "default": name == table["default"],
            "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in config["splits"]],
        }
        for name, config in table["configs"].items()
    ]
    infos = [
        {
            "config_name": name,
            "features": FEATURES._to_yaml_list(),
            "splits": [{"name": split, "num_examples": counts["rows"]} for split, counts in config["splits"].items()],
        }
        for name, config in table["configs"].items()
    ]
    terms = {"license": known} if known else {"license": "other", "license_name": "terms-of-each-source"}
    return DatasetCardData(
        pretty_name=f"XC-Llama {table['name']}",
        language=["en"],
        task_categories=["question-answering"],
        tags=["context-caching", "reading-comprehension", "xc-cache"],
        size_categories=[next((name for bound, name in _SIZES if rows < bound), "n>1M")],
        configs=configs,
        dataset_info=infos,
        **terms,
    )


def source_configs(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations that are sources (all but the mix and its tasks)."""
    return {name: config for name, config in table["configs"].items() if "licence" in config}


def render_card(table: dict[str, Any], repo_id: str | None = None) -> str:
    """The text of the card of a build.

    Args:
        repo_id: where it is published; None: the folder is read in place.
    """
    sources = source_configs(table)
    mix = {name: config for name, config in table["configs"].items() if name not in sources}
    card = DatasetCard.from_template(
        card_data(table),
        template_path=str(TEMPLATE),
        table=table,
        title=f"XC-Llama {table['name']}",
        sources=sources,
        mix=mix.get("mix"),
        tasks=mix.get("tasks"),
        location=repo_id or "DIR",
        restricted=[name for name, source in sources.items() if not source["commercial"]],
        provenance=table["provenance"],
    )
    return str(card)
