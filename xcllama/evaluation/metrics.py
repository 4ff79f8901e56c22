"""Metrics of one generated answer: `metric(prediction, answers, contexts) -> float`, the best over accepted answers.

Sources: exact match and F1 as in the SQuAD evaluation; answer recall and k-precision as in Adlakha et al., "Evaluating
Correctness and Faithfulness of Instruction-Following Models for Question Answering", TACL 2024; ROUGE-L of Lin, 2004.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from dataset_builders import NO_ANSWER

ARTICLES = ("a", "an", "the")
# punctuation of ASCII that Unicode files under symbols
SYMBOLS = frozenset("$+<=>^`|~")


def normalize_answer(text: str) -> str:
    """Lower case, composed Unicode, without punctuation, articles and repeated spaces.

    On ASCII text this is the normalization of SQuAD.
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(char for char in text if char not in SYMBOLS and not unicodedata.category(char).startswith("P"))
    return " ".join(word for word in text.split() if word not in ARTICLES)


def answer_tokens(text: str) -> list[str]:
    """Words of a normalized answer."""
    return normalize_answer(text).split()


def shared_tokens(first: Sequence[str], second: Sequence[str]) -> int:
    """Tokens in both, counted as often as both hold them."""
    return sum((Counter(first) & Counter(second)).values())


def exact_match(prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
    """1 if the normalized prediction is one of the normalized answers."""
    return float(normalize_answer(prediction) in map(normalize_answer, answers))


def f1(prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
    """Harmonic mean of token precision and recall; 1 where both sides are empty."""
    predicted = answer_tokens(prediction)
    return max(_f1(predicted, answer_tokens(answer)) for answer in answers)


def _f1(predicted: list[str], answer: list[str]) -> float:
    if not predicted or not answer:
        return float(predicted == answer)
    return 2 * shared_tokens(predicted, answer) / (len(predicted) + len(answer))


def answer_recall(prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
    """Share of the answer's tokens that the prediction holds; of an empty answer, 1 if the prediction is empty."""
    predicted = answer_tokens(prediction)
    scores = []
    for answer in map(answer_tokens, answers):
        scores.append(shared_tokens(predicted, answer) / len(answer) if answer else float(not predicted))
    return max(scores)


def k_precision(prediction: str, answers: Sequence[str], contexts: Sequence[str]) -> float:
    """Share of the prediction's tokens that stand in the contexts (faithfulness); 0 for an empty prediction."""
    predicted = answer_tokens(prediction)
    if not predicted:
        return 0.0
    known = set(answer_tokens("\n".join(contexts)))
    return sum(token in known for token in predicted) / len(predicted)


def no_answer_accuracy(prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
    """1 if the prediction says that there is no answer exactly where there is none."""
    return float((normalize_answer(prediction) == normalize_answer(NO_ANSWER)) == (NO_ANSWER in answers))


def rouge_l(prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
    """F-measure of the longest common subsequence of tokens (package rouge-score, without stemming)."""
    return max(score["rougeL"].fmeasure for score in (_rouge_scorer().score(answer, prediction) for answer in answers))


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        """The project's own words: rouge-score's default tokenizer drops every letter outside of ASCII."""

        def tokenize(self, text: str) -> list[str]:
            return answer_tokens(text)

    return RougeScorer(["rougeL"], tokenizer=Words())


Metric = Callable[[str, Sequence[str], Sequence[str]], float]

ANSWER_METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "f1": f1,
    "answer_recall": answer_recall,
    "rouge_l": rouge_l,
    "k_precision": k_precision,
}
