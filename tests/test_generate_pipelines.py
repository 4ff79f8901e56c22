"""The pipelines "text-generation" and "context-question-answering", attention weights and evidence."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from modeling_xcllama import (
    ContextQuestionAnsweringPipeline,
    XCLlamaConfig,
    XCLlamaProcessor,
    find_evidence,
    pipeline_xcllama,
)
from modeling_xcllama.answer_scores import NOT_FOUND
from modeling_xcllama.passages import split_passages

WORDS = (
    "Question Answer : the a capital of is France Italy Paris Rome what where who river Seine Tiber . ? and".split()
)
FRANCE = "the capital of France is Paris . the river is the Seine ."
ITALY = "the capital of Italy is Rome . the river is the Tiber and the capital is Rome ."


@pytest.fixture(scope="module")
def processor():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return XCLlamaProcessor(fast)


@pytest.fixture(scope="module")
def model(make_sharp_model, make_sharp_llama):
    model = make_sharp_model(make_sharp_llama(eos_token_id=2))
    with torch.no_grad():
        # only words of the vocabulary are written
        model.lm_head.weight[len(WORDS) + 4 :] = 0
    return model.eval()


@pytest.fixture(scope="module")
def answering(model, processor):
    return ContextQuestionAnsweringPipeline(model=model, processor=processor, max_new_tokens=6)


def expected_answer(model, processor, question, texts, new_tokens=6):
    """Greedy answer and score by a plain loop."""
    cache = model.encode_context(*processor(contexts=texts, return_tensors="pt").values()).join([range(len(texts))])
    ids = processor(text=question, return_tensors="pt")["input_ids"]
    length, score = ids.shape[1], 0.0
    with torch.no_grad():
        for _ in range(new_tokens):
            log_probabilities = model(ids, context_cache=cache, use_cache=False).logits[:, -1].log_softmax(-1)
            best = log_probabilities.max(-1)
            score += float(best.values)
            ids = torch.cat([ids, best.indices[None]], dim=-1)
            if int(best.indices) == 2:
                break
    written = ids[0, length:]
    return processor.decode(written, skip_special_tokens=True), float(torch.tensor(score / len(written)).exp())


def test_answers_and_scores(model, processor, answering):
    questions = ["what is the capital ?", "where is the river Tiber ?", "who is Rome ?"]
    groups = [FRANCE, [ITALY], [FRANCE, ITALY]]
    together = {"num_passages": None}
    result = answering(questions, contexts=groups, **together)
    assert len(result["cache"]) == len({answer["answer"] for answer in result["answers"]}) == 3
    for question, texts, answer in zip(questions, groups, result["answers"], strict=True):
        texts = [texts] if isinstance(texts, str) else texts
        text, score = expected_answer(model, processor, question, texts)
        assert answer["answer"] == text
        assert answer["score"] == pytest.approx(score, abs=1e-4)
    # the cache that came out answers again, without the texts, and so does one row for all questions
    again = answering(questions, context_cache=result["cache"], **together)
    assert again["answers"] == result["answers"]
    one = answering(questions, context_cache=result["cache"].select([0]))
    shared = answering(questions, contexts=FRANCE)
    assert [a["answer"] for a in one["answers"]] == [a["answer"] for a in shared["answers"]]
    assert one["answers"] != result["answers"]
    # keys and values that are kept over requests
    assert answering(questions, context_cache=model.project_context(result["cache"])) == result


def test_equal_texts_are_encoded_once(answering):
    cache = answering(["what is France ?", "what is Italy ?"], contexts=[[FRANCE, ITALY], [FRANCE]])["cache"]
    assert len(cache.offsets) == 3
    assert cache.rows == ((0, 1), (0,))


def test_the_surest_of_the_passages_that_fit_answers(model, processor, answering, monkeypatch):
    """A long text is split; its passages are found, read each by itself, and places are those of the text."""
    paragraphs = [FRANCE, ITALY, "who is Rome and where is the river Tiber and what is France ?"]
    paragraphs.append("where is France and what is the capital ?")
    text = "\n\n".join(paragraphs)
    monkeypatch.setattr(
        pipeline_xcllama, "split_passages", lambda text, count: split_passages(text, count, (4, 19, 19))
    )
    question = "what is the capital of Italy ?"
    (alone,) = answering(question, contexts=[["", text]], num_passages=1)["answers"]
    assert [text[p["start"] : p["end"]] for p in alone["passages"]] == [ITALY]
    result = answering([question, "who is Rome ?"], contexts=text, num_passages=3, num_evidence=1)
    for asked, answer in zip([question, "who is Rome ?"], result["answers"], strict=True):
        assert len(answer["passages"]) == 3
        own = [expected_answer(model, processor, asked, [read["text"]]) for read in answer["passages"]]
        assert [read["answer"] for read in answer["passages"]] == [text for text, _ in own]
        assert answer["score"] == pytest.approx(max(score for _, score in own), abs=1e-4)
        chosen = next(read for read in answer["passages"] if read["score"] == answer["score"])
        assert answer["answer"] == chosen["answer"]
        for place in (answer, *answer["evidence"]):
            assert chosen["start"] <= place["start"] < place["end"] <= chosen["end"]
        assert text[answer["start"] : answer["end"]] == answer["sentence"]
        assert text[answer["evidence"][0]["start"] : answer["evidence"][0]["end"]] == answer["evidence"][0]["text"]
    # the cache alone, and with its texts
    cache = result["cache"].select([0])
    assert len(cache.rows[0]) == 4
    again = answering(question, context_cache=cache, num_passages=3)["answers"][0]
    assert again["answer"] == result["answers"][0]["answer"]
    assert again["score"] == pytest.approx(result["answers"][0]["score"], abs=1e-4)
    texts = [[f"{own} " for own in paragraphs]]
    beside = answering(question, texts, cache, num_passages=3, num_evidence=1)["answers"][0]
    assert beside["sentence"] in texts[0][beside["document"]]
    with pytest.raises(ValueError, match=r"texts of the cache's documents, row by row: \[4\]"):
        answering(question, [[FRANCE]], cache)


def test_what_is_below_the_threshold_is_declined_with_what_was_read(model, answering, monkeypatch):
    given = answering("what is the capital ?", contexts=[[FRANCE, ITALY]])["answers"][0]
    monkeypatch.setattr(model.config, "answer_threshold", given["score"] + 1e-3)
    declined = answering("what is the capital ?", contexts=[[FRANCE, ITALY]])["answers"][0]
    assert (declined["answer"], declined["found"]) == (NOT_FOUND, False)
    assert declined["score"] == given["score"]
    assert {read["answer"] for read in declined["passages"]} >= {given["answer"]}


def test_beams_and_evidence(answering):
    result = answering(
        "what is the capital ?", contexts=[[FRANCE, ITALY]], num_beams=3, num_evidence=2, num_passages=None
    )
    (answer,) = result["answers"]
    assert 0 < answer["score"] <= 1
    assert len(answer["evidence"]) == 2
    for span in answer["evidence"]:
        assert span["text"] == [FRANCE, ITALY][span["document"]][span["start"] : span["end"]]
        assert 0 < span["weight"] <= 1 + 1e-5


def test_pipeline_errors(answering):
    for options, message in [
        ({}, "give `contexts`, `context_cache`"),
        ({"contexts": FRANCE, "num_passages": 0}, "`num_passages` must be at least 1"),
        ({"contexts": [FRANCE] * 3}, "2 questions need as many contexts"),
        ({"contexts": [FRANCE]}, "2 questions need as many contexts"),
        ({"contexts": FRANCE, "num_return_sequences": 2, "num_beams": 2}, "one answer a question"),
        ({"contexts": [[], []]}, "no text for any question"),
    ]:
        with pytest.raises(ValueError, match=message):
            answering(["what is ?", "who is ?"], **options)
    cache = answering("who is ?", contexts=FRANCE)["cache"]
    with pytest.raises(ValueError, match="needs the texts"):
        answering("who is ?", context_cache=cache, num_evidence=1)
    always = ContextQuestionAnsweringPipeline(
        model=answering.model, processor=answering.processor, max_new_tokens=2, num_evidence=1
    )
    assert always("who is ?", contexts=FRANCE)["answers"][0]["evidence"]
    with pytest.raises(ValueError, match="needs the texts"):
        always("who is ?", context_cache=cache)


def test_text_generation_pipeline(model, processor):
    cache = model.encode_context(*processor(contexts=[FRANCE], return_tensors="pt").values())
    generator = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    prompt = processor.prompts(["what is the capital ?"])[0]
    text = generator(prompt, context_cache=cache, max_new_tokens=6, do_sample=False, return_full_text=False)
    answer, _ = expected_answer(model, processor, "what is the capital ?", [FRANCE])
    assert text[0]["generated_text"].strip() == answer


REMOTE = """
import json, sys
from transformers import pipeline
pipe = pipeline("context-question-answering", model=sys.argv[1], trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules"), type(pipe).__module__
result = pipe(["what is the capital ?"], contexts=[sys.argv[2]], max_new_tokens=6, num_evidence=1)
result["cache"].save("cache.safetensors")
print(json.dumps(result["answers"]))
"""


def test_pipeline_from_a_model_folder(model, processor, answering, tmp_path):
    """Remote code: the folder alone, in another process and another working directory."""
    folder, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert "context-question-answering" in json.loads((folder / "config.json").read_text())["custom_pipelines"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder), FRANCE],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    expected = answering(["what is the capital ?"], contexts=[FRANCE], num_evidence=1)["answers"]
    assert got[0]["answer"] == expected[0]["answer"]
    assert got[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
    assert got[0]["evidence"][0]["text"] == expected[0]["evidence"][0]["text"]
    assert model.load_context(elsewhere / "cache.safetensors").lengths == [13]


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_attention_weights_over_the_context(model, processor, quantized):
    """Each row's weights sum to one over its own context, and give back what the attention made of the values."""
    encoding = processor(contexts=[FRANCE, ITALY], return_tensors="pt")
    cache = model.encode_context(**encoding).join([[0], [0, 1], []])
    cache = cache if quantized is None else cache.quantize(quantized)
    ids = torch.randint(4, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    projected, attended = model.project_context(cache), []
    hook = model.model.cross_attention_blocks[0].o_proj.register_forward_pre_hook(
        lambda module, args: attended.append(args[0])
    )
    with torch.no_grad():
        outputs = model(ids, context_cache=projected, output_attentions=True)
    hook.remove()
    assert len(outputs.cross_attentions) == 2
    weights = outputs.cross_attentions[0]
    assert weights.shape == (3, 4, 5, max(cache.lengths))
    for row, length in enumerate(cache.lengths):
        torch.testing.assert_close(weights[row].sum(-1), torch.full((4, 5), float(length > 0)))
        assert weights[row, ..., length:].eq(0).all()
        start = projected.rows.offsets[projected.rows.context_index[row]]
        value = projected.values[0][start : start + length].repeat_interleave(2, dim=1)
        expected = torch.einsum("hqk,khd->qhd", weights[row, ..., :length], value).flatten(1)
        torch.testing.assert_close(attended[0][row], expected, atol=1e-5, rtol=1e-4)


def test_context_weights_of_answers(model, processor):
    """The mean of the weights with which the answer's tokens were written; padding changes nothing."""
    encoding = processor(contexts=[FRANCE, ITALY], return_tensors="pt")
    cache = model.encode_context(**encoding)
    inputs = processor(text=["what is ?", "where is the river Tiber ?"], return_tensors="pt")
    sequences = model.generate(**inputs, context_cache=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    length = inputs["input_ids"].shape[1]
    weights = model.context_weights(sequences, cache, length, inputs["attention_mask"])
    assert weights.shape == (2, max(cache.lengths))
    for row in range(2):
        ids = sequences[row][-int(inputs["attention_mask"][row].sum()) - 4 :][None]
        with torch.no_grad():
            layers = model(ids[:, :-1], context_cache=cache.select([row]), output_attentions=True).cross_attentions
        expected = torch.stack([layer[0, :, -4:] for layer in layers]).mean((0, 1, 2))
        torch.testing.assert_close(weights[row, : len(expected)], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="`prompt_length` must be"):
        model.context_weights(sequences, cache, sequences.shape[1])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    num_spans=st.integers(1, 5),
    span_tokens=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_evidence_spans(lengths, num_spans, span_tokens, seed):
    """Spans lie in their document, never overlap, come best first, and start with the best window of all."""
    weights = torch.rand(sum(lengths) + 3, generator=torch.Generator().manual_seed(seed)) + 0.01
    mappings = [[(3 * i, 3 * i + 2) for i in range(length)] for length in lengths]
    texts = ["ab " * length for length in lengths]
    spans = find_evidence(weights, mappings, texts, num_spans=num_spans, span_tokens=span_tokens)
    assert len(spans) <= num_spans
    assert [s.weight for s in spans] == sorted((s.weight for s in spans), reverse=True)
    taken = set()
    for span in spans:
        assert span.text == texts[span.document][span.start : span.end]
        characters = {(span.document, position) for position in range(span.start, span.end)}
        assert not characters & taken
        taken |= characters
    starts = [sum(lengths[:d]) for d in range(len(lengths))]
    windows = [
        float(weights[start + i : start + i + min(span_tokens, length)].sum())
        for start, length in zip(starts, lengths, strict=True)
        for i in range(length - min(span_tokens, length) + 1)
        if length
    ]
    assert bool(spans) == bool(windows)
    if windows:
        assert spans[0].weight == pytest.approx(max(windows), rel=1e-4)


def test_evidence_skips_special_tokens_and_checks_its_input():
    weights = torch.tensor([0.9, 0.05, 0.03, 0.02])
    (span,) = find_evidence(weights, [[(0, 0), (0, 3), (4, 7), (8, 9)]], ["the cat a"], num_spans=1, span_tokens=2)
    assert (span.text, span.start, span.end) == ("the cat", 0, 7)
    with pytest.raises(ValueError, match="4 tokens, `weights` 2"):
        find_evidence(weights[:2], [[(0, 1)] * 4])
    with pytest.raises(ValueError, match="must be positive"):
        find_evidence(weights, [[(0, 1)]], num_spans=0)
