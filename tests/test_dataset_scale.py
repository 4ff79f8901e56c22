"""Streaming: memory does not grow with the input, and the stored results come from real builds."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from dataset_builders import Report, read_source
from dataset_builders.card import render_card
from dataset_builders.generated_input import FILES, generate
from dataset_builders.splits import SPLITS

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", list(FILES))
def test_generated_input_is_in_the_official_format(tmp_path, name):
    path = tmp_path / FILES[name]
    generate(name, path, 1)
    report = Report()
    rows = list(read_source(name, str(path), "all", report=report))
    assert len(rows) == report.read >= 20
    assert report.dropped == {}
    assert any(row["answerable"] for row in rows)


def open_text(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


@pytest.mark.parametrize("name", ["squad_v2", "msmarco"])
def test_memory_does_not_grow_with_the_input(tmp_path, name):
    peaks = {}
    # the first pass loads code and fills caches
    for scale in (1, 2, 8):
        path = tmp_path / f"{scale}-{FILES[name]}"
        generate(name, path, scale)
        tracemalloc.start()
        rows = sum(1 for _ in read_source(name, str(path), "all"))
        peaks[scale] = rows, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[8][0] == 4 * peaks[2][0]
    # what a parser queues of one block, and no share of the input
    more_input = sum(len(open_text(tmp_path / f"{s}-{FILES[name]}")) * sign for s, sign in ((8, 1), (2, -1)))
    assert peaks[8][1] - peaks[2][1] < 0.1 * more_input


def test_the_card_of_the_stored_mix_has_every_number_of_its_table():
    table = json.loads((REPOSITORY / "results" / "dataset_mix.json").read_text())
    card = render_card(table, "organisation/name")
    for name, config in table["configs"].items():
        sizes = [config["splits"].get(split, {"rows": 0})["rows"] for split in SPLITS]
        assert f"| `{name}` | {' | '.join(map(str, sizes))} |" in card
        if "licence" in config:
            assert (
                f"- **{name}**: {config['licence']}{'' if config['commercial'] else ' (**non-commercial**)'}" in card
            )
            assert f"| {name} | {config['read']} | {config['kept']} |" in card
    for name, overlap in table["contexts_found_in_training"].items():
        assert f"| {name} | {overlap['contexts']} | {overlap['exact']} | {overlap['near']} |" in card
    assert table["provenance"]["commit"] in card
    assert "None" not in card
    assert "{{" not in card


def test_the_stored_benchmark_measured_every_official_format():
    result = json.loads((REPOSITORY / "results" / "dataset_benchmark.json").read_text())
    assert {(run["source"], run["scale"]) for run in result["runs"]} == {(n, s) for n in FILES for s in (1, 10, 100)}
    for name in FILES:
        rows = [run["rows"] for run in result["runs"] if run["source"] == name]
        assert rows == [rows[0], 10 * rows[0], 100 * rows[0]]
    assert all(ratio <= 1.2 for ratio in result["memory_ratio"]["by_source"].values())
