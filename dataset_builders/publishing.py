"""A finished build on the Hub: a configuration at a time, then the card."""

import tempfile
from typing import Any

import datasets
from huggingface_hub import DatasetCard, HfApi

from dataset_builders.card import card_data, render_card
from dataset_builders.schema import FEATURES
from dataset_builders.writing import TABLE, read_table


def publish(folder: str, repo_id: str, private: bool = False) -> str:
    """Push the finished build in `folder` to the data set `repo_id` and return its address.

    The data come first and the card last, so what is there before the card is not yet described as finished.

    Raises:
        ValueError: `folder` is not a finished build.
    """
    table = read_table(folder)
    with tempfile.TemporaryDirectory() as cache:
        for name, config in table["configs"].items():
            splits = load_config(folder, name, config["splits"], cache)
            splits.push_to_hub(repo_id, config_name=name, set_default=name == table["default"], private=private)
    # keep what the pushes wrote in the header (configurations, features, sizes), add what they do not know
    header = DatasetCard.load(repo_id).data
    for field, value in card_data(table).to_dict().items():
        if field != "configs":
            setattr(header, field, value)
    api = HfApi()
    api.upload_file(
        path_or_fileobj=f"{folder}/{TABLE}", path_in_repo=TABLE, repo_id=repo_id, repo_type="dataset",
        commit_message="Build table",
    )  # fmt: skip
    DatasetCard(render_card(table, repo_id, header)).push_to_hub(repo_id, commit_message="Card")
    return f"{api.endpoint}/datasets/{repo_id}"


def load_config(folder: str, name: str, splits: dict[str, Any], cache: str) -> datasets.DatasetDict:
    """The splits of one configuration of a build."""
    files = {split: f"{folder}/{name}/{split}-*.parquet" for split in splits}
    return datasets.load_dataset("parquet", data_files=files, features=FEATURES, cache_dir=cache)
