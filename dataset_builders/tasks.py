"""Tasks: what is asked of a row in training, and of any passage without labels.

A task of a passage takes a text and a generator and gives (instruction, answer), or None where there is nothing to
ask for: these teach to find what is asked for, and to copy it. Cloze translation by rules follows the idea of Lewis et
al., 2019 (arXiv 1906.04980): a blank becomes a question word.

A task of a row gives a row again, whose `question_type` is the task, or None: `PASSAGE_TASKS` on one of the useful
contexts, and those that ask the row's own question. Training draws passage tasks step by step; the published mix holds
an example of a task for each of its rows (`make_examples`).
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

from dataset_builders.schema import NO_ANSWER, Row
from dataset_builders.splits import document_key, holds, normalize

Pair = tuple[str, str]

_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=[A-Z"“(])')
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"(?:{_MONTHS})(?: \d+)?(?:, \d{{4}})?|1[0-9]\d\d|20[0-2]\d")
_SPAN = re.compile(
    rf"(?:{_MONTHS}) \d+(?:, \d{{4}})?|\b\d[\d,.]*\d\b|\b\d+\b"
    r"|\b[A-Z][\w'-]+(?:\s(?:of\s|the\s|de\s)?[A-Z][\w'-]+)*"
    r"|\b[a-z]{3,} [a-z]{6,}\b|\b[a-z]{6,}\b"
)
_WORDS_OF_KIND = {
    "date": ("when", "what year", "which"),
    "number": ("how many", "how much", "what number"),
    "name": ("who", "what", "which", "where"),
    "other": ("what", "which"),
}

# words that end a phrase, as in RAKE (Rose et al., 2010): function words and the commonest verbs
_BETWEEN = set(
    "a an the this that these those its his her their our my your it he she they we you i him them us who whom "
    "whose which what and or but nor so yet if then than as at by for from in into of off on onto out over to "
    "up with without within about after again against all also although am among any are around be became "
    "because become been before being below between both came can could did do does done down during each "
    "either even ever every few had has have having here how however is just like made make many may might "
    "more most much must near neither no not now often one only other own same shall should since some still "
    "such there therefore though through thus too under until upon very was were when where whether while will "
    "would said says called known used using including several".split()
)


def sentences(passage: str) -> list[str]:
    """The sentences of 6 to 40 words."""
    return [part for part in _SENTENCE_END.split(passage) if 6 <= len(part.split()) <= 40]


def cloze(passage: str, generator: random.Random) -> Pair | None:
    """A sentence, or a part of one, with a name, a number or one or two words blanked out."""
    return _blank(_cut(passage, generator), generator)


def phrase_cloze(passage: str, generator: random.Random) -> Pair | None:
    """As `cloze`, with a whole phrase blanked out."""
    return _blank(_cut(passage, generator, phrases), generator)


def question(passage: str, generator: random.Random) -> Pair | None:
    """A question in broken English: a question word, then the words around a span, some of them dropped or moved."""
    return _ask(_cut(passage, generator), generator)


def phrase_question(passage: str, generator: random.Random) -> Pair | None:
    """As `question`, for a whole phrase."""
    return _ask(_cut(passage, generator, phrases), generator)


def _blank(cut: tuple[str, str, str] | None, generator: random.Random) -> Pair | None:
    if cut is None:
        return None
    left, answer, right = cut
    if generator.random() < 0.4:
        left = " ".join(left.split(" ")[-generator.randint(4, 12) :])
        right = " ".join(right.split(" ")[: generator.randint(3, 12)])
    return f"Fill in the blank: {(left + '____' + right).strip()}", answer


def _ask(cut: tuple[str, str, str] | None, generator: random.Random) -> Pair | None:
    if cut is None:
        return None
    left, answer, right = cut[0].strip(), cut[1], cut[2].strip().rstrip(".!?")
    if generator.random() < 0.6:
        left = re.split(r"[,;:] ", left)[-1]
    if generator.random() < 0.6:
        right = re.split(r"[,;:] ", right)[0]
    left, word = _question_word(left, answer, generator)
    parts = [right, left] if left and right and generator.random() < 0.5 else [left, right]
    words = " ".join(parts).split()
    if len(words) < 3:
        return None
    words = [item for item in words if generator.random() > 0.1]
    if generator.random() < 0.3:
        moved = [(index + generator.uniform(0, 3), item) for index, item in enumerate(words)]
        words = [item for _, item in sorted(moved)]
    text = " ".join([word, *words]).strip(" ,;:") + "?"
    return (text[0].upper() + text[1:] if generator.random() < 0.7 else text), answer


def completion(passage: str, generator: random.Random) -> Pair | None:
    """The first words of a sentence; the answer is how it goes on, 16 words at most."""
    found = sentences(passage)
    if not found:
        return None
    words = generator.choice(found).split()
    start = generator.randint(3, max(3, len(words) * 2 // 3))
    return f"Complete the sentence: {' '.join(words[:start])}", " ".join(words[start : start + 16])


def infilling(passage: str, generator: random.Random) -> Pair | None:
    """Two sentences of the passage; the answer is the sentence between them."""
    found = sentences(passage)
    if len(found) < 3:
        return None
    index = generator.randrange(1, len(found) - 1)
    before, after = found[index - 1].split()[-12:], found[index + 1].split()[:12]
    return f"What stands between? {' '.join(before)} ____ {' '.join(after)}", found[index]


def repetition(passage: str, generator: random.Random) -> Pair | None:
    """The whole passage, or its first 96 words."""
    words = passage.split()
    return ("Repeat the text.", " ".join(words[:96])) if words else None


PASSAGE_TASKS: dict[str, Callable[[str, random.Random], Pair | None]] = {
    "question": question,
    "cloze": cloze,
    "phrase_question": phrase_question,
    "phrase_cloze": phrase_cloze,
    "completion": completion,
    "infilling": infilling,
    "repetition": repetition,
}


def spans(sentence: str) -> list[tuple[int, int]]:
    """Names, dates, numbers, and one or two long words."""
    return [match.span() for match in _SPAN.finditer(sentence)]


def phrases(sentence: str) -> list[tuple[int, int]]:
    """Runs of one to six words between function words and punctuation; two runs around "of" make one."""
    found: list[tuple[int, int]] = []
    for run in re.finditer(r"[^\s,;:()\[\]\"“”.!?]+(?:[.,]\d+)*(?: [^\s,;:()\[\]\"“”.!?]+(?:[.,]\d+)*)*", sentence):
        start = end = None
        for word in re.finditer(r"\S+", run.group()):
            if word.group().lower() not in _BETWEEN:
                start = word.start() if start is None else start
                end = word.end()
                continue
            goes_on = word.group() == "of" and start is not None
            if not goes_on and start is not None:
                found.append((run.start() + start, run.start() + end))
                start = None
        if start is not None:
            found.append((run.start() + start, run.start() + end))
    return [(start, end) for start, end in found if end - start > 2 and len(sentence[start:end].split()) <= 6]


def _cut(
    passage: str, generator: random.Random, find: Callable[[str], list[tuple[int, int]]] = spans
) -> tuple[str, str, str] | None:
    """A sentence as what precedes a span, the span, and what follows it; names and numbers are preferred."""
    found = sentences(passage)
    if not found:
        return None
    sentence = generator.choice(found)
    places = [place for place in find(sentence) if place[0] > 0]
    if not places:
        return None
    named = [(start, end) for start, end in places if not sentence[start].islower()]
    start, end = generator.choice(named if named and generator.random() < (0.75 if find is spans else 0.5) else places)
    return sentence[:start], sentence[start:end], sentence[end:]


def _question_word(left: str, answer: str, generator: random.Random) -> tuple[str, str]:
    """The words before the blank, and a question word that fits the answer."""
    if _DATE.fullmatch(answer):
        if left.lower().endswith((" in", " on", " by", " since", " at")):
            return left.rsplit(" ", 1)[0], "when"
        kind = "date"
    elif any(letter.isdigit() for letter in answer):
        kind = "number"
    else:
        kind = "other" if answer[0].islower() else "name"
    if kind == "name" and left.lower().endswith((" in", " at", " near", " from")):
        return left, generator.choice(("where", "which place", "what"))
    return left, generator.choice(_WORDS_OF_KIND[kind])


class DistractorPool:
    """The most recent contexts of a stream of rows, one a document, for other rows to draw from.

    Args:
        size: number of documents remembered.
    """

    def __init__(self, size: int = 256):
        if size < 2:
            raise ValueError(f"`size` must be at least 2 documents, got {size}.")
        self.size = size
        self._texts: dict[str, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, row: Row) -> None:
        """Remember the first useful context of `row` (its first one where none is useful)."""
        index = min(row["useful_contexts"], default=0)
        self._texts.setdefault(document_key(row), (row["titles_list"][index], row["contexts_list"][index]))
        if len(self._texts) > self.size:
            del self._texts[next(iter(self._texts))]

    def draw(self, row: Row, count: int, generator: random.Random) -> list[tuple[str, str]]:
        """`count` (title, text) of other documents without an accepted answer of `row`, or as many as there are."""
        own_titles = {normalize(title) for title in row["titles_list"] if title}
        own_texts = set(row["contexts_list"])
        answers = [normalize(answer) for answer in row["answers"] if row["answerable"]]
        others = []
        for key in generator.sample(sorted(self._texts), len(self._texts)):
            if len(others) == count:
                break
            title, text = self._texts[key]
            if key == document_key(row) or normalize(title) in own_titles or text in own_texts:
                continue
            if not any(holds(text, answer) for answer in answers):
                others.append((title, text))
        return others


def chunks(text: str, max_words: int) -> list[str]:
    """`text` cut into pieces of at most `max_words` words, between sentences where it can be; no word is lost."""
    if max_words < 1:
        raise ValueError(f"`max_words` must be at least 1, got {max_words}.")
    pieces, current = [], []
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        if current and len(current) + len(words) > max_words:
            pieces.append(current)
            current = []
        current = current + words
        while len(current) > max_words:
            pieces.append(current[:max_words])
            current = current[max_words:]
    return [" ".join(piece) for piece in [*pieces, current] if piece]


def _asked(task: str, row: Row, contexts: list[tuple[str, str]], useful: list[int], **changes: object) -> Row:
    """The row as an example of a task, on these contexts (title, text)."""
    titles, texts = [title for title, _ in contexts], [text for _, text in contexts]
    found = {"titles_list": titles, "contexts_list": texts, "useful_contexts": useful, "question_type": task}
    return row | found | changes


def question_answering(row: Row, generator: random.Random, pool: DistractorPool) -> Row | None:
    """The row's question on its whole contexts."""
    return row | {"question_type": "question_answering"} if row["question"] else None


