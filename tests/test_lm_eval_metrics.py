"""Metrics of answers: hand-worked cases and independent implementations."""

import importlib
import re
import string
from collections import Counter

import nltk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.translate import meteor_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dataset_builders import NO_ANSWER
from xcllama.evaluation import metrics
from xcllama.evaluation.semantic_metrics import BertScore, meteor, resource_metrics, wordnet_installed

ASCII = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "x1", "a"]), max_size=8).map(" ".join)


def squad_normalize(text: str) -> str:
    """The normalization of the official SQuAD evaluation, written after its definition."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@settings(deadline=None)
@given(ASCII)
def test_normalization_is_that_of_squad_on_ascii(text):
    assert metrics.normalize_answer(text) == squad_normalize(text)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Cat.", ["cat"], 1.0),
        ("cat", ["dog", "Cat!"], 1.0),
        ("a cat sat", ["cat"], 0.0),
        ("", [""], 1.0),
        ("", ["cat"], 0.0),
        ("the", [""], 1.0),
        ("“Café”", ["café"], 1.0),
        # the same letters, composed and decomposed
        ("Cafe\u0301", ["Caf\u00e9"], 1.0),
        ("$5", ["5"], 1.0),
        ("東京", ["東京。"], 1.0),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert metrics.exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # precision 1/2, recall 1/1
        ("black cat", ["cat"], 2 / 3),
        ("black cat", ["dog", "the cat", "black"], 2 / 3),
        # a repeated token counts as often as both sides hold it: precision 2/3, recall 2/2
        ("cat cat cat", ["cat cat"], 0.8),
        ("", [""], 1.0),
        ("", ["cat"], 0.0),
        ("cat", ["the"], 0.0),
        ("Ünïcode wörds", ["wörds"], 2 / 3),
    ],
)
def test_f1(prediction, answers, expected):
    assert metrics.f1(prediction, answers) == pytest.approx(expected)


@settings(deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_and_recall_against_set_free_counting(prediction, answers):
    def one(predicted, gold):
        remaining, shared = list(gold), 0
        for token in predicted:
            if token in remaining:
                remaining.remove(token)
                shared += 1
        if not predicted or not gold:
            return float(predicted == gold), float(not predicted) if not gold else 0.0
        precision, recall = shared / len(predicted), shared / len(gold)
        return (2 * precision * recall / (precision + recall) if shared else 0.0), recall

    pairs = [one(squad_normalize(prediction).split(), squad_normalize(answer).split()) for answer in answers]
    assert metrics.f1(prediction, answers) == pytest.approx(max(f1 for f1, _ in pairs))
    assert metrics.answer_recall(prediction, answers) == pytest.approx(max(recall for _, recall in pairs))


@pytest.mark.parametrize(
    ("prediction", "contexts", "expected"),
    [
        ("a black cat", ["The cat sat.", "It was black!"], 1.0),
        ("white cat", ["The cat sat."], 0.5),
        ("cat cat dog", ["cat"], 2 / 3),
        ("", ["cat"], 0.0),
        ("cat", [], 0.0),
        ("naïve", ["So naïve."], 1.0),
    ],
)
def test_k_precision(prediction, contexts, expected):
    assert metrics.k_precision(prediction, ["unused"], contexts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("UNANSWERABLE", [NO_ANSWER], 1.0),
        ("unanswerable.", [NO_ANSWER], 1.0),
        ("Paris", [NO_ANSWER], 0.0),
        ("Paris", ["London"], 1.0),
        ("Unanswerable", ["London"], 0.0),
        ("", [NO_ANSWER], 0.0),
    ],
)
def test_no_answer_accuracy(prediction, answers, expected):
    assert metrics.no_answer_accuracy(prediction, answers) == expected


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + longest_common_subsequence(first[:-1], second[:-1])
    return max(longest_common_subsequence(first[:-1], second), longest_common_subsequence(first, second[:-1]))


@settings(deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_against_a_recursive_subsequence(prediction, answer):
    predicted, gold = squad_normalize(prediction).split(), squad_normalize(answer).split()
    common = longest_common_subsequence(predicted, gold)
    expected = 2 * common / (len(predicted) + len(gold)) if common else 0.0
    assert metrics.rouge_l(prediction, [answer]) == pytest.approx(expected)


def test_answer_recall_of_hand_worked_cases():
    # the longer answer is there by half, the other one whole; articles do not count
    assert metrics.answer_recall("It was the red boat of Ann", ["a green boat", "the boat"]) == 1.0
    assert metrics.answer_recall("Émile", ["e\u0301mile zola"]) == 0.5
    assert metrics.answer_recall("", ["cat"]) == 0.0
    assert metrics.answer_recall("", ["", "cat"]) == 1.0


def test_rouge_l_takes_the_best_answer_and_reads_unicode():
    assert metrics.rouge_l("вчера в Москве", ["нет", "в Москве вчера"]) == pytest.approx(2 / 3)
    assert metrics.rouge_l("", ["cat"]) == 0.0


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat", "dog", "black", "sat"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_bert_score_against_loops(tiny_encoder):
    score = BertScore(tiny_encoder)
    vocabulary = {"cat": 4, "dog": 5, "black": 6, "sat": 7}
    encoder = BertModel.from_pretrained(tiny_encoder, add_pooling_layer=False).eval()

    @torch.no_grad()
    def vectors(text):
        states = encoder(torch.tensor([[vocabulary[word] for word in text.split()]])).last_hidden_state[0]
        return [state / state.norm() for state in states]

    def loops(prediction, answer):
        predicted, gold = vectors(prediction), vectors(answer)
        precision = sum(max(float(p @ g) for g in gold) for p in predicted) / len(predicted)
        recall = sum(max(float(p @ g) for p in predicted) for g in gold) / len(gold)
        return 2 * precision * recall / (precision + recall)

    assert score("black cat", ["dog sat", "cat sat black"]) == pytest.approx(
        max(loops("black cat", "dog sat"), loops("black cat", "cat sat black")), abs=1e-5
    )
    assert score("black cat", ["black cat"]) == pytest.approx(1.0, abs=1e-5)
    assert score("", ["cat"]) == 0.0
    assert score("", [""]) == 1.0


def test_bert_score_of_a_missing_model_says_which():
    with pytest.raises(ValueError, match="bertscore_model.*nowhere"):
        BertScore("/nowhere/at/all")


def test_resources_can_be_left_out():
    assert "bert_score" not in resource_metrics("none")


@pytest.fixture
def two_word_wordnet(tmp_path, monkeypatch):
    """A WordNet in its own file format that knows one thing: car and auto are the same."""
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    files = dict.fromkeys(["cntlist.rev", "index.sense"], "")
    files |= {f"{part}.exc": "" for part in ("adj", "adv", "noun", "verb")}
    files |= {f"{kind}.{part}": "" for kind in ("index", "data") for part in ("adj", "adv", "noun", "verb")}
    files |= {"lexnames": "00\tnoun.all\t1\n", "data.adj": "  1 WordNet 3.0 Copyright\n"}
    files["data.noun"] = "00000000 00 n 02 car 0 auto 0 000 | a vehicle  \n"
    files["index.noun"] = "auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n"
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", WordNetCorpusReader(str(folder), None))
    # its functions have the reader as a default
    importlib.reload(meteor_score)
    yield
    monkeypatch.undo()
    importlib.reload(meteor_score)


@pytest.mark.filterwarnings("ignore:The multilingual functions")
@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # one chunk of three matches
        ("black cat sat", ["The black cat sat."], 1 - 0.5 / 3**3),
        # the same words in two chunks
        ("sat black cat", ["black cat sat"], 1 - 0.5 * (2 / 3) ** 3),
        # a stem: precision 1, recall 1/2, one chunk of one match
        ("boat", ["red boats"], 0.5 / (0.9 + 0.1 * 0.5) * 0.5),
        # a synonym, which is a match like any other
        ("red car", ["red auto"], 1 - 0.5 / 2**3),
        ("Ünïcode", ["nothing", "ünïcode!"], 0.5),
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("cat", [""], 0.0),
    ],
)
def test_meteor(two_word_wordnet, prediction, answers, expected):
    assert wordnet_installed()
    assert meteor(prediction, answers) == pytest.approx(expected)


def test_meteor_is_left_out_without_its_data(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    assert "meteor" not in resource_metrics.__wrapped__("none")


def test_shared_tokens_counts_multiplicity():
    assert metrics.shared_tokens(["x", "x", "y"], ["x", "z", "x", "x"]) == 2
    assert metrics.shared_tokens(Counter(), []) == 0
