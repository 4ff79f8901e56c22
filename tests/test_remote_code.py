"""Loading through the Auto classes in a process that cannot import this repository, from another working directory."""

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor

PRELUDE = """
import sys
# site-packages as a plain folder: the editable install of this repository is not seen
sys.path.append({packages!r})
import importlib.util
for name in ("modeling_xcllama", "xcllama", "dataset_builders", "conftest"):
    assert importlib.util.find_spec(name) is None, name
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
folder = {folder!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""


def run_elsewhere(code: str, folder: Path, cwd: Path) -> str:
    """Run `code` with `python -S`, so that nothing but site-packages is importable."""
    packages = next(path for path in site.getsitepackages() if path.endswith("site-packages"))
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", PRELUDE.format(packages=packages, folder=str(folder)) + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_auto_class(tiny_model, batch, tmp_path, smollm2_folder):
    folder, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    tiny_model.save_pretrained(folder)
    XCLlamaProcessor(AutoTokenizer.from_pretrained(smollm2_folder)).save_pretrained(folder)
    cache = tiny_model.encode_context(batch["context_input_ids"])
    cache.save(tmp_path / "cache.safetensors")
    torch.save(batch["input_ids"], tmp_path / "ids.pt")
    output = run_elsewhere(
        f"""
ids = torch.load({str(tmp_path / "ids.pt")!r}, weights_only=True)
cache = model.load_context({str(tmp_path / "cache.safetensors")!r})
print(model.generate(ids, context_cache=cache, max_new_tokens=5, do_sample=False, eos_token_id=None).tolist())
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print(sorted(processor(text="a", contexts="b")))
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
print(type(model).__name__, type(bare).__name__, type(config).__name__, type(processor).__name__)
assert torch.equal(bare.embed_tokens.weight, model.model.embed_tokens.weight)
""",
        folder,
        elsewhere,
    ).splitlines()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = tiny_model.generate(batch["input_ids"], context_cache=cache, **options)
    assert output[0] == str(expected.tolist())
    assert "context_input_ids" in output[1]
    assert output[2] == "XCLlamaForCausalLM XCLlamaModel XCLlamaConfig XCLlamaProcessor"


def test_smollm2_answers_from_a_file_in_another_process(smollm2_folder, tmp_path):
    fields = {"context_layer": 15, "cross_attention_layers": list(range(14, 30, 2))}
    # in float32: tokens of 16-bit products may differ between two processes
    model = XCLlamaForCausalLM.from_decoder(smollm2_folder, dtype=torch.float32, **fields).eval()
    processor = XCLlamaProcessor(AutoTokenizer.from_pretrained(smollm2_folder))
    text = "The lighthouse of Skerrow was designed by Margaret Hale and finished in August 1838."
    cache = model.encode_context(**processor(contexts=[text], return_tensors="pt"))
    cache.save(tmp_path / "cache.safetensors")
    model.save_pretrained(tmp_path / "repo")
    processor.save_pretrained(tmp_path / "repo")
    inputs = processor(text=["Who designed the lighthouse?"], return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, context_cache=cache, **options)
    assert cache.bytes_per_token == 4 * 576
    output = run_elsewhere(
        f"""
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=["Who designed the lighthouse?"], return_tensors="pt")
cache = model.load_context({str(tmp_path / "cache.safetensors")!r})
print(model.generate(**inputs, context_cache=cache, max_new_tokens=6, do_sample=False).tolist())
""",
        tmp_path / "repo",
        tmp_path,
    )
    assert output == str(expected.tolist())


def test_separate_encoder(tiny_base, minilm_folder, tmp_path):
    """XC-LlamaEnc on real MiniLM weights: encodes as the encoder does, trains it, saves and loads."""
    model = XCLlamaForCausalLM.from_decoder(tiny_base, minilm_folder)
    encoder = AutoModel.from_pretrained(minilm_folder)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    inputs = tokenizer(["Margaret Hale designed the lighthouse.", "Yes."], padding=True, return_tensors="pt")
    cache = model.encode_context(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    torch.testing.assert_close(cache.states["hidden"], expected, atol=1e-5, rtol=0)
    assert cache.bytes_per_token == 384 * 4
    long = torch.randint(1000, 2000, (1, 1100))
    parts = [model.encode_context(long[:, start:end]) for start, end in ((0, 367), (367, 733), (733, 1100))]
    states = torch.cat([part.states["hidden"] for part in parts])
    torch.testing.assert_close(model.encode_context(long).states["hidden"], states, atol=1e-4, rtol=0)
    ids = torch.randint(3, 97, (2, 4))
    contexts = {"context_input_ids": inputs["input_ids"], "context_attention_mask": inputs["attention_mask"]}
    model.train()
    model(ids, **contexts, labels=ids).loss.backward()
    trained = [weight for name, weight in model.named_parameters() if name.startswith("model.encoder.")]
    assert trained
    assert all(weight.grad is not None and weight.requires_grad for weight in trained)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, **contexts).logits, model(ids, **contexts).logits)
    assert loaded(ids, context_cache=cache).logits.shape == (2, 4, 97)


@pytest.mark.parametrize("missing", ["context_cache.py"])
def test_save_pretrained_brings_every_file_it_imports(tiny_model, tmp_path, missing):
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / missing).exists()
    assert not (tmp_path / "__init__.py").exists()