def question_in_context(row: Row, generator: random.Random, pool: DistractorPool) -> Row | None:
    """The question put before each context that is encoded, and asked as usual."""
    if not row["question"]:
        return None
    texts = [f"{row['question']}\n{text}" for text in row["contexts_list"]]
    contexts = list(zip(row["titles_list"], texts, strict=True))
    return _asked("question_in_context", row, contexts, row["useful_contexts"])


def chunked_contexts(
    row: Row, generator: random.Random, pool: DistractorPool, max_words: int = 100, num_distractors: int = 2
) -> Row | None:
    """The contexts in chunks of at most `max_words` words, among chunks of other documents, shuffled.

    Useful are the chunks of a useful context that hold an accepted answer, or all of them where none does.
    """
    if not row["question"]:
        return None
    pieces = [
        (title, piece, index in row["useful_contexts"])
        for index, (title, text) in enumerate(zip(row["titles_list"], row["contexts_list"], strict=True))
        for piece in chunks(text, max_words)
    ]
    answers = [normalize(answer) for answer in row["answers"]]
    exact = [useful and any(holds(piece, answer) for answer in answers) for _, piece, useful in pieces]
    flags = exact if any(exact) else [useful for _, _, useful in pieces]
    entries = [(title, piece, flag) for (title, piece, _), flag in zip(pieces, flags, strict=True)]
    for title, text in pool.draw(row, num_distractors, generator):
        entries.append((title, generator.choice(chunks(text, max_words)), False))
    generator.shuffle(entries)
    useful = [index for index, (_, _, flag) in enumerate(entries) if flag]
    return _asked("chunked_contexts", row, [(title, piece) for title, piece, _ in entries], useful)


