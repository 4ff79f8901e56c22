"""scripts/store.py with a tiny real model: every subcommand, every kind of file, and the whole way to an answer."""

import json
import re
import runpy
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from context_store import ContextStore
from context_store.answering import BreakEven
from context_store.documents import read_documents
from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.checkpoints import load_checkpoint

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


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
    """A folder with every kind of file."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("The lighthouse was built by Anna.")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.md").write_text("# Farm\n\nPotatoes grow here, said Bjørn.")
    (folder / "c.pdf").write_bytes(pdf_bytes("The ferry leaves at noon."))
    rows = [{"id": "r1", "text": "A bridge of stone.", "lang": "en"}, {"id": "r2", "text": "", "lang": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "ignored.bin").write_bytes(b"\x00")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run scripts/store.py in this process: exit status and output."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["store.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPTS / "store.py"), run_name="__main__")
        captured = capsys.readouterr()
        return stop.value.code, captured.out + (captured.err if stop.value.code == 2 else "")

    return run


def test_every_subcommand(command, corpus, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "store"
    model = ("--model", checkpoint)
    status, output = command("add", store, corpus, *model)
    assert (status, "5 encoded" in output) == (0, True), output
    status, output = command("add", store, corpus, *model, "--json", tmp_path / "add.json")
    assert "0 encoded" in output
    assert "5 unchanged" in output
    added = json.loads((tmp_path / "add.json").read_text())
    assert (added["added"]["skipped"], added["store"]["documents"]) == (5, 5)
    status, output = command("search", store, "who built the lighthouse?")
    assert output.split()[1] == "a.txt"
    status, output = command("search", store, "bridge", "--where", '{"lang": "en"}')
    assert output.split()[1] == "r1"
    status, output = command(
        "ask",
        store,
        "When does the ferry leave?",
        *model,
        "--max-new-tokens",
        "3",
        "-k",
        "1",
        "--break-even",
        "--json",
        tmp_path / "ask.json",
    )
    assert status == 0
    assert "c.pdf (score" in output
    assert re.search(r"cost: 1 documents from the store, [\d,]+ bytes read", output)
    assert "break-even against the prompt" in output
    asked = json.loads((tmp_path / "ask.json").read_text())
    assert asked["hits"][0]["id"] == "c.pdf"
    assert asked["cost"]["bytes_read"] > 0
    assert asked["break_even"]["encode_once_seconds"] > 0
    status, output = command("get", store, "r1", "a.txt", "--output", tmp_path / "two.safetensors")
    loaded, _ = load_checkpoint(checkpoint)
    assert len(loaded.load_context(tmp_path / "two.safetensors")) == 2
    assert json.loads(command("stats", store)[1])["documents"] == 5
    assert 'xcllama_store_documents{namespace="default"} 5.0' in command("stats", store, "--prometheus")[1]
    assert command("compact", store)[0] == 0
    assert command("verify", store) == (0, "5 documents read, 0 damaged, 0 encoded again\n")
    assert command("push", store, tmp_path / "snap", "--license", "cc0-1.0")[0] == 0
    assert command("pull", tmp_path / "snap", tmp_path / "copy")[0] == 0
    status, output = command("ask", tmp_path / "copy", "ferry", *model, "--max-new-tokens", "2", "-k", "1")
    assert "c.pdf" in output
    (shard,) = (store / "ns=default" / "shards").iterdir()
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    status, output = command("verify", store)
    assert status == 1
    assert {line.split(": ")[1] for line in output.splitlines() if line.startswith("damaged")} == {
        "a.txt",
        "sub/b.md",
        "c.pdf",
        "r1",
        "r2",
    }
    assert command("verify", store, "--repair", *model)[0] == 0
    assert command("verify", store)[0] == 0


def test_errors_name_what_is_wrong(command, tmp_path, checkpoint):
    status, output = command("search", tmp_path / "none", "x")
    assert (status, "make one with `add`" in output) == (2, True)
    (tmp_path / "bad.pdf").write_bytes(b"no pdf")
    status, output = command("add", tmp_path / "s", tmp_path / "bad.pdf", "--model", checkpoint)
    assert (status, "no readable PDF" in output) == (2, True)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "good.txt").write_text("good")
    documents = list(read_documents([tmp_path / "latin.txt", tmp_path / "good.txt"], skip_bad=True))
    assert [document.id for document in documents] == ["good.txt"]
    with pytest.raises(ValueError, match="must end in"):
        list(read_documents([Path(__file__)]))
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no id column 'id'"):
        list(read_documents([tmp_path / "x.parquet"]))


def test_answers_through_the_store_are_those_of_the_bare_cache(corpus, checkpoint, tmp_path):
    model, processor = load_checkpoint(checkpoint)
    documents = {document.id: document.text for document in read_documents([corpus])}
    with ContextStore(tmp_path, model, processor) as store:
        store.add(documents.keys(), documents.values())
        ids = ["d.parquet", "c.pdf", "a.txt"][1:]
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


def test_break_even_arithmetic():
    def figures(encode, store, prompt, prefix_once, prefix):
        return BreakEven(10, encode, store, prompt, prefix_once, prefix, 1, 1)

    assert figures(10, 1, 3, 10, 2).requests_against_prompt == 5
    assert figures(10, 3, 3, 10, 2).requests_against_prompt == float("inf")
    assert figures(10, 1, 3, 4, 2).requests_against_prefix == (6, float("inf"))
    assert figures(4, 1, 3, 10, 2).requests_against_prefix == (1, float("inf"))
    never = figures(10, 3, 3, 10, 2).as_dict()
    assert never["pays_against_prompt_from"] is None
    assert (never["tokens"], figures(4, 2, 3, 10, 1).as_dict()["pays_against_prefix_up_to"]) == (10, 6)
    # cheaper to make, dearer to use: good for few requests only
    assert figures(4, 2, 3, 10, 1).requests_against_prefix == (1, 6)
    assert figures(10, 2, 3, 4, 1).requests_against_prefix[0] == float("inf")
