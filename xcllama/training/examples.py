"""The examples of every step, as a function of the recipe and the step's number: a run resumes from its step alone."""

import random
from dataclasses import dataclass, replace

from dataset_builders.tasks import PASSAGE_TASKS
from xcllama.training.passages import Passage, Question, Turn
from xcllama.training.recipe import Recipe

# steps that are drawn together and sorted by length
BUCKET_STEPS = 32


@dataclass(frozen=True)
class Example:
    """One instruction with its answer.

    Args:
        passages: indices of the passages to read; more than one when distractors are joined.
        own: the one of them that the question is about.
        key: names the example; whatever is random about it (dropped context tokens) depends on the key alone.
    """

    passages: tuple[int, ...]
    own: int
    task: str
    question: str
    answer: str
    history: tuple[Turn, ...]
    key: str


class ExamplePlan:
    """Draws the examples of a step; steps of one bucket hold examples of similar length.

    Raises:
        ValueError: the recipe asks for answers, and no passage has a question of a weighted source.
    """

    def __init__(self, passages: list[Passage], recipe: Recipe):
        self.passages, self.recipe = passages, recipe
        self._drawn: tuple[int, list[list[list[Example]]]] = (-1, [])
        self.asked: dict[str, list[int]] = {}
        for index, passage in enumerate(passages):
            for source in {question.source for question in passage.questions}:
                self.asked.setdefault(source, []).append(index)
        # weights of files count for every source that their rows name
        files = sum(weight for name, weight in recipe.data.sources.items() if name not in self.asked)
        weights = {name: recipe.data.sources.get(name, files) for name in sorted(self.asked)}
        self.source_weights = {name: weight for name, weight in weights.items() if weight > 0}
        if recipe.data.tasks.get("answer", 0) and not self.source_weights:
            raise ValueError(
                f"No passage has a question of {', '.join(recipe.data.sources)}; give task 'answer' weight 0."
            )

    def step(self, number: int) -> list[list[Example]]:
        """The examples of step `number` (from 0), by passage: `passages_per_step` lists."""
        bucket, place = divmod(number, BUCKET_STEPS)
        if self._drawn[0] != bucket:
            self._drawn = (bucket, self._bucket(bucket))
        return self._drawn[1][place]

    def _bucket(self, number: int) -> list[list[list[Example]]]:
        """The steps of a bucket: drawn together, sorted by length, cut into steps, and the steps shuffled."""
        size = self.recipe.optimization.passages_per_step
        generator = random.Random(f"{self.recipe.seed}:bucket:{number}")
        drawn = [self._draw(generator) for _ in range(BUCKET_STEPS * size)]
        count = self.recipe.optimization.questions_per_passage
        groups = [
            self.examples(*item, f"{self.recipe.seed}:{number}:{index}", count) for index, item in enumerate(drawn)
        ]
        groups.sort(key=_length)
        steps = [groups[start : start + size] for start in range(0, len(groups), size)]
        generator.shuffle(steps)
        return [self._joined(step, generator) for step in steps]

    def _joined(self, step: list[list[Example]], generator: random.Random) -> list[list[Example]]:
        """The step with up to `distractors` other passages beside each, which its forward pass encodes anyway."""
        size, most = max(1, len(step) // self.recipe.optimization.accumulate), self.recipe.data.distractors
        joined = []
        for place, group in enumerate(step):
            own, first = group[0].own, place - place % size
            others = sorted({other[0].own for other in step[first : first + size]} - {own})
            drawn = generator.sample(others, min(len(others), generator.randint(0, most)))
            passages = tuple(generator.sample([own, *drawn], 1 + len(drawn)))
            joined.append([replace(example, passages=passages) for example in group])
        return joined

    def _draw(self, generator: random.Random) -> tuple[str, int]:
        """A task, and a passage that can serve it."""
        tasks = self.recipe.data.tasks
        task = generator.choices(list(tasks), weights=list(tasks.values()))[0]
        if task != "answer":
            return task, generator.randrange(len(self.passages))
        source = generator.choices(list(self.source_weights), weights=list(self.source_weights.values()))[0]
        return f"answer:{source}", generator.choice(self.asked[source])

    def examples(self, task: str, index: int, key: str, count: int) -> list[Example]:
        """Up to `count` examples of one passage: of "answer:SOURCE", its questions; of another task, made of it."""
        generator = random.Random(key)
        if task.startswith("answer:"):
            asked = [item for item in self.passages[index].questions if item.source == task[len("answer:") :]]
            questions = generator.sample(asked, min(count, len(asked)))
        else:
            questions = self._label_free(task, index, count, generator)
        return [
            Example((index,), index, task, item.text, item.answer, item.history, f"{key}:{number}")
            for number, item in enumerate(questions)
        ]

    def _label_free(self, task: str, index: int, count: int, generator: random.Random) -> list[Question]:
        found: dict[str, Question] = {}
        # a passage may have nothing to ask for in the sentence that was drawn; a few tries, then another task
        for name in (task, "cloze", "completion", "repetition"):
            for _ in range(3 * count):
                pair = PASSAGE_TASKS[name](self.passages[index].text, generator)
                if pair is not None:
                    found.setdefault(pair[0], Question(*pair, source=name))
                if len(found) == count:
                    return list(found.values())
            if found:
                break
        return list(found.values())


def _length(examples: list[Example]) -> int:
    """Characters of the longest example of a passage, as the decoder reads it."""
    return max(
        len(item.question) + len(item.answer) + sum(len(part) + 16 for turn in item.history for part in turn)
        for item in examples
    )
