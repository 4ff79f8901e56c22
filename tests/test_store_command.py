"""`xcllama store` with a tiny real model: every subcommand, every kind of file, and the whole way to an answer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.answer_scores import NOT_FOUND
from xcllama.commands.store import app
from xcllama.documents import ReadReport, find_files, read_documents
from xcllama.models import load_model
from xcllama.store import ContextStore


def pdf_bytes(text: str) -> bytes:
    """A one-page PDF."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(content)
    return content + b"xref\n0 6\n0000000000 65535 f \n%strailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        start,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Added weights on a tiny random Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {token: index + 2 for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "base"
    )
    model = XCLlamaForCausalLM.from_decoder(str(folder / "base"), context_layer=2, cross_attention_layers=[1, 2])
    model.save_cross_attention(folder / "added")
    return folder / "added"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with files of several kinds."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("The lighthouse was built by Anna.")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.md").write_text("# Farm\n\nPotatoes grow here, said Bjørn.")
    (folder / "c.pdf").write_bytes(pdf_bytes("The ferry leaves at noon."))
    rows = [{"id": "r1", "text": "A bridge of stone.", "lang": "en"}, {"id": "r2", "text": "Silence.", "lang": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "nothing.txt").write_text(" \n")
    (folder / "broken.pdf").write_bytes(b"no pdf")
    (folder / ".hidden.txt").write_text("not looked at")
    return folder


def run(*arguments) -> tuple[int, str]:
    """Exit status and output of the command; errors of its user are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_every_subcommand(corpus, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "store"
    status, output = run("add", store, corpus, "--model", checkpoint)
    assert (status, "5 documents encoded" in output) == (0, True), output
    assert "files: 4 read, 2 skipped, 1 empty" in output
    assert "skipped photo.jpg: files of the kind '.jpg' are not read, only .txt" in output
    assert "skipped broken.pdf: no readable pdf file" in output
    assert "  empty nothing.txt" in output
    # the store knows its model
    status, output = run("add", store, corpus, "--json")
    added = json.loads(output)
    assert (added["added"]["skipped"], added["added"]["encoded"], added["store"]["documents"]) == (5, 0, 5)
    assert [line.split()[-1] for line in run("list", store)[1].splitlines()] == [
        "a.txt",
        "c.pdf",
        "r1",
        "r2",
        "sub/b.md",
    ]
    assert run("search", store, "who built the lighthouse?")[1].startswith("a.txt (score")
    assert run("search", store, "bridge", "--where", '{"lang": "en"}')[1].startswith("r1 ")
    status, output = run("ask", store, "When does the ferry leave?", "--max-new-tokens", "3", "-k", "2")
    assert status == 0
    assert "from c.pdf, page 1: The ferry leaves at noon." in output
    assert re.search(r"cost: 1 passages, [\d,]+ bytes read", output)
    asked = json.loads(run("ask", store, "ferry", "--json", "--max-new-tokens", "2")[1])
    assert asked["hit"]["id"] == "c.pdf"
    assert (asked["sentence"], asked["start"], asked["end"]) == ("The ferry leaves at noon.", 0, 25)
    assert [own["found"] for own in asked["answers"]] == [True]
    assert asked["cost"]["bytes_read"] > 0
    # a question of words that no document has is declined, not refused
    asked = json.loads(run("ask", store, "zeppelin", "--json")[1])
    assert (asked["text"], asked["found"], asked["hit"]) == (NOT_FOUND, False, None)
    assert "2 contexts" in run("get", store, "r1", "a.txt", "--output", tmp_path / "two.safetensors")[1]
    loaded, _ = load_model(checkpoint)
    assert len(loaded.load_context(tmp_path / "two.safetensors")) == 2
    assert json.loads(run("stats", store)[1])["documents"] == 5
    assert 'xcllama_store_documents{namespace="default"} 5.0' in run("stats", store, "--prometheus")[1]
    assert run("compact", store)[0] == 0
    assert run("verify", store) == (0, "5 contexts read, 0 documents damaged, 0 mended\n")
    assert run("push", store, tmp_path / "snap", "--license", "cc0-1.0")[0] == 0
    assert run("pull", tmp_path / "snap", tmp_path / "copy")[0] == 0
    output = run("ask", tmp_path / "copy", "ferry", "--model", checkpoint, "--max-new-tokens", "2", "-k", "1")[1]
    assert "from c.pdf" in output
    assert run("evict", store, "r2") == (0, "1 documents removed\n")
    (shard,) = (store / "ns=default" / "shards").iterdir()
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    status, output = run("verify", store)
    damaged = {line.split(": ")[1] for line in output.splitlines() if line.startswith("damaged")}
    assert (status, damaged) == (1, {"a.txt", "sub/b.md", "c.pdf", "r1"})
    assert run("verify", store, "--repair")[0] == 0
    assert run("verify", store)[0] == 0


def test_errors_name_what_is_wrong(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="make one with `xcllama store add STORE FOLDER`"):
        run("search", tmp_path / "none", "x")
    # a folder of documents is no store, and stays as it is
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="no store at .*papers; make one with"):
        run("ask", tmp_path / "papers", "words", "--model", checkpoint)
    assert [path.name for path in (tmp_path / "papers").iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match="no file or folder at"):
        run("add", tmp_path / "s", tmp_path / "none", "--model", checkpoint)
    (tmp_path / "bad.pdf").write_bytes(b"no pdf")
    status, output = run("add", tmp_path / "s", tmp_path / "bad.pdf", "--model", checkpoint)
    assert (status, "no readable pdf file" in output) == (1, True)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    with pytest.raises(ValueError, match="both named 'same.txt'"):
        find_files([tmp_path / "one" / "same.txt", tmp_path / "two" / "same.txt"])
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "x.parquet")
    report = ReadReport()
    assert list(read_documents(find_files([tmp_path / "x.parquet"]), report)) == []
    assert "no id column 'id'" in report.skipped["x.parquet"]
    with pytest.raises(ValueError, match="has no document 'x'"):
        run("get", tmp_path / "s", "x")


SLOW = """
import sys, time
from modeling_xcllama import XCLlamaForCausalLM
from xcllama.store import encoding
from xcllama.commands.store import app
encode = XCLlamaForCausalLM.encode_context
def slow(self, *arguments):
    time.sleep(0.3)
    return encode(self, *arguments)
XCLlamaForCausalLM.encode_context = slow
encoding.TOKENS_PER_CALL["cpu"] = 60
app(["add", *sys.argv[1:]])
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_add_says_what_is_kept_and_goes_on(corpus, checkpoint, tmp_path, signal_number):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"text number {number} " * 12)
    command = [sys.executable, "-c", SLOW, str(tmp_path / "s"), str(folder), "--model", str(checkpoint)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": "/"}
    with subprocess.Popen(command, **options, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        lines = [process.stderr.readline() for _ in range(2)]
        # progress from the first moment on, then a line every ten seconds
        assert lines[0] == "12 files, 0.0 MB\n"
        assert lines[1].startswith("  0%  0 of 12 files, 0 tokens")
        time.sleep(1.5)
        process.send_signal(signal_number)
        output, errors = process.communicate(timeout=500)
    assert process.returncode == 128 + signal_number, errors
    assert "Traceback" not in errors
    kept = int(re.match(r"stopped; kept: (\d+) documents encoded", output)[1])
    assert 0 < kept < 12
    status, output = run("add", tmp_path / "s", folder)
    assert status == 0
    assert f"{12 - kept} documents encoded" in output
    assert f"{kept} unchanged" in output
    assert run("verify", tmp_path / "s")[0] == 0


def test_answers_through_the_store_are_those_of_the_bare_cache(corpus, checkpoint, tmp_path):
    model, processor = load_model(checkpoint)
    documents = {document.id: document.text for document in read_documents(find_files([corpus]), ReadReport())}
    with ContextStore(tmp_path, model, processor) as store:
        store.add(documents.keys(), documents.values())
        ids = ["c.pdf", "a.txt"]
        inputs = processor(text=["Who built it?"], return_tensors="pt")
        contexts = processor(contexts=[documents[name] for name in ids], return_tensors="pt")
        bare = model(**inputs, context_cache=model.encode_context(**contexts).join([[0, 1]])).logits
        stored = model(**inputs, context_cache=store.get(ids).join([[0, 1]])).logits
        torch.testing.assert_close(stored, bare, atol=1e-5, rtol=1e-5)
        swapped = model(**inputs, context_cache=store.get(ids[::-1]).join([[0, 1]])).logits
        torch.testing.assert_close(swapped, bare, atol=1e-5, rtol=1e-5)
        generated = model.generate(**inputs, context_cache=store.get(ids).join([[0, 1]]), max_new_tokens=4)
        assert generated.shape[1] > inputs["input_ids"].shape[1]
        processor.context_max_length = 100
        with pytest.raises(ValueError, match="'long'"):
            store.add(["short", "long"], ["ok", "x" * 101])
