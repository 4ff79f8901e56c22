"""Tokenized passages and questions in one file: what a run draws its steps from where there are no sources to read.

`pooling.py` makes it from a recipe; `PoolBatches` draws from it what `ExamplePlan` and `Collator` draw from passages.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xcllama.training.batch import Batch
from xcllama.training.recipe import Recipe

NAME = "pool.safetensors"
# steps that are drawn together and sorted by length
BUCKET_STEPS = 8
INDICES = ("questions", "group_passages", "group_own", "group_offsets")
RAGGED = ("passages", "prompts", "answers", "held_passages", "held_prompts")


class Ragged:
    """Lists of numbers, back to back: `values` `[total]` and `offsets`, the first value of each and the last's end."""

    def __init__(self, values: Tensor, offsets: Tensor):
        self.values, self.offsets = values.long(), offsets.tolist()

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> "Ragged":
        """Pack `lists`."""
        lists = list(lists)
        flat = torch.tensor([value for part in lists for value in part], dtype=torch.long)
        return cls(flat, torch.tensor([0, *accumulate(map(len, lists))]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> list[int]:
        """Numbers of each list."""
        return [end - start for start, end in pairwise(self.offsets)]


@dataclass(frozen=True)
class TokenPool:
    """Passages, examples in groups of one kind and passage, and held-out questions, as token ids.

    Args:
        passages: of each passage, as the encoder reads them.
        prompts, answers: of each example; an answer ends with the token that ends it.
        questions: where the question stands in each prompt, `[num_examples, 2]`.
        group_passages: the passage that each group reads.
        group_own: the passage that its questions are about; another one where their answer is that there is none.
        group_offsets: first example of each group and the end of the last.
        weights: how often each group is drawn, `[num_groups]`.
        held_passages, held_prompts: of each held-out question.
        held_answers: accepted answers of each.
        pad_token_id: of the tokenizer.
        origin: what it was made from.
    """

    passages: Ragged
    prompts: Ragged
    answers: Ragged
    questions: Tensor
    group_passages: Tensor
    group_own: Tensor
    group_offsets: Tensor
    weights: Tensor
    held_passages: Ragged
    held_prompts: Ragged
    held_answers: list[list[str]]
    pad_token_id: int
    origin: dict

    def first(self, groups: int, held_out: int) -> "TokenPool":
        """The first `groups` with their passages and examples, and as many held-out questions as asked for."""
        read, own = self.group_passages[:groups].tolist(), self.group_own[:groups].tolist()
        used = list(dict.fromkeys(read + own))
        last = int(self.group_offsets[groups])

        def take(ragged: Ragged, indices: Iterable[int]) -> Ragged:
            return Ragged.of(ragged[index].tolist() for index in indices)

        return replace(
            self,
            passages=take(self.passages, used),
            prompts=take(self.prompts, range(last)),
            answers=take(self.answers, range(last)),
            questions=self.questions[:last],
            group_passages=torch.tensor([used.index(passage) for passage in read]),
            group_own=torch.tensor([used.index(passage) for passage in own]),
            group_offsets=self.group_offsets[: groups + 1],
            weights=self.weights[:groups],
            held_passages=take(self.held_passages, range(held_out)),
            held_prompts=take(self.held_prompts, range(held_out)),
            held_answers=self.held_answers[:held_out],
        )

    def save(self, folder: Path) -> Path:
        """Write the pool to `folder` and return the file."""
        tensors = {name: getattr(self, name).int() for name in INDICES}
        tensors["weights"] = self.weights.float()
        for name in RAGGED:
            ragged = getattr(self, name)
            # half the bytes where the vocabulary allows
            narrow = torch.uint16 if not len(ragged) or ragged.values.max() < 2**16 else torch.int32
            tensors |= {name: ragged.values.to(narrow), f"{name}.offsets": torch.tensor(ragged.offsets).int()}
        rest = {"held_answers": self.held_answers, "pad_token_id": self.pad_token_id, "origin": self.origin}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / NAME, metadata={"pool": json.dumps(rest)})
        return folder / NAME

    @classmethod
    def load(cls, folder: str | Path) -> "TokenPool":
        """Read what `save` wrote.

        Raises:
            ValueError: no pool in `folder`.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise ValueError(f"{folder} holds no {NAME}: `python scripts/gpu_check.py --pack DIR` writes one.")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            rest = json.loads(file.metadata()["pool"])
        for name in RAGGED:
            tensors[name] = Ragged(tensors[name], tensors.pop(f"{name}.offsets"))
        return cls(**tensors, **rest)


class PoolBatches:
    """The micro-batches of every step, as a function of the recipe and the step's number.

    Args:
        pool: what is drawn from.
        recipe: questions of a step, distractors, seed.
        states: of all passages, back to back, `[num_tokens, width]`, on the device of the batches.

    Raises:
        ValueError: the recipe asks for what a pool does not hold.
    """

    def __init__(self, pool: TokenPool, recipe: Recipe, states: Tensor):
        optimization = recipe.optimization
        if optimization.context_dropout or optimization.span_loss:
            raise ValueError(
                "a pool serves no `optimization.context_dropout` and no `span_loss`, got "
                f"{optimization.context_dropout} and {optimization.span_loss}; set both to 0."
            )
        self.pool, self.recipe, self.states = pool, recipe, states
        self._drawn: tuple[int, list[list[int]]] = (-1, [])
        self._bounds = pool.group_offsets.tolist()
        self._passages, self._own = pool.group_passages.tolist(), pool.group_own.tolist()
        self._cumulative = list(accumulate(pool.weights.tolist()))
        sizes = [sum(pair) for pair in zip(pool.prompts.lengths, pool.answers.lengths, strict=True)]
        self._longest = [max(sizes[start:end]) for start, end in pairwise(self._bounds)]

    def step(self, number: int, parts: int = 1) -> list[Batch]:
        """Step `number` (from 0), cut into `parts` forward passes."""
        bucket, place = divmod(number, BUCKET_STEPS)
        if self._drawn[0] != bucket:
            self._drawn = (bucket, self._bucket(bucket))
        groups = self._drawn[1][place]
        generator = random.Random(f"{self.recipe.seed}:{number}")
        size = -(-len(groups) // parts)
        return [self._batch(groups[start : start + size], generator) for start in range(0, len(groups), size)]

    def _bucket(self, number: int) -> list[list[int]]:
        """The groups of each step of a bucket: drawn together, sorted by length, cut into steps."""
        size = self.recipe.optimization.passages_per_step
        generator = random.Random(f"{self.recipe.seed}:bucket:{number}")
        everything = range(len(self._passages))
        drawn = generator.choices(everything, cum_weights=self._cumulative, k=BUCKET_STEPS * size)
        drawn.sort(key=self._longest.__getitem__)
        steps = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        generator.shuffle(steps)
        return steps

    def _batch(self, groups: list[int], generator: random.Random) -> Batch:
        pool, count = self.pool, self.recipe.optimization.questions_per_passage
        used = list(dict.fromkeys(self._passages[group] for group in groups))
        place = {passage: position for position, passage in enumerate(used)}
        examples, rows, own = [], [], []
        for group in groups:
            around, about = place[self._passages[group]], place.get(self._own[group])
            asked = range(self._bounds[group], self._bounds[group + 1])
            chosen = generator.sample(asked, min(count, len(asked)))
            examples += chosen
            rows += [self._joined(around, about, len(used), generator)] * len(chosen)
            own += [around if about == around else None] * len(chosen)
        tokens = [torch.cat([pool.prompts[index], pool.answers[index]]) for index in examples]
        starts = torch.tensor([len(pool.prompts[index]) for index in examples])[:, None]
        ends = torch.tensor([len(ids) for ids in tokens])[:, None]
        input_ids = pad_sequence(tokens, batch_first=True, padding_value=pool.pad_token_id)
        positions = torch.arange(input_ids.shape[1])
        first, last = pool.questions[examples].unsqueeze(-1).unbind(1)
        kept = torch.cat([torch.arange(pool.passages.offsets[p], pool.passages.offsets[p + 1]) for p in used])
        return Batch(
            tuple(map(str, examples)),
            input_ids,
            (positions < ends).long(),
            (positions >= starts) & (positions < ends),
            (positions >= first) & (positions < last),
            self.states[kept.to(self.states.device)],
            pool.passages.values[kept],
            tuple(accumulate((len(pool.passages[passage]) for passage in used), initial=0)),
            tuple(rows),
            tuple(own),
        ).to(self.states.device)

    def _joined(self, read: int, about: int | None, count: int, generator: random.Random) -> tuple[int, ...]:
        """The passage `read` and up to `distractors` others of the same forward pass, in any order."""
        candidates = [place for place in range(count) if place not in (read, about)]
        most = min(self.recipe.data.distractors, len(candidates))
        others = generator.sample(candidates, generator.randint(0, most))
        return tuple(generator.sample([read, *others], 1 + len(others)))
