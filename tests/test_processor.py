import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_xcllama import XCLlamaProcessor

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(words: str, template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = template
    return fast


@pytest.fixture
def processor() -> XCLlamaProcessor:
    return XCLlamaProcessor(word_tokenizer("a b c Question: Answer:"), context_max_length=4)


def test_questions_are_padded_left_and_contexts_right(processor):
    inputs = processor(text=["a", "a b c"], contexts=["c b a", "c"], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[0, 0, 5, 2, 6], [5, 2, 3, 4, 6]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert inputs["context_input_ids"].tolist() == [[4, 3, 2], [4, 0, 0]]
    assert inputs["context_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_chat_template_and_history():
    processor = XCLlamaProcessor(word_tokenizer("a", TEMPLATE))
    (prompt,) = processor.prompts(["q2"], history=[[("q1", "a1")]], system="s")
    assert prompt == "<system>s</><user>q1</><assistant>a1</><user>q2</><assistant>"
    assert processor.prompts(["q"], add_generation_prompt=False) == ["<user>q</>"]
    plain = XCLlamaProcessor(word_tokenizer("a"))
    assert plain.prompts(["q2"], [[("q1", "a1")]]) == ["Question: q1\nAnswer: a1\n\nQuestion: q2\nAnswer:"]


def test_question_in_context(processor):
    inputs = processor(text=["a"], contexts=["b c"], question_in_context=True)
    assert inputs["context_input_ids"] == [[2, 3, 4]]
    with pytest.raises(ValueError, match="one question in `text` for each context"):
        processor(contexts=["b"], question_in_context=True)


def test_long_contexts_are_cut_only_on_request(processor):
    with pytest.raises(ValueError, match="5 tokens, `context_max_length` is 4"):
        processor(contexts=["a b c a b"])
    assert processor(contexts=["a b c a b"], truncation=True)["context_input_ids"] == [[2, 3, 4, 2]]


def test_character_spans(processor):
    inputs = processor(contexts=["a  bb c"], return_offsets_mapping=True)
    assert inputs["context_offset_mapping"] == [[(0, 1), (3, 5), (6, 7)]]


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = XCLlamaProcessor.from_pretrained(tmp_path)
    assert loaded.context_max_length == 4
    assert loaded.context_tokenizer is loaded.tokenizer
    assert not (tmp_path / "context_tokenizer").exists()


def test_an_encoder_brings_its_own_tokenizer(tmp_path):
    XCLlamaProcessor(word_tokenizer("a b"), word_tokenizer("x y a")).save_pretrained(tmp_path)
    inputs = XCLlamaProcessor.from_pretrained(tmp_path)(text="a", contexts="a")
    assert inputs["context_input_ids"] == [[4]]
    assert (tmp_path / "context_tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give `text`"),
        ({"contexts": []}, "non-empty list"),
        ({"text": [1]}, "non-empty list of strings"),
        ({"text": ["a", "b"], "history": [[]]}, r"one entry a question \(2\), got 1"),
    ],
)
def test_bad_calls(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_another_template_version_is_refused():
    with pytest.raises(ValueError, match="template version '0', the code has"):
        XCLlamaProcessor(word_tokenizer("a"), template_version="0")
