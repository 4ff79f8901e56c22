"""Bulk encoding: one process, several, a Ray cluster that loses a node; the same states from all of them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import HfApi
from publishing_support import server
from store_support import ByteProcessor, TableModel, load_slow, row_states

from xcllama.store import ContextStore
from xcllama.store.bulk import Settings, encode_task, finish, load_plan, run_on_ray
from xcllama.store.manifest import Folder

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "xc-smollm2-135m"
ROWS = [{"id": f"d{i}", "text": f"document {i} on the lighthouse " * (i % 7), "page": i} for i in range(120)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two Parquet files in small row groups; some documents stand in both, one twice in a file."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([*ROWS[:70], ROWS[3]]), folder / "a.parquet", row_group_size=9
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[65:]), folder / "b.parquet", row_group_size=50)
    return folder


def settings_for(output, **options) -> Settings:
    return Settings(str(output), **({"passage_tokens": None} | options))


def encode_all(corpus, output, characters=1500, model=None, **options):
    model = model or TableModel()
    settings = settings_for(output, **options)
    tasks = load_plan(str(corpus), settings, characters)
    made = [encode_task(task, model, ByteProcessor(), settings) for task in tasks]
    return finish(tasks, settings, model.fingerprint), made


def assert_is_the_corpus(output, cache, expected=ROWS) -> None:
    model = TableModel()
    with ContextStore.open(str(output), model, ByteProcessor(), cache_folder=cache) as store:
        assert len(store) == len(expected) == store._source.manifest.documents
        states = store.get([row["id"] for row in expected])
        for number, row in enumerate(expected):
            assert torch.equal(row_states(states, number), model.states(row["text"]))
        assert [hit.id for hit in store.search("lighthouse", where={"page": 66})] == ["d66"]
        assert store.verify().damaged == []


def test_a_plan_has_each_document_once(corpus, tmp_path):
    settings = settings_for(tmp_path / "out")
    tasks = load_plan(str(corpus), settings, 1000)
    assert len(tasks) > 5
    copies = [settings.folder.path(task.input_name) for task in tasks]
    ids = [row["id"] for copy in copies for row in pyarrow.parquet.read_table(copy).to_pylist()]
    assert ids == [row["id"] for row in ROWS]
    with pytest.raises(ValueError, match="no Parquet file"):
        load_plan(str(corpus / "*.csv"), settings)
    pyarrow.parquet.write_table(pyarrow.table({"id": ["d1"], "text": ["another"]}), corpus / "c.parquet")
    with pytest.raises(ValueError, match="different texts with the id 'd1'"):
        load_plan(str(corpus), settings_for(tmp_path / "other"))


def test_a_task_reads_what_it_encodes_and_no_more(corpus, tmp_path, monkeypatch):
    """One row group of all documents: no task opens it, each reads its own copy once."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "one.parquet", row_group_size=1000)
    settings = settings_for(tmp_path / "out")
    tasks = load_plan(str(tmp_path / "one.parquet"), settings, 1500)
    (tmp_path / "one.parquet").unlink()
    read, reads = Folder.read, []
    monkeypatch.setattr(Folder, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    for task in tasks:
        assert encode_task(task, TableModel(), ByteProcessor(), settings)
    assert reads == [task.input_name for task in tasks]


def test_one_process(corpus, tmp_path):
    manifest, made = encode_all(corpus, tmp_path / "out")
    assert all(made)
    assert len(manifest.shards) == len(made) > 5
    assert_is_the_corpus(tmp_path / "out", tmp_path / "cache")
    assert manifest.tokens == sum(len(row["text"].encode()) for row in ROWS)


def test_a_run_goes_on_where_it_was_cut_off(corpus, tmp_path):
    manifest, _ = encode_all(corpus, tmp_path / "out")
    folder = tmp_path / "out"
    (folder / "manifest.json").unlink()
    # a crash between shard and part, and litter of one in the middle of a file
    (folder / "catalogue" / "part-000002.parquet").unlink()
    (folder / "shards" / ".shard-000003.safetensors.abcd.partial").write_bytes(b"half")
    settings = settings_for(folder)
    tasks = load_plan(str(corpus), settings, 1500)
    with pytest.raises(ValueError, match=r"1 shards are missing \(2\)"):
        finish(tasks, settings, "table-0")
    again, made = encode_all(corpus, folder)
    assert [number for number, was in enumerate(made) if was] == [2]
    assert_is_the_corpus(folder, tmp_path / "cache")
    assert (again.documents, again.tokens) == (manifest.documents, manifest.tokens)
    with pytest.raises(ValueError, match="another model"):
        encode_all(corpus, folder, model=TableModel(1))
    with pytest.raises(ValueError, match="another model or with other settings"):
        encode_all(corpus, folder, dtype="int8")
    with pytest.raises(ValueError, match="another input"):
        load_plan(str(corpus / "a.parquet"), settings)
    # of the plan only its description stays
    assert list((folder / "plan").iterdir()) == []


def test_quantized_at_rest(corpus, tmp_path):
    manifest, _ = encode_all(corpus, tmp_path / "out", dtype="int8")
    assert manifest.dtype == "int8"
    with ContextStore.open(tmp_path / "out", cache_folder=tmp_path / "cache") as store:
        assert store.get("d8").is_quantized


def test_states_do_not_depend_on_who_encodes(corpus, tmp_path):
    """Tasks in another order, by another model object: byte for byte the same shards."""
    encode_all(corpus, tmp_path / "one")
    settings = settings_for(tmp_path / "two")
    tasks = load_plan(str(corpus), settings, 1500)
    for task in tasks[::-1]:
        encode_task(task, TableModel(), ByteProcessor(), settings)
    finish(tasks, settings, "table-0")
    for path in (tmp_path / "one" / "catalogue").iterdir():
        other = tmp_path / "two" / "catalogue" / path.name
        read = pyarrow.parquet.read_table
        assert read(path).to_pylist() == read(other).to_pylist()


def test_output_on_s3(corpus, tmp_path, bucket):
    settings = settings_for(f"{bucket}/bulk", storage_options={"skip_instance_cache": True})
    tasks = load_plan(str(corpus), settings, 1500)
    for task in tasks:
        assert encode_task(task, TableModel(), ByteProcessor(), settings)
    assert not encode_task(tasks[0], TableModel(), ByteProcessor(), settings)
    finish(tasks, settings, "table-0")
    assert_is_the_corpus(f"{bucket}/bulk", tmp_path / "cache")


def test_a_hub_data_set_is_encoded_onto_the_hub(server, corpus, tmp_path):
    api, output = HfApi(), "hf://datasets/tester/encoded"
    for name in ("corpus", "encoded"):
        api.create_repo(f"tester/{name}", repo_type="dataset")
    for path in corpus.iterdir():
        api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id="tester/corpus", repo_type="dataset")
    _, made = encode_all("tester/corpus", output, characters=4000)
    assert len(made) > 2
    assert encode_all("tester/corpus", output, characters=4000)[1] == [False] * len(made)
    assert_is_the_corpus(output, tmp_path / "cache")


