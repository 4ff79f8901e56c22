"""A reader of any decoder without training: what `fit_reader` writes reads its caches; the report says how well."""

import sys

import pytest
import torch
from training_support import base_folder, tiny_tokenizer
from transformers import LlamaForCausalLM

from xcllama.commands import main
from xcllama.models import load_model
from xcllama.training.fit import fit_reader


@pytest.fixture
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    words = ["boat", "cat", "sea", "red", "town", "lives", "Ada", "Ben", "small", "with"]
    draw = lambda: words[int(torch.randint(len(words), (1,), generator=generator))]  # noqa: E731
    return [" ".join(draw() for _ in range(40)) for _ in range(40)]


def test_a_fitted_reader_loads_and_its_cache_matters(base_folder, texts, tmp_path):
    # states of every layer: the maps are exact, so that the cache brings what the prompt brings
    fields = {"context_layer": [0, 1, 2, 3]}
    report = fit_reader(base_folder, texts, tmp_path / "reader", **fields)
    assert set(report.r_squared) == set(report.gain) == {0, 1, 2, 3}
    assert min(report.r_squared.values()) > 0.9
    assert abs(report.loss_cached - report.loss_prompt) < 0.1 * abs(report.loss_without - report.loss_prompt) + 1e-3
    assert report.num_tokens > 1000
    model, processor = load_model(tmp_path / "reader")
    assert model.config.reads_jointly
    assert model.config.context_prefix == processor.context_prefix() == tiny_tokenizer()("<user>")["input_ids"]
    cache = model.encode_context(**processor(contexts=[texts[0]], return_tensors="pt"))
    inputs = processor(text=["Who lives there?"], return_tensors="pt")
    base = LlamaForCausalLM.from_pretrained(base_folder)
    assert (model(**inputs, context_cache=cache).logits - base(**inputs).logits).abs().max() > 1e-3


def test_the_command_reports_every_layer(base_folder, texts, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.md").write_text(text)
    arguments = [str(base_folder), "--text", str(tmp_path / "texts"), "--output", str(tmp_path / "reader")]
    monkeypatch.setattr(sys, "argv", ["xcllama", "fit", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["0", "1", "2", "3"]
    assert "% of what the prompt brings" in out
    assert (tmp_path / "reader" / "cross_attention.safetensors").is_file()


def test_too_few_texts_are_refused(base_folder, tmp_path):
    with pytest.raises(ValueError, match="at least two texts of 32 tokens, got 0"):
        fit_reader(base_folder, ["short"], tmp_path / "reader")
    assert not (tmp_path / "reader").exists()
