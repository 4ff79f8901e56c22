"""The comparison of methods: which texts are read, answers beside plain calls, what is kept and not run again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_models import folders
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from modeling_xcllama import XCLlamaForCausalLM
from xcllama.evaluation import comparison
from xcllama.evaluation.comparison import METHODS, Models, Settings, compare
from xcllama.evaluation.questions import Question, Shelf
from xcllama.evaluation.reader import BATCH_ROWS, BATCH_TOKENS, Reader, Request, batches

TEXTS = ["Ann lives in Oslo.", "Bob has two red cars.", "The tower is 300 m high. It is old.", "Rain falls in June."]
ASKED = [("Where?", "Oslo"), ("Who has what?", "two red cars"), ("How high is it?", "300 m"), ("When?", "June")]


def question(index: int, **fields) -> Question:
    asked, answer = ASKED[index]
    values = {"id": str(index), "document": f"d{index // 2}", "question": asked, "history": (), "answers": (answer,)}
    return Question(**(values | {"contexts": (TEXTS[index],), "absent": TEXTS[index ^ 1]} | fields))


QUESTIONS = [question(index) for index in range(4)]


@pytest.fixture
def read(monkeypatch):
    """Four questions in place of a source's."""
    monkeypatch.setattr(comparison, "read_questions", lambda source, split, path: QUESTIONS)


