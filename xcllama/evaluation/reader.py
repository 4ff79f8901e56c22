"""A model that answers questions in batches: from cached passages, from its prompt, or from neither."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_xcllama import ContextCache, ProjectedContext, XCLlamaProcessor
from modeling_xcllama.answer_scores import token_scores
from modeling_xcllama.checkpoints import find_model, is_added_weights
from xcllama.costs import key_value_bytes
from xcllama.evaluation.decoding import pad
from xcllama.evaluation.questions import Question
from xcllama.models import load_model

# what is read at a time, padding included: more takes more memory and is no faster
BATCH_ROWS = 16
BATCH_TOKENS = 8192
# passages encoded at a time; the model batches them by length itself
PASSAGES = 64


@dataclass(frozen=True)
class Request:
    """A question with the texts that it is asked on, in the cache or in the prompt."""

    question: Question
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a model made of a question.

    Args:
        text: the first line of the greedy answer.
        token_scores: log-probabilities of its tokens, the end included.
        loss: mean over the tokens of the reference answer, the end included.
        context_tokens: that were read, in the cache or in the prompt.
        prompt_tokens: that were prefilled, contexts in the prompt included.
    """

    text: str
    token_scores: tuple[float, ...]
    loss: float
    context_tokens: int
    prompt_tokens: int


