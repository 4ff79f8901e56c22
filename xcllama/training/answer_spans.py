"""Where an answer stands in a passage, token by token: what attention is shown while it learns to find."""

import re

Offsets = list[tuple[int, int]]


def answer_places(answer: str, answer_offsets: Offsets, passage: str, offsets: Offsets) -> list[list[int]]:
    """For each token of an answer, the tokens of a passage that hold its characters, wherever the answer stands.

    Args:
        answer_offsets, offsets: first character of each token of the answer and of the passage, and the one after
            its last.

    Returns:
        A list for each token of the answer, empty where the passage does not hold the answer as whole words.
    """
    found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", passage, re.IGNORECASE)]
    return [
        [
            index
            for index, (first, last) in enumerate(offsets)
            if any(first < place + end and place + start < last for place in found)
        ]
        for start, end in answer_offsets
    ]
