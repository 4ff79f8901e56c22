"""Where texts are cut, which passages fit a question, and the sentence of an answer."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_xcllama.passages import find_sentence, rank_passages, split_passages

MUSEUM = "The museum was founded in 1926 by Ilse Brandt. Dr. Brandt had repaired clocks. It is closed in January."
BREAD = "Mountain bread is baked twice a year. A loaf weighs two kilograms."


def count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["word", "an end. ", "\n", "\n\n", "\n\n# Heading\n", " ", "x" * 30, "数据。", "Who? ", "- item\n"]
        ),
        max_size=80,
    )
)
def test_passages_hold_the_whole_text_and_are_no_longer_than_allowed(parts):
    text = "".join(parts)
    sizes = (5, 12, 15)
    spans = split_passages(text, len, sizes) if len(text) < 16 else split_passages(text, count_words, sizes)
    covered = [False] * len(text)
    for start, stop in spans:
        assert count_words(text[start:stop]) <= sizes[2] or stop - start == 1
        covered[start:stop] = [True] * (stop - start)
    assert not text.strip() or not "".join(c for c, seen in zip(text, covered, strict=True) if not seen).strip()
    assert [span[1] for span in spans] == sorted(span[1] for span in spans)


def test_headings_paragraphs_and_sentences_stay_whole():
    text = "# One\n\n" + "Few words here. " * 8 + "\n\n# Two\n\n" + "More words there. " * 8
    spans = split_passages(text, count_words, (10, 40, 45))
    assert [text[start:stop][:5] for start, stop in spans] == ["# One", "# Two"]
    spans = split_passages("A short one. " * 30, count_words, (10, 18, 20))
    assert all(("A short one. " * 30)[stop - 1] == "." for _, stop in spans)
    # a sentence that is too long is cut between words, and some are repeated
    text = " ".join(f"word{number}" for number in range(50))
    spans = split_passages(text, count_words, (10, 20, 30))
    assert all(after[0] < before[1] for before, after in zip(spans, spans[1:], strict=False))
    assert all(text[start - 1 : start] in ("", " ") for start, _ in spans)
    assert split_passages("short", count_words) == [(0, 5)]


@pytest.mark.parametrize(
    ("question", "expected"),
    [("Who founded the museum?", 0), ("How much do loaves weigh?", 1), ("博物馆什么时候成立?", 2)],
)
def test_the_passage_with_the_words_comes_first(question, expected):
    passages = [MUSEUM, BREAD, "博物馆成立于一九二六年。"]
    assert rank_passages(question, passages, 3)[0] == expected
    assert len(rank_passages(question, passages, 2)) == 2
    assert rank_passages("zeppelin", passages, 2) == [0, 1]


def test_the_sentence_of_an_answer():
    def sentence(question: str, answer: str) -> str:
        passage, start, stop = find_sentence([BREAD, MUSEUM], question, answer)
        return [BREAD, MUSEUM][passage][start:stop]

    assert sentence("Who founded the museum?", "Ilse Brandt") == "The museum was founded in 1926 by Ilse Brandt."
    # of two sentences with the answer the one that the question is about; "Dr." ends none
    assert sentence("Who repaired clocks?", "brandt") == "Dr. Brandt had repaired clocks."
    assert sentence("How much does a loaf weigh?", "2 kg, two kilograms or so") == "A loaf weighs two kilograms."
    assert find_sentence([""], "Who?", "nobody") == (0, 0, 0)
