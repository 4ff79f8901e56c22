"""Fusion-in-Decoder on a tiny random T5: against the plain T5, order of contexts, the authors' weight names."""

import json
import sys
from pathlib import Path

import pytest
import torch
from evaluation_support import results, samples
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from xcllama.evaluation import command
from xcllama.evaluation.fusion_in_decoder import FusionInDecoderLM

CONTEXTS = ["cat sat", "dog ran far", "red boat"]
WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    ":",
    "question",
    "title",
    "context",
    "who",
    "cat",
    "sat",
    "dog",
    "ran",
    "far",
    "red",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else None
    model.save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path


def request(kind: str, arguments: tuple, contexts: list[str]) -> Instance:
    document = {"question": "who", "contexts_list": contexts, "titles_list": ["" for _ in contexts], "history": []}
    return Instance(kind, document, arguments, 0, metadata=("task", 0, 1))


def load(path) -> FusionInDecoderLM:
    return FusionInDecoderLM(str(path), device="cpu", dtype="float32")


GENERATION = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}


def test_one_context_is_a_plain_t5(folder):
    lm = load(folder)
    plain = T5ForConditionalGeneration.from_pretrained(folder).eval()
    (answer,) = lm.generate_until([request("generate_until", ("x", GENERATION), CONTEXTS[:1])])
    inputs = lm.tokenizer("question: who title:  context: cat sat", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = plain.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answer == lm.tokenizer.decode(output[0], skip_special_tokens=True)
    assert answer.cost.context_tokens == inputs["input_ids"].shape[1]
    assert answer.cost.generated_tokens == output.shape[1] - 1
    (score,) = lm.loglikelihood([request("loglikelihood", ("x", " dog ran"), CONTEXTS[:1])])
    labels = lm.tokenizer("dog ran", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = plain(**inputs, labels=labels).loss
    assert score[0] == pytest.approx(-loss.item() * labels.shape[1], abs=1e-4)


def test_all_contexts_count_and_their_order_does_not(folder):
    lm = load(folder)

    def score(contexts):
        return lm.loglikelihood([request("loglikelihood", ("x", " dog ran"), contexts)])[0][0]

    # encoded apart, read without positions: the decoder sees a set
    assert score(CONTEXTS) == pytest.approx(score(CONTEXTS[::-1]), abs=1e-4)
    assert score(CONTEXTS) != pytest.approx(score(CONTEXTS[:2]), abs=1e-4)


def test_earlier_turns_stand_in_front_of_the_question(folder):
    asked = request("generate_until", ("x", GENERATION), CONTEXTS[:2])
    asked.doc["history"] = [{"question": "red", "answer": "cat"}]
    asked.doc["titles_list"] = ["far", ""]
    first, second = load(folder).passages(asked)
    assert first == "question: red cat who title: far context: cat sat"
    assert second == "question: red cat who title:  context: dog ran far"


def test_through_the_same_tasks(folder, tmp_path):
    from xcllama.evaluation import command

    fixtures = Path(__file__).parent / "fixtures"
    data = {"paths": {"squad_v2": str(fixtures / "squad_v2.json")}, "split": "all", "bertscore_model": "none"}
    arguments = ["--model", "fid", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu",
                 "--tasks", "xc_squad_v2", "--metadata", json.dumps(data), "--output_path", str(tmp_path),
                 "--log_samples"]  # fmt: skip
    assert command.main(arguments) == 0
    assert 0 <= results(tmp_path)["results"]["xc_squad_v2"]["f1,none"] <= 1
    for sample in samples(tmp_path, "xc_squad_v2"):
        assert min(sample[name] for name in ("context_tokens", "generated_tokens", "time_to_first_token")) > 0


def test_weights_with_the_authors_names(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder.block."):
            number, rest = name.removeprefix("encoder.block.").split(".", 1)
            name = f"encoder.encoder.block.{number}.module.{rest}"
        elif name.startswith("encoder."):
            name = f"encoder.{name}"
        renamed[name] = tensor
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = load(tmp_path).model.state_dict(), load(folder).model.state_dict()
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_bad_input(folder, tiny_base, tmp_path):
    tiny_base.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model `fid` needs a T5"):
        load(tmp_path)
    with pytest.raises(ValueError, match="has no contexts"):
        load(folder).generate_until([request("generate_until", ("x", GENERATION), [])])
    with pytest.raises(NotImplementedError, match="leave perplexity tasks out"):
        load(folder).loglikelihood_rolling([])
