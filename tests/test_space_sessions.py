"""The Space without a browser: visitors kept apart and bounded, sections, answers, what is shown."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_xcllama import XCLlamaProcessor

gradio_client = pytest.importorskip("gradio_client", reason="the extra `space` is not installed")
SPACE = Path(__file__).resolve().parent.parent / "space"
sys.path.insert(0, str(SPACE))
import figures  # noqa: E402
import reader as reader_module  # noqa: E402
from documents import DocumentError  # noqa: E402
from handlers import Handlers  # noqa: E402
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
    """A tiny random model that reads sections of 16 tokens and writes answers of 5."""
    monkeypatch.setattr(reader_module, "SECTION_TOKENS", 16)
    tiny_model.generation_config.eos_token_id = None
    return Reader(tiny_model, processor, max_new_tokens=5, max_prompt_tokens=100, max_document_tokens=120)


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=0.0)


def fake_document(name: str, nbytes: int) -> Document:
    empty = SimpleNamespace(nbytes=0)
    text_bytes = sys.getsizeof("")
    return Document(name, "", SimpleNamespace(nbytes=nbytes - text_bytes, token_ids=empty), empty, (0,), 0.0)


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


def test_sections_cover_the_text_and_end_with_sentences(reader):
    sections = reader.sections(TEXT)
    assert len(sections) > 3
    assert "".join(TEXT[first:last] for first, last in sections) == TEXT
    assert all(TEXT[:last].endswith((". ", ".")) for _, last in sections)


def test_spans_point_into_the_text(reader):
    shares = []
    document = reader.encode("paper", TEXT, shares.append)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert sorted(shares) == shares
    assert document.cache.num_tokens == len(document.spans) == 70
    tokens = [TEXT[first:last] for first, last in document.spans.tolist()]
    assert [token for token in tokens if token != "."] == WORDS
    assert len(document.section_starts) == len(document.cache) > 1


def test_answer_equals_generate(reader, tiny_model, processor):
    documents = [reader.encode("one", "w1 w2 w3"), reader.encode("two", "w7 w8 w9 w10")]
    states = list(reader.answer_from_cache("w5 w6", documents))
    cache = tiny_model.encode_context(**processor(contexts=["w1 w2 w3", "w7 w8 w9 w10"], return_tensors="pt"))
    inputs = processor(text=["w5 w6"], return_tensors="pt")
    ids = tiny_model.generate(**inputs, context_cache=cache.join([[0, 1]]), max_new_tokens=5, do_sample=False)
    assert states[-1].text == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    counts = [state.num_tokens for state in states]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert states[-1].complete
    assert not any(state.complete for state in states[:-1])
    weights = states[-1].weights
    assert weights.shape == (7,)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    # attention sinks are left out
    assert weights[0] == weights[3] == 0
    assert 0 < states[0].first_token_seconds <= states[-1].seconds


def test_documents_in_any_order_without_encoding_again(reader, monkeypatch):
    documents = [reader.encode(name, text) for name, text in (("one", "w1 w2"), ("two", TEXT), ("three", "w40 w41"))]
    monkeypatch.setattr(reader.model, "encode_context", lambda **inputs: pytest.fail("encoded again"))
    answers = {
        order: last(reader.answer_from_cache("w5", [documents[index] for index in order])).text
        for order in ((0, 1, 2), (2, 0, 1), (1,), (2, 1, 0))
    }
    assert answers[0, 1, 2] == answers[2, 0, 1] == answers[2, 1, 0]
    assert last(reader.answer_from_cache("w5", [])).weights is None


def test_prompt_answer_and_its_limit(reader, tiny_model, processor):
    documents = [reader.encode("one", "w1 w2 w3")]
    state = last(reader.answer_from_prompt("w5", documents))
    prompt = processor.prompts(["w1 w2 w3\n\nw5"])
    ids = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = tiny_model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert state.text == processor.decode(expected, skip_special_tokens=True)
    with pytest.raises(DocumentError, match="at most in a prompt"):
        reader.answer_from_prompt("w5", [reader.encode("long", TEXT)] * 2)


@pytest.mark.parametrize(("question", "says"), [(" \n", "type a question"), ("w1 " * 600, "Shorten it")])
def test_odd_questions(reader, question, says):
    for ask in (reader.answer_from_cache, reader.answer_from_prompt):
        with pytest.raises(DocumentError, match=says):
            ask(question, [])


def test_too_long_documents_are_refused_before_they_are_read(reader, monkeypatch):
    with pytest.raises(DocumentError, match="is too long"):
        reader.count_tokens(TEXT * 2, "paper")
    monkeypatch.setattr(reader, "_spans", lambda text: pytest.fail("tokenized"))
    with pytest.raises(DocumentError, match="is too long"):
        reader.count_tokens("a" * 10_000, "paper")


def test_who_leaves_stops_the_work(reader):
    reader.max_new_tokens = 150
    states = reader.answer_from_cache("w5", [reader.encode("one", "w1 w2 w3")])
    first = next(states)
    assert not first.complete
    states.close()
    # the next one in line does not wait for 150 tokens
    reader.max_new_tokens = 3
    assert last(reader.answer_from_cache("w5", [])).complete


def test_an_error_of_the_model_reaches_the_visitor(reader, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reader.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        last(reader.answer_from_cache("w5", []))
    monkeypatch.undo()
    assert last(reader.answer_from_cache("w5", [])).complete


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

    answer, shown_figures, attended, times, said = last(handlers.ask("w5", ["good.txt"], visit("a")))
    assert answer
    assert answer in said
    assert "tokens/s" in shown_figures
    assert "Passages attended to most" in attended
    assert "context cache" in times
    assert "text in the prompt" in last(handlers.ask_prompt("w5", ["good.txt"], True, visit("a")))[2]
    assert last(handlers.ask_prompt("w5", ["good.txt"], False, visit("a")))[0] == ""
    _, gone, *_ = handlers.remove(["good.txt"], visit("a"))
    assert gone.choices == []
    handlers.leave(visit("b"))
    assert "pasted text" not in handlers.visitors.get("b").documents


def test_attention_over_very_much_text_is_not_looked_at(reader, monkeypatch):
    """It would take gigabytes: the answer comes without."""
    monkeypatch.setattr(reader_module, "MAX_ATTENTION_PAIRS", 10)
    handlers = Handlers(reader, Visitors())
    handlers.add_text("one", "w1 w2 w3", [], visit("a"), lambda *values: None)
    answer, _, attended, *_ = last(handlers.ask("w5", ["one"], visit("a")))
    assert answer
    assert "Too much text" in attended


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
        for _ in range(200):
            if len(visitors) == 1:
                break
            time.sleep(0.1)
        assert len(visitors) == 1
        clients[1].close()
    finally:
        page.close()


def test_one_document_at_a_time_per_model(reader):
    """Sections of two documents that are encoded at once take turns on one thread."""
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
    assert len(seen) >= 8
    assert len(set(seen)) == 1


def test_shown_text_is_escaped(reader):
    name = "<img src=x onerror=alert(1)>"
    document = reader.encode(name, "w1 <script>w2</script> & w3 w4")
    weights = torch.full((document.cache.num_tokens,), 1 / document.cache.num_tokens)
    shown = [
        figures.highlighted([document], weights, reader.evidence(weights, [document])),
        figures.costs([document], reader.bytes_per_token),
        figures.message(name, "error"),
        figures.bars(name, [(name, 1.0, name)]),
    ]
    for html in shown:
        assert "<img" not in html
        assert "<script" not in html
    assert "&lt;script&gt;" in shown[0]


@pytest.mark.parametrize(
    ("start", "end", "quoted"),
    [(0, 1, "in"), (7, 9, "1926"), (7, 11, "1926 by"), (9, 14, "by Ilse"), (18, 25, "Brandt"), (3, 9, "1926")],
)
def test_passages_are_quoted_in_whole_words(start, end, quoted):
    assert figures._quoted("in   1926 by Ilse Brandt.", start, end) == quoted


def test_shades_follow_the_weights():
    spans = torch.tensor([[0, 3], [3, 5], [5, 6], [6, 11]])
    # "one" in two tokens with the space of the next word, as byte-level tokenizers cut
    shades = figures.word_shades("onetw three", spans, torch.tensor([0.5, 0.5, 0.9, 0.25]))
    assert shades == [(0, 5, 4), (6, 11, 1)]
    assert figures.word_shades("one two", torch.tensor([[0, 3], [3, 7]]), torch.tensor([0.0, 0.05])) == []


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
