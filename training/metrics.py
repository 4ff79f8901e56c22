"""Exact match and token F1 as the SQuAD evaluation defines them, the best over the accepted answers."""

import re
import string
from collections import Counter


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: list[str]) -> float:
    """1.0 when `prediction` equals one of `answers` after normalization."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def token_f1(prediction: str, answers: list[str]) -> float:
    """Highest F1 of the tokens of `prediction` over `answers`."""
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold))
