"""A processor has one chat template, its own, before saving and after; what depends on it sees a change."""

import pytest
from store_support import TableModel
from test_processor import TEMPLATE, word_tokenizer

from modeling_xcllama import XCLlamaProcessor
from xcllama.store import ContextStore
from xcllama.training.prompts import Prompts

OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
WORDS = "a b < > [ ]"


@pytest.mark.parametrize("own", [None, TEMPLATE, {"default": TEMPLATE, "tool_use": "t"}], ids=["none", "one", "named"])
@pytest.mark.parametrize("given", [None, OTHER, ""], ids=["none", "other", "empty"])
def test_prompts_are_the_same_after_saving(tmp_path, own, given):
    processor = XCLlamaProcessor(word_tokenizer(WORDS, own), chat_template=given)
    prompt = processor.prompts(["a"])
    first = TEMPLATE if given is None and own else given
    assert prompt == [{TEMPLATE: "<user>a</><assistant>", OTHER: "[a]"}.get(first, "Question: a\nAnswer:")]
    for turn in range(2):
        processor.save_pretrained(tmp_path / str(turn))
        loaded = XCLlamaProcessor.from_pretrained(tmp_path / str(turn))
        assert loaded.chat_template == processor.chat_template
        assert loaded.template_version == processor.template_version
        assert loaded.prompts(["a"]) == prompt
        assert loaded(text="a")["input_ids"] == processor(text="a")["input_ids"]
        assert loaded.context_prefix() == processor.context_prefix()
        processor = loaded


def test_the_tokenizer_is_left_alone():
    tokenizer = word_tokenizer(WORDS, TEMPLATE)
    first, second = XCLlamaProcessor(tokenizer), XCLlamaProcessor(tokenizer, chat_template=OTHER)
    assert tokenizer.chat_template == TEMPLATE
    assert (first.prompts(["a"]), second.prompts(["a"])) == (["<user>a</><assistant>"], ["[a]"])
    # one that is changed later is the tokenizer's, not the processor's, before saving and after
    tokenizer.chat_template = OTHER
    assert first.prompts(["a"]) == ["<user>a</><assistant>"]
    messages = [{"role": "user", "content": "a"}]
    assert first.apply_chat_template(messages, add_generation_prompt=True) == "<user>a</><assistant>"


def test_a_changed_template_saves_too(tmp_path):
    processor = XCLlamaProcessor(word_tokenizer(WORDS, TEMPLATE))
    before = processor.template_version
    processor.chat_template = OTHER
    assert processor.prompts(["a"]) == ["[a]"]
    assert processor.template_version != before
    processor.save_pretrained(tmp_path)
    assert XCLlamaProcessor.from_pretrained(tmp_path).prompts(["a"]) == ["[a]"]
    # edited in the folder
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert XCLlamaProcessor.from_pretrained(tmp_path).template_version == before


def test_several_templates_need_a_default():
    with pytest.raises(ValueError, match="name one `chat_template`: none of rag, tool_use is the default"):
        XCLlamaProcessor(word_tokenizer(WORDS, {"rag": "r", "tool_use": "t"}))


def test_stores_compare_it(tmp_path):
    first = XCLlamaProcessor(word_tokenizer(WORDS, TEMPLATE))
    other = XCLlamaProcessor(word_tokenizer(WORDS, TEMPLATE), chat_template=OTHER)
    with ContextStore(tmp_path, TableModel(), first, passage_tokens=None) as store:
        store.add(["d"], ["a b"])
    with pytest.raises(ValueError, match=f"template version '{first.template_version}'.*'{other.template_version}'"):
        ContextStore(tmp_path, TableModel(), other)
    with ContextStore(tmp_path, TableModel(), first, passage_tokens=None) as store:
        # as stores were made before chat templates counted
        store.catalogue.set_meta("template_version", first.template_version.partition("-")[0])
    ContextStore(tmp_path, TableModel(), other).close()


def test_training_reads_it():
    processor = XCLlamaProcessor(word_tokenizer(WORDS, TEMPLATE), chat_template=OTHER)
    ids, where = Prompts(processor).prompt_ids("a")
    assert ids == processor(text="a")["input_ids"][0]
    bare = XCLlamaProcessor(word_tokenizer("Question: Answer: a", TEMPLATE), chat_template="")
    assert Prompts(bare).prompt_ids("a")[0] == bare(text="a")["input_ids"][0]


def test_prefixes_belong_to_a_template():
    processor = XCLlamaProcessor(word_tokenizer("<user> a", "<user> {{ messages[0]['content'] }}"))
    assert processor.context_prefix() == [2]
    processor.check_prefix(None)
    processor.check_prefix([2])
    with pytest.raises(ValueError, match=r"behind the prefix \[2, 3\].*start with \[2\]"):
        processor.check_prefix([2, 3])