def no_answer(row: Row, generator: random.Random, pool: DistractorPool) -> Row | None:
    """The question on contexts of other documents, which do not hold its answer: `NO_ANSWER`."""
    others = pool.draw(row, len(row["contexts_list"]), generator) if row["answerable"] else []
    if not others:
        return None
    absent = {"history": [], "answer": NO_ANSWER, "answers": [NO_ANSWER], "answerable": False}
    return _asked("no_answer", row, others, [], **absent)


def _of_a_passage(task: str, row: Row, generator: random.Random, pool: DistractorPool) -> Row | None:
    """A passage task on one of the row's useful contexts."""
    index = generator.choice(row["useful_contexts"] or range(len(row["contexts_list"])))
    title, text = row["titles_list"][index], row["contexts_list"][index]
    if (pair := PASSAGE_TASKS[task](text, generator)) is None:
        return None
    instruction, answer = pair
    said = {"history": [], "question": instruction, "answer": answer, "answers": [answer], "answerable": True}
    return _asked(task, row, [(title, text)], [0], **said)


TASKS: dict[str, Callable[[Row, random.Random, DistractorPool], Row | None]] = {
    "question_answering": question_answering,
    "question_in_context": question_in_context,
    "chunked_contexts": chunked_contexts,
    "no_answer": no_answer,
} | {name: partial(_of_a_passage, name) for name in PASSAGE_TASKS}