@pytest.fixture
def cluster():
    """A Ray cluster of a head without work and two nodes."""
    pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node(cluster, corpus, tmp_path):
    cluster, nodes = cluster
    output = tmp_path / "out"
    settings = settings_for(output)
    tasks = load_plan(str(corpus), settings, 400)
    assert len(tasks) > 20
    killed = []

    def kill() -> None:
        parts = output / "catalogue"
        while not parts.is_dir() or len(list(parts.glob("part-*.parquet"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.append(len(list(parts.glob("part-*.parquet"))))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    fingerprint = run_on_ray(tasks, load_slow, settings, concurrency=2)
    killer.join(60)
    # the node went while there was work left
    assert killed
    assert killed[0] < len(tasks)
    finish(tasks, settings, fingerprint)
    assert_is_the_corpus(output, tmp_path / "cache")
    encode_all(corpus, tmp_path / "alone", characters=400)
    read = pyarrow.parquet.read_table
    for path in (output / "catalogue").iterdir():
        other = tmp_path / "alone" / "catalogue" / path.name
        assert read(path).to_pylist() == read(other).to_pylist()


@pytest.mark.slow
def test_processes_of_accelerate_launch(corpus, tmp_path):
    """The command itself, with the real model, in two processes."""
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    few = tmp_path / "few.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[60:80]), few)
    for output, prefix in (("two", launch), ("one", [])):
        arguments = ["-m", *prefix, *(["-m"] if prefix else []), "xcllama.commands.store", "encode", str(few)]
        arguments += [str(tmp_path / output), "--model", str(CHECKPOINT), "--characters-per-shard", "500"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd="/", env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "20 documents" in done.stdout
    read = pyarrow.parquet.read_table
    parts = sorted((tmp_path / "one" / "catalogue").iterdir())
    assert len(parts) > 2
    for path in parts:
        other = tmp_path / "two" / "catalogue" / path.name
        assert read(path).to_pylist() == read(other).to_pylist()