@pytest.fixture(scope="module")
def joint(folders) -> str:
    """A folder of weights that read jointly, in which every text shows."""
    model = XCLlamaForCausalLM.from_decoder(
        folders.base, init="random", cross_attention_mode="joint", context_layer=2, cross_attention_layers=[0, 2, 3]
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for _, weight in model.added_parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else None
    model.save_cross_attention(folders.root / "joint")
    return str(folders.root / "joint")


@pytest.fixture(scope="module")
def lora(folders) -> str:
    model = AutoModelForCausalLM.from_pretrained(folders.base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = folders.base
    adapted.save_pretrained(folders.root / "lora-prompt")
    return str(folders.root / "lora-prompt")


def test_texts_are_drawn_without_the_answer():
    shelf = Shelf(QUESTIONS, seed=1)
    for asked in QUESTIONS:
        own = asked.contexts[0]
        assert shelf.texts_of(asked) == (own,)
        assert shelf.texts_of(asked, "absent") == (asked.absent,)
        joined = shelf.texts_of(asked, documents=3)
        assert len(set(joined)) == 3
        assert own in joined
        # what is drawn does not change
        assert joined == Shelf(QUESTIONS, seed=1).texts_of(asked, documents=3)
        (other,) = shelf.texts_of(asked, "other")
        assert other not in (own, asked.absent)
    # a text that holds the answer is no distractor
    holding = [*QUESTIONS, question(0, id="4", contexts=("It may be in Oslo too.",))]
    with pytest.raises(ValueError, match="needs 4 other texts without its answers, the split has 3"):
        Shelf(holding).texts_of(QUESTIONS[0], documents=5)
    places = {Shelf(QUESTIONS, seed).texts_of(QUESTIONS[0], documents=4).index(TEXTS[0]) for seed in range(20)}
    assert places == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="`passage` must be one of"):
        shelf.texts_of(QUESTIONS[0], "wrong")


def test_batches():
    sizes = [5, 900, 7, *[3] * 40, BATCH_TOKENS * 2]
    found = list(batches(sizes))
    assert sorted(index for batch in found for index in batch) == list(range(len(sizes)))
    assert found[0] == [len(sizes) - 1]
    for batch in found[1:]:
        assert len(batch) <= BATCH_ROWS
        assert max(sizes[i] for i in batch) * len(batch) <= BATCH_TOKENS


@pytest.mark.parametrize("weights", ["xc", "joint"])
def test_answers_are_those_of_plain_calls(weights, folders, joint):
    reader = Reader.load(folders.xc if weights == "xc" else joint, max_new_tokens=6)
    requests = [Request(asked, Shelf(QUESTIONS).texts_of(asked, documents=2)) for asked in QUESTIONS]
    tokenizer, model = reader.tokenizer, reader.model
    seen = set()
    for reads in ("cache", "prompt", "nothing"):
        for request, answer in zip(requests, reader.answer(requests, reads), strict=True):
            texts = request.texts if reads == "prompt" else ()
            (prompt,) = reader.processor.prompts(["\n\n".join([*texts, request.question.question])])
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            options = {}
            if reads == "cache":
                inputs = reader.processor(contexts=list(request.texts), return_tensors="pt")
                cache = model.encode_context(**inputs).to(dtype=torch.bfloat16)
                options = {"context_cache": cache.join([range(2)])}
            written = model.generate(ids, max_new_tokens=6, do_sample=False, **options)[0, ids.shape[1] :]
            assert answer.text == tokenizer.decode(written, skip_special_tokens=True).strip().split("\n")[0]
            target = torch.tensor([[*tokenizer(request.question.answers[0])["input_ids"], tokenizer.eos_token_id]])
            logits = model(torch.cat([ids, target], dim=1), **options).logits[:, ids.shape[1] - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits[0], target[0])
            assert answer.loss == pytest.approx(loss.item(), abs=1e-4)
            logits = model(torch.cat([ids, written[None]], dim=1), **options).logits[0, ids.shape[1] - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, written[:, None])[:, 0]
            assert answer.token_scores == pytest.approx(scores.tolist(), abs=1e-4)
            assert (answer.context_tokens > 0) == (reads != "nothing")
            seen.add(round(answer.loss, 3))
    # what is read and how shows
    assert len(seen) == 3 * len(QUESTIONS)


def test_quantized_caches_and_bytes(folders):
    reader = Reader.load(folders.xc, max_new_tokens=2)
    requests = [Request(asked, asked.contexts) for asked in QUESTIONS]
    losses = {dtype: [a.loss for a in reader.answer(requests, "cache", dtype)] for dtype in ("bfloat16", "int8")}
    assert losses["int8"] != losses["bfloat16"]
    assert losses["int8"] == pytest.approx(losses["bfloat16"], abs=0.2)
    width, kv_width = 32, 2 * 8
    assert reader.bytes_per_token("cache") == {
        "cache_bytes_per_token": 2 * width,
        # keys and values of three blocks
        "resident_bytes_per_token": 3 * 2 * 2 * kv_width,
    }
    assert reader.bytes_per_token("cache", "int8")["cache_bytes_per_token"] < 2 * width
    assert reader.bytes_per_token("prompt")["cache_bytes_per_token"] == 4 * 2 * 2 * kv_width
    assert reader.bytes_per_token("nothing")["resident_bytes_per_token"] is None
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, there is room for 510"):
        reader.answer([Request(QUESTIONS[0], ("word " * 200,))], "prompt")


def test_a_merged_adapter_reads_its_prompt(folders, lora):
    requests = [Request(asked, asked.contexts) for asked in QUESTIONS]
    adapted = [answer.loss for answer in Reader.load(lora, max_new_tokens=1).answer(requests, "prompt")]
    plain = [answer.loss for answer in Reader.load(folders.base, max_new_tokens=1).answer(requests, "prompt")]
    own = [answer.loss for answer in Reader.load(folders.xc, max_new_tokens=1).answer(requests, "prompt")]
    assert adapted != pytest.approx(plain, abs=1e-3)
    # a row without a context is the base's
    assert own == pytest.approx(plain, abs=1e-4)


def test_methods_and_their_models(folders, lora):
    models = Models([folders.xc, "org/other"], lora_prompt=lora)
    assert models.of("cross_int8") == [folders.xc, "org/other"]
    assert models.of("prompt") == [folders.xc]
    assert models.of("lora_prompt_absent") == [lora]
    methods = models.default_methods("squad_sample")
    assert {"none", "cross", "cross_joined16", "lora_prompt", "lora_prompt_absent"} <= set(methods)
    assert not {"lora_closed_book", "lora_prompt_joined16"} & set(methods)
    for method in ("lora_closed_book", "telepathy"):
        with pytest.raises(
            ValueError, match=f"method '{method}' is unknown or lacks its model; known are none, prompt"
        ):
            models.of(method)


def test_what_was_answered_is_kept_and_not_answered_again(read, folders, lora, tmp_path, monkeypatch):
    loads = []
    load = Reader.load

    def counted(folder, *arguments, **options):
        loads.append(Path(folder).name)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(Reader, "load", counted)
    models = Models([folders.xc], lora_prompt=lora)
    settings = Settings("squad_sample", "dev", limit=3, max_new_tokens=3)

    def run(settings=settings, methods=("none", "prompt", "cross", "cross_absent", "lora_prompt")):
        loads.clear()
        return compare(models, methods, settings, tmp_path)

    paths = run()
    place = tmp_path / "squad_sample-dev"
    names = [str(path.relative_to(place)) for path in paths]
    assert names == ["base/none.json", "base/prompt.json", "xc/cross.json", "xc/cross_absent.json",
                     "lora-prompt/lora_prompt.json"]  # fmt: skip
    # one load serves a model's methods
    assert loads == ["xc", "lora-prompt"]
    for path in paths:
        records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        assert [record["id"] for record in records] == ["0", "1", "2"]
        assert all(record["token_scores"] and record["answer_loss"] > 0 for record in records)
    figures = json.loads(paths[2].read_text())
    assert figures["key"] | {"weights": None} == figures["key"] | {"weights": None, "limit": 3, "reads": "cache"}
    assert figures["provenance"]["commit"]
    before = [path.stat().st_mtime_ns for path in paths]
    run()
    assert loads == []
    assert [path.stat().st_mtime_ns for path in paths] == before
    # other weights read the cache otherwise; the baselines use the same base as before
    weights = Path(folders.xc) / "more.safetensors"
    weights.write_bytes(b"x")
    run(methods=("none",))
    assert loads == []
    run(methods=("cross",))
    assert loads == ["xc"]
    weights.unlink()
    run(replace(settings, limit=2), methods=("none",))
    assert loads == ["xc"]


def test_every_method_runs(read, folders, joint, lora, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "cross_joined16", replace(METHODS["cross_joined16"], documents=3))
    models = Models([joint], lora_prompt=lora)
    methods = models.default_methods("squad_sample")
    paths = compare(models, methods, Settings("squad_sample", "test", max_new_tokens=2), tmp_path)
    assert len(paths) == len(methods)
    read_tokens = {path.stem: [json.loads(line)["context_tokens"] for line in path.with_suffix(".jsonl").open()]
                   for path in paths}  # fmt: skip
    assert read_tokens["none"] == [0] * 4
    assert all(four > one for four, one in zip(read_tokens["cross_joined4"], read_tokens["cross"], strict=True))
    assert read_tokens["cross_int8"] == read_tokens["cross"]
