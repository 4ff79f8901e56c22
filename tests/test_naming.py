"""One way to name a model: added weights, a whole model's folder, and what is loaded, by every entrance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from publishing_support import make_base, make_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from xcllama.models import load_model

TASK = "context-question-answering"
TEXT, QUESTION = "The lighthouse of Skerrow was designed by Margaret Hale.", "Who designed it?"


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """The same model as added weights and as a whole model."""
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    added = make_checkpoint(tmp_path / "cache", tmp_path / "added", context_max_length=500)
    (added / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    model, processor = load_model(added)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    return {"added": added, "whole": tmp_path / "whole"}


@pytest.mark.parametrize("kind", ["added", "whole"])
def test_every_entrance_answers_alike(folders, kind):
    name = str(folders[kind])
    by_command, own_processor = load_model(name)
    automatic = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    assert processor.context_max_length == own_processor.context_max_length == 500
    assert processor.prompts(["a"]) == ["<a>"]
    named = pipeline(TASK, model=name, trust_remote_code=True, device="cpu")
    loaded = pipeline(TASK, model=automatic, processor=processor, device="cpu")
    ours = pipeline(TASK, model=by_command, processor=own_processor, device="cpu")
    answers = [one(QUESTION, contexts=TEXT, max_new_tokens=5)["answers"] for one in (named, loaded, ours)]
    assert answers[0] == answers[1] == answers[2]
    assert automatic.config.context_max_length == 500
    assert not any(
        weight.requires_grad
        for name, weight in automatic.named_parameters()
        if "cross" not in name and "context" not in name
    )


def test_arguments_reach_the_base_and_the_config(folders, tmp_path):
    options = {"trust_remote_code": True, "dtype": torch.float64, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folders["added"], **options, answer_threshold=0.25)
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"
    assert model.config.answer_threshold == 0.25
    # what is loaded from added weights is saved as a whole model, and as added weights
    model.save_cross_attention(tmp_path / "again")
    assert (tmp_path / "again" / "xcllama_classes.py").read_bytes() == (
        folders["added"] / "xcllama_classes.py"
    ).read_bytes()
    again, _ = load_model(tmp_path / "again")
    assert again.config.answer_threshold == 0.25
    base = LlamaForCausalLM.from_pretrained(make_base(tmp_path / "cache"))
    assert XCLlamaForCausalLM.from_pretrained(folders["added"], base=base).lm_head.weight is base.lm_head.weight
    with pytest.raises(ValueError, match="loaded already: leave out device_map"):
        XCLlamaForCausalLM.from_pretrained(folders["added"], base=base, device_map="cpu")
    with pytest.raises(ValueError, match="`base` is for added weights"):
        XCLlamaForCausalLM.from_pretrained(folders["whole"], base=base)
    with pytest.raises(ValueError, match="is a 'llama' model, which reads no contexts"):
        load_model(make_base(tmp_path / "cache"))


def test_a_separate_encoder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertModel(BertConfig(vocab_size=320, **sizes))
    base = make_base(tmp_path / "cache")
    encoder.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "encoder")
    added = make_checkpoint(
        tmp_path / "cache",
        tmp_path / "added",
        encoder,
        encoder_name_or_path=str(tmp_path / "encoder"),
        context_layer=1,
    )
    model, processor = load_model(added)
    assert isinstance(processor, XCLlamaProcessor)
    assert processor.context_tokenizer is not processor.tokenizer
    assert model.encode_context(**processor(contexts=[TEXT], return_tensors="pt")).states["hidden"].shape[1] == 32


def test_loaded_models_know_the_task(tiny_model):
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"].__name__ == "ContextQuestionAnsweringPipeline"


def test_without_the_package_the_error_says_what_to_install(folders, tmp_path):
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"""
import sys
sys.path.append({packages!r})
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folders["added"])!r}, trust_remote_code=True)
"""
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True)
    assert done.returncode
    assert b"Run `pip install xcllama`" in done.stderr