# the tasks of the published mix
TASK_WEIGHTS = {"question_answering": 0.3, "chunked_contexts": 0.2, "no_answer": 0.1} | dict.fromkeys(
    PASSAGE_TASKS, 0.4 / len(PASSAGE_TASKS)
)


def make_examples(
    rows: Iterable[Row], weights: dict[str, float], seed: int = 0, pool_size: int = 256
) -> Iterator[Row]:
    """Stream an example for each row: of one task, drawn with probability proportional to `weights`.

    A task that has nothing to ask of a row is replaced by the others, in random order; a row that none can ask is left
    out. What a row gives depends on the seed, the row and, for distractors, its neighbours in the stream.

    Raises:
        ValueError: an unknown task, or weights that are negative or all zero.
    """
    if unknown := sorted(set(weights) - set(TASKS)):
        raise ValueError(f"`weights` must name tasks of {', '.join(TASKS)}, got {', '.join(unknown)}.")
    if any(weight < 0 for weight in weights.values()) or sum(weights.values()) <= 0:
        raise ValueError(f"`weights` must be at least 0, and one of them more, got {weights}.")
    return _examples(iter(rows), weights, seed, DistractorPool(pool_size))


def _examples(rows: Iterator[Row], weights: dict[str, float], seed: int, pool: DistractorPool) -> Iterator[Row]:
    # read ahead, so that the first rows have distractors too
    while waiting := list(islice(rows, pool.size)):
        for row in waiting:
            pool.add(row)
        for row in waiting:
            generator = random.Random(f"{seed}:{row['dataset']}:{row['sample_idx']}")
            remaining = {name: weight for name, weight in weights.items() if weight > 0}
            while remaining:
                name = generator.choices(list(remaining), weights=list(remaining.values()))[0]
                del remaining[name]
                if (example := TASKS[name](row, generator, pool)) is not None:
                    yield example
                    break