class Reader:
    """A frozen decoder with what was added to it.

    Args:
        model: an XC model, or any causal language model.
        processor: its tokenizer, with the chat template that it was trained with.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, model: PreTrainedModel, processor: XCLlamaProcessor, max_new_tokens: int = 24):
        self.model, self.processor, self.max_new_tokens = model.eval(), processor, max_new_tokens
        self.tokenizer = processor.tokenizer
        self.pad_token_id = (
            self.tokenizer.eos_token_id if self.tokenizer.pad_token is None else self.tokenizer.pad_token_id
        )
        self._places: dict[str, int] = {}
        self._caches: dict[str, ContextCache] = {}
        self.resident_bytes_per_token: float | None = None

    @classmethod
    def load(cls, folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **options) -> "Reader":
        """The model in a folder of added weights, of a peft adapter (merged), or of a whole model.

        Args:
            dtype: of all weights: float32 where a CPU has no products of 16 bits.
            options: of the constructor.
        """
        if is_added_weights(folder):
            model, processor = load_model(folder, dtype=dtype)
            return cls(model.to(device, dtype), processor, **options)
        base = folder
        if (config := Path(folder) / "adapter_config.json").is_file():
            base = json.loads(config.read_text())["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(find_model(base), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(find_model(base))
        if config.is_file():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
            if (template := Path(folder) / "chat_template.jinja").is_file():
                tokenizer.chat_template = template.read_text()
        return cls(model.to(device), XCLlamaProcessor(tokenizer), **options)

    def answer(self, requests: Sequence[Request], reads: str, cache_dtype: str = "bfloat16") -> list[Answer]:
        """Greedy answers, and the losses of the reference answers.

        Args:
            reads: "cache", "prompt" or "nothing".
            cache_dtype: of the cached states: "bfloat16", "int8" or "int4".

        Raises:
            ValueError: a prompt that is longer than the model takes.
        """
        texts = [request.texts if reads == "prompt" else () for request in requests]
        prompts = [self._prompt(request.question, own) for request, own in zip(requests, texts, strict=True)]
        bare = [len(self._prompt(request.question, ())) for request in requests]
        cache, tokens = None, [len(prompt) - own for prompt, own in zip(prompts, bare, strict=True)]
        if reads == "cache":
            cache = self._cache(requests, cache_dtype)
            tokens = cache.lengths
        room = self.model.config.max_position_embeddings - self.max_new_tokens
        if (longest := max(map(len, prompts))) > room:
            raise ValueError(f"a prompt has {longest} tokens, there is room for {room}: leave this source out.")
        answers: list[Answer | None] = [None] * len(requests)
        sizes = [
            len(prompt) + (count if reads == "cache" else 0) for prompt, count in zip(prompts, tokens, strict=True)
        ]
        for batch in batches(sizes):
            references = [self._answer_ids(requests[i].question.answers[0]) for i in batch]
            context = None if cache is None else self._project(cache.select(batch))
            found = self._batch([prompts[i] for i in batch], references, context)
            for i, (text, scores, loss) in zip(batch, found, strict=True):
                answers[i] = Answer(text, scores, loss, tokens[i], len(prompts[i]))
        return answers

    def bytes_per_token(self, reads: str, cache_dtype: str = "bfloat16") -> dict[str, float | None]:
        """Bytes of a context token, stored and resident, in 16 bits where nothing else was asked; after `answer`."""
        if reads == "cache":
            return {
                "cache_bytes_per_token": self._caches[cache_dtype].bytes_per_token,
                "resident_bytes_per_token": self.resident_bytes_per_token,
            }
        size = key_value_bytes(self.model.config) if reads == "prompt" else None
        return {"cache_bytes_per_token": size, "resident_bytes_per_token": size}

    def _prompt(self, question: Question, texts: tuple[str, ...]) -> list[int]:
        text = "\n\n".join([*texts, question.question])
        prompt = self.processor.prompts([text], [question.history])[0]
        return self.tokenizer(prompt, add_special_tokens=not self.processor.chat_template, verbose=False)["input_ids"]

    def _answer_ids(self, answer: str) -> list[int]:
        # a template ends where the answer starts; without one a space parts them
        text = answer if self.processor.chat_template else f" {answer}"
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def _cache(self, requests: Sequence[Request], dtype: str) -> ContextCache:
        """A row for each request; a passage is encoded when it is first asked for."""
        texts = dict.fromkeys(text for request in requests for text in request.texts)
        new = sorted((text for text in texts if text not in self._places), key=len)
        if new:
            parts = [self._caches["bfloat16"]] if self._caches else []
            for start in range(0, len(new), PASSAGES):
                inputs = self.processor(contexts=new[start : start + PASSAGES], return_tensors="pt")
                encoded = self.model.encode_context(**inputs.to(self.model.device))
                parts.append(encoded.to(dtype=torch.bfloat16))
            self._places |= {text: len(self._places) + index for index, text in enumerate(new)}
            self._caches = {"bfloat16": type(parts[0]).concat(parts)}
        if dtype not in self._caches:
            self._caches[dtype] = self._caches["bfloat16"].quantize(dtype)
        return self._caches[dtype].join([[self._places[text] for text in request.texts] for request in requests])

    def _project(self, cache: ContextCache) -> ProjectedContext:
        projected = self.model.project_context(cache)
        if cache.num_tokens:
            # in 16 bits, whatever it is computed in; rows that share documents count them as often as they read them
            parts = (*projected.keys, *projected.values)
            size = sum(2 * p.numel() if isinstance(p, Tensor) else p.nbytes for p in parts)
            self.resident_bytes_per_token = size / parts[0].shape[0]
        return projected

    @torch.no_grad()
    def _batch(
        self, prompts: list[list[int]], references: list[list[int]], context: ProjectedContext | None
    ) -> list[tuple[str, tuple[float, ...], float]]:
        """(text, token scores, loss) of each row; the prompts are prefilled once for both."""
        ids, mask = pad(prompts, self.pad_token_id, "left", self.model.device)
        targets, targets_mask = pad(references, self.pad_token_id, "right", self.model.device)
        options = {} if context is None else {"context_cache": context}
        length = ids.shape[1] - 1
        inputs = torch.cat([ids, targets[:, :-1]], dim=1)
        inputs_mask = torch.cat([mask, targets_mask[:, :-1]], dim=1)
        positions = (inputs_mask.cumsum(1) - 1).clamp(min=0)

        past = self.model(
            input_ids=inputs[:, :length],
            attention_mask=inputs_mask[:, :length],
            position_ids=positions[:, :length],
            use_cache=True,
            logits_to_keep=1,
            **options,
        ).past_key_values
        logits = self.model(
            input_ids=inputs[:, length:],
            attention_mask=inputs_mask,
            position_ids=positions[:, length:],
            past_key_values=past,
            use_cache=True,
            **options,
        ).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        losses = (losses.view_as(targets) * targets_mask).sum(1) / targets_mask.sum(1)
        past.crop(-targets.shape[1])
        outputs = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=past,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=self.pad_token_id,
            **options,
        )
        found = []
        for row, scores, loss in zip(
            outputs.sequences, token_scores(self.model, outputs), losses.tolist(), strict=True
        ):
            text = self.tokenizer.decode(row[length + 1 :][: len(scores)], skip_special_tokens=True).strip()
            found.append((text.split("\n")[0], tuple(scores.tolist()), loss))
        return found


def batches(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar sizes, the largest first, of `BATCH_ROWS` or fewer and about `BATCH_TOKENS`."""
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if batch and (len(batch) == BATCH_ROWS or sizes[batch[0]] * (len(batch) + 1) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
