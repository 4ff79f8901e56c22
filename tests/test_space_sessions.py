"""The Space without a browser: visitors kept apart and bounded, passages, answers, what is shown."""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_xcllama import ContextQuestionAnsweringPipeline, XCLlamaProcessor, passages

gradio_client = pytest.importorskip("gradio_client", reason="the extra `space` is not installed")
SPACE = Path(__file__).resolve().parent.parent / "space"
sys.path.insert(0, str(SPACE))
import figures  # noqa: E402
import reader as reader_module  # noqa: E402
from documents import DocumentError  # noqa: E402
from handlers import DECLINED, Handlers  # noqa: E402
from page import build, launch_options  # noqa: E402
from reader import Answer, Reader  # noqa: E402
from visitors import Document, Visitors, unique_name  # noqa: E402

WORDS = [f"w{number}" for number in range(60)]
TEXT = ". ".join(" ".join(WORDS[start : start + 6]) for start in range(0, 60, 6)) + "."


@pytest.fixture
def processor() -> XCLlamaProcessor:
    """A tokenizer of words, with offsets."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS, ".", "Question", "Answer", ":"]
    model = tokenizers.models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return XCLlamaProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


@pytest.fixture
def reader(tiny_model, processor, monkeypatch) -> Reader:
    """A tiny random model that reads passages of 16 tokens, encodes 30 in a turn, and writes answers of 5."""
    monkeypatch.setattr(reader_module, "TURN_TOKENS", 30)
    monkeypatch.setattr(passages.split_passages, "__defaults__", ((4, 14, 16),))
    tiny_model.generation_config.eos_token_id = None
    return Reader(tiny_model, processor, max_new_tokens=5, max_prompt_tokens=100, max_document_tokens=120)


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=0.0)


def fake_document(name: str, nbytes: int) -> Document:
    empty = SimpleNamespace(nbytes=0)
    text_bytes = sys.getsizeof("")
    return Document(name, "", SimpleNamespace(nbytes=nbytes - text_bytes, token_ids=empty), (), 0.0)


def visit(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


def last(states):
    *_, state = states
    return state


def test_visitors_see_their_own_documents_only():
    visitors = Visitors()
    visitors.add("a", fake_document("paper", 100))
    visitors.add("b", fake_document("paper", 200))
    assert visitors.documents("a", ["paper"])[0].nbytes == 100
    assert visitors.documents("b", ["paper"])[0].nbytes == 200
    visitors.forget("b")
    assert visitors.documents("a", ["paper"])
    with pytest.raises(DocumentError, match="no longer here"):
        visitors.documents("b", ["paper"])


def test_visitors_are_forgotten_after_their_time(clock):
    visitors = Visitors(idle_seconds=10, clock=lambda: clock.now)
    visitors.add("a", fake_document("paper", 100))
    clock.now = 8
    visitors.add("b", fake_document("paper", 100))
    clock.now = 12
    visitors.sweep()
    assert len(visitors) == 1
    assert visitors.nbytes == 100
    # whoever comes back in time stays
    clock.now = 17
    visitors.get("b")
    clock.now = 26
    assert visitors.documents("b", ["paper"])


def test_room_of_a_visitor():
    visitors = Visitors(visitor_bytes=1000, max_documents=3)
    visitors.add("a", fake_document("one", 600))
    with pytest.raises(DocumentError, match="needs about"):
        visitors.add("a", fake_document("two", 500))
    visitors.remove("a", ["one"])
    for name in ("one", "two", "three"):
        visitors.add("a", fake_document(name, 100))
    with pytest.raises(DocumentError, match="You have 3 documents"):
        visitors.add("a", fake_document("four", 100))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(60, 400), st.integers(0, 30)), max_size=40))
def test_bytes_are_bounded_whatever_happens(events):
    clock = SimpleNamespace(now=0.0)
    visitors = Visitors(visitor_bytes=500, total_bytes=900, max_documents=4, idle_seconds=50, clock=lambda: clock.now)
    for number, (key, size, wait) in enumerate(events):
        clock.now += wait
        try:
            visitors.add(key, fake_document(str(number), size))
        except DocumentError:
            assert visitors.get(key).documents
        else:
            assert visitors.documents(key, [str(number)])
        assert visitors.nbytes <= 900
        assert all(visitors.get(name).nbytes <= 500 for name in "abcdef")


def test_names_are_unique_and_printable():
    assert unique_name("a", ["a", "a (2)"]) == "a (3)"
    assert unique_name("x\ny" + "z" * 100, []) == "x y" + "z" * 57
    assert unique_name("\0", []) == "document"


def test_passages_cover_the_text_and_progress_is_told(reader):
    shares = []
    document = reader.encode("paper", TEXT, lambda share, seconds: shares.append((share, seconds)))
    assert shares[0] == (0, None)
    assert shares[-1] == (1, 0)
    assert sorted(shares, key=lambda one: one[0]) == shares
    assert all(seconds > 0 for _, seconds in shares[1:-1])
    assert len(shares) > 3
    assert document.cache.num_tokens == 70
    assert len(document.passages) == len(document.cache) > 4
    read = [TEXT[start:stop] for start, stop in document.passages]
    assert " ".join(read) == TEXT
    assert all(text.endswith(".") for text in read)
    # the next document knows from the beginning how long it takes
    reader.encode("again", TEXT, lambda share, seconds: shares.append((share, seconds)))
    assert all(seconds is not None for _, seconds in shares[-3:])


def test_the_answer_is_the_pipelines(reader, tiny_model, processor):
    documents = [reader.encode("one", "w1 w2 w3"), reader.encode("two", TEXT)]
    states = list(reader.answer_from_cache("w5 w6", documents))
    texts = ["w1 w2 w3", *(TEXT[start:stop] for start, stop in documents[1].passages)]
    answering = ContextQuestionAnsweringPipeline(model=tiny_model, processor=processor)
    (expected,) = answering("w5 w6", contexts=[texts], max_new_tokens=5)["answers"]
    state = states[-1]
    assert expected["answer"].startswith(state.text.rstrip(" …"))
    assert (state.found, state.score) == (True, pytest.approx(expected["score"], abs=1e-5))
    assert state.complete
    assert not any(other.complete or other.text for other in states[:-1])
    assert 0 < states[0].first_token_seconds <= state.seconds
    # places are those of the documents
    first, *others = state.reads
    assert first.score == state.score == max(read.score for read in state.reads)
    assert first.document.text[slice(*state.sentence)] == expected["sentence"]
    assert first.start <= state.sentence[0] < state.sentence[1] <= first.end
    assert len(others) == 3


def test_what_is_not_sure_enough_is_declined_with_what_was_read(reader, tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.config, "answer_threshold", 1.0)
    handlers = Handlers(reader, Visitors())
    handlers.add_text("one", TEXT, [], visit("a"), lambda *values: None)
    answer, shown_figures, _, places, said, seconds = last(handlers.ask("w5", ["one"], visit("a")))
    assert answer == DECLINED
    assert "score" in shown_figures
    assert "What was read" in places
    assert "<mark" not in places
    assert "Not found" in said
    assert seconds > 0


def test_documents_in_any_order_without_encoding_again(reader, monkeypatch):
    documents = [reader.encode(name, text) for name, text in (("one", "w1 w2"), ("two", TEXT), ("three", "w40 w41"))]
    monkeypatch.setattr(reader.model, "encode_context", lambda **inputs: pytest.fail("encoded again"))
    answers = {
        order: last(reader.answer_from_cache("w41 w5", [documents[index] for index in order])).text
        for order in ((0, 1, 2), (2, 0, 1), (1,), (2, 1, 0))
    }
    assert answers[0, 1, 2] == answers[2, 0, 1] == answers[2, 1, 0]


@pytest.mark.parametrize(
    ("text", "whole"),
    [("w1 w2", "w1 w2"), ("w1 . w2 w3 w4", "w1 ."), ("w1 w2 w3 w4 w5", "w1 w2 w3 w4 …")],
)
def test_an_answer_that_ran_out_of_tokens_ends_with_a_sentence_or_a_word(reader, text, whole):
    assert reader._whole(text) == whole


def test_prompt_answer_and_its_limit(reader, tiny_model, processor):
    documents = [reader.encode("one", "w1 w2 w3")]
    state = last(reader.answer_from_prompt("w5", documents))
    prompt = processor.prompts(["w1 w2 w3\n\nw5"])
    ids = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = tiny_model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert processor.decode(expected, skip_special_tokens=True).startswith(state.text.rstrip(" …"))
    with pytest.raises(DocumentError, match="at most in a prompt"):
        reader.answer_from_prompt("w5", [reader.encode("long", TEXT)] * 2)


@pytest.mark.parametrize(("question", "says"), [(" \n", "type a question"), ("w1 " * 600, "Shorten it")])
def test_odd_questions(reader, question, says):
    for ask in (reader.answer_from_cache, reader.answer_from_prompt):
        with pytest.raises(DocumentError, match=says):
            ask(question, [])
    with pytest.raises(DocumentError, match="No document is switched on"):
        reader.answer_from_cache("w5", [])


def test_too_long_documents_are_refused_before_they_are_read(reader, monkeypatch):
    with pytest.raises(DocumentError, match="is too long"):
        reader.count_tokens(TEXT * 2, "paper")
    monkeypatch.setattr(reader, "_length", lambda text: pytest.fail("tokenized"))
    with pytest.raises(DocumentError, match="is too long"):
        reader.count_tokens("a" * 10_000, "paper")


def test_who_leaves_stops_the_work(reader):
    reader.max_new_tokens = 150
    document = reader.encode("one", "w1 w2 w3")
    states = reader.answer_from_cache("w5", [document])
    first = next(states)
    assert not first.complete
    states.close()
    # the next one in line does not wait for 150 tokens
    reader.max_new_tokens = 3
    assert last(reader.answer_from_cache("w5", [document])).complete


def test_an_error_of_the_model_reaches_the_visitor(reader, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of memory")

    document = reader.encode("one", "w1 w2 w3")
    with monkeypatch.context() as patch:
        patch.setattr(reader.model, "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            last(reader.answer_from_cache("w5", [document]))
    assert last(reader.answer_from_cache("w5", [document])).complete


def test_actions_of_two_visitors(reader, tmp_path):
    handlers = Handlers(reader, Visitors())
    progress = lambda share, description: None  # noqa: E731
    (tmp_path / "good.txt").write_text("w1 w2 w3")
    (tmp_path / "bad.txt").write_bytes(b"\x89PNG")
    files = [str(tmp_path / "good.txt"), str(tmp_path / "bad.txt")]
    status, chosen, _, costs = handlers.add_files(files, [], visit("a"), progress)
    assert "3 tokens encoded" in status
    assert "“bad.txt” is an image" in status
    assert chosen.value == ["good.txt"]
    assert "good.txt" in costs
    # uploads do not stay on the disk
    assert not any(tmp_path.iterdir())
    _, other, *_ = handlers.add_text("", "w9", [], visit("b"), progress)
    assert other.choices == [("pasted text", "pasted text")]
    assert "no longer here" in handlers.toggle(["good.txt"], visit("b"))
    assert "no longer here" in last(handlers.ask("w5", ["good.txt"], visit("b")))[1]

    answer, shown_figures, headline, places, said, seconds = last(handlers.ask("w5", ["good.txt"], visit("a")))
    assert answer
    assert answer in said
    assert "tokens/s" in shown_figures
    assert "× smaller" in headline
    assert "first token" not in headline
    assert "<mark>w1 w2 w3</mark>" in places
    prompt, _, headline, times, _ = last(handlers.ask_prompt("w5", ["good.txt"], True, seconds, visit("a")))
    assert prompt
    assert "first token" in headline
    assert "text in the prompt" in times
    # not asked, or the cache has said already what is wrong: nothing is shown, and nothing said twice
    assert last(handlers.ask_prompt("w5", ["good.txt"], False, seconds, visit("a")))[0] == ""
    *_, seconds = last(handlers.ask(" ", ["good.txt"], visit("a")))
    assert seconds is None
    assert last(handlers.ask_prompt(" ", ["good.txt"], True, seconds, visit("a")))[:2] == ("", "")
    # an example is encoded once
    for _ in range(2):
        _, chosen, *_ = handlers.add_example("example", "w7 w8", ["good.txt"], visit("a"), progress)
        assert chosen.value == ["good.txt", "example"]
    _, gone, *_ = handlers.remove(["good.txt", "example"], visit("a"))
    assert gone.choices == []
    handlers.leave(visit("b"))
    assert "pasted text" not in handlers.visitors.get("b").documents


def test_who_closes_the_page_is_forgotten(reader):
    visitors = Visitors()
    page = build(Handlers(reader, visitors))
    page.launch(**launch_options(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True))
    try:
        clients = [gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False) for _ in range(2)]
        for client in clients:
            client.predict("paper", "w1 w2 w3", [], api_name="/add_text")
        assert len(visitors) == 2
        clients[0].close()
        for _ in range(1200):
            if len(visitors) == 1:
                break
            time.sleep(0.1)
        assert len(visitors) == 1
        clients[1].close()
    finally:
        page.close()


def test_one_document_at_a_time_per_model(reader):
    """Passages of two documents that are encoded at once take turns on one thread."""
    seen, encode = [], reader.model.encode_context

    def spy(**inputs):
        seen.append(threading.current_thread().name)
        return encode(**inputs)

    reader.model.encode_context = spy
    threads = [threading.Thread(target=reader.encode, args=(name, TEXT)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) >= 6
    assert len(set(seen)) == 1


def test_shown_text_is_escaped(reader):
    name = "<img src=x onerror=alert(1)>"
    document = reader.encode(name, "w1 <script>w2</script> & w3 w4")
    answer = last(reader.answer_from_cache("w3", [document]))
    shown = [
        figures.places(answer),
        figures.places(replace(answer, found=False)),
        figures.costs([document], reader.bytes_per_token),
        figures.message(name, "error"),
        figures.bars(name, [(name, 1.0, name)]),
    ]
    for html in shown:
        assert "<img" not in html
        assert "<script" not in html
    assert "&lt;script&gt;" in shown[0]


def test_figures_for_people():
    assert [figures.number_bytes(count) for count in (0, 1023, 1536, 5 * 2**20, 10**12)] == [
        "0 bytes",
        "1,023 bytes",
        "1.5 KiB",
        "5.0 MiB",
        "953,674 MiB",
    ]
    assert "tokens/s" not in figures.answer_figures(Answer("a", 1, 0.5, 0.5))
    assert "2.0 tokens/s" in figures.answer_figures(Answer("a", 3, 0.5, 1.5))
    sizes = {"KV cache of the decoder": 200.0, "context cache": 10.0}
    assert "20 × smaller" in figures.headline(sizes, 0.5, None)
    assert "3.0 × sooner" in figures.headline(sizes, 0.5, 1.5)
    assert "2.0 × later" in figures.headline(sizes, 0.5, 0.25)
    assert figures.times_chart({"context cache": 0.5}) == ""


def test_kv_cache_beside_the_cache(reader, tiny_model):
    config = tiny_model.config
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert reader.bytes_per_token["KV cache of the decoder"] == keys_and_values
    assert reader.bytes_per_token["context cache"] == config.hidden_size * 4
    assert reader.bytes_per_token["context cache, int4"] < reader.bytes_per_token["context cache, int8"]


def test_a_slow_page_gets_the_newest_state(reader):
    states = reader.answer_from_cache("w5", [reader.encode("one", "w1 w2 w3")])
    first = next(states)
    # the model writes on while the page is busy
    reader._worker.submit(lambda: None).result()
    rest = list(states)
    assert len(rest) <= 1
    newest = [first, *rest][-1]
    assert newest.complete
    assert newest.num_tokens == 5 >= first.num_tokens
