"""The lm-eval model `xcllama`: contexts read through cross-attention, in the prompt, or not at all."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import get_dtype
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoProcessor

from modeling_xcllama.checkpoints import find_model, is_added_weights
from xcllama.costs import key_value_bytes
from xcllama.evaluation import decoding
from xcllama.evaluation.contexts import ContextPool, Texts, contexts_of, other_contexts
from xcllama.evaluation.cost import Cost, measured
from xcllama.evaluation.decoding import Row
from xcllama.models import load_model

logger = logging.getLogger(__name__)

CONTEXT_MODES = ("cross", "cross_shuffled", "prompt", "prompt_kv", "none")
CROSS_MODES = ("cross", "cross_shuffled")
PROMPT_MODES = ("prompt", "prompt_kv")


# between contexts in a prompt, as the LoRA-prompt baseline is trained
SEPARATOR = "\n\n"


@register_model("xcllama")
class XCLlamaLM(HFLM):
    """A causal language model that reads the contexts of a task's documents.

    Args:
        pretrained: model folder or Hub id; a folder of `save_cross_attention` (its base is found from its config); a
            folder of a peft adapter.
        context_mode: "cross": through cross-attention; "cross_shuffled": the contexts of another document;
            "prompt": in front of the question; "prompt_kv": the same from precomputed keys and values; "none".
        context_cache_dir: folder that keeps the encoded contexts for the next run (cross modes).
        cache_dtype: of the encoded contexts: "auto", "float32", "bfloat16", "float16", "int8" or "int4" (cross modes).
        base: the decoder of a folder of added weights, instead of the one in its config.
        shuffle_seed: of "cross_shuffled".
        options: of `HFLM`: batch_size, dtype, device, max_length, truncation, peft, trust_remote_code, ...

    Raises:
        ValueError: unknown or unfitting arguments.
    """

    def __init__(
        self,
        pretrained: str,
        context_mode: str = "cross",
        context_cache_dir: str | None = None,
        cache_dtype: str = "auto",
        base: str | None = None,
        shuffle_seed: int = 0,
        **options: Any,
    ):
        if context_mode not in CONTEXT_MODES:
            raise ValueError(f"`context_mode` must be one of {', '.join(CONTEXT_MODES)}, got {context_mode!r}.")
        if context_mode not in CROSS_MODES and (context_cache_dir is not None or cache_dtype != "auto"):
            raise ValueError(
                f"`context_cache_dir` and `cache_dtype` are of encoded contexts: leave them out with "
                f"context_mode={context_mode}, or use context_mode=cross."
            )
        if not str(options.get("batch_size", 1)).isdecimal():
            raise ValueError(f"`batch_size` must be a number, got {options['batch_size']!r}.")
        if base is not None and not is_added_weights(pretrained):
            raise ValueError(f"`base` is for folders of added weights, and {pretrained} is none; leave it out.")
        pretrained = find_model(str(pretrained))
        if pretrained.startswith(("/", ".", "~")) and not Path(pretrained).is_dir():
            raise ValueError(f"`pretrained` names no folder: {pretrained}; give a model folder or a Hub id.")
        if (Path(pretrained) / "adapter_config.json").is_file():
            options["peft"] = pretrained
            adapter = json.loads((Path(pretrained) / "adapter_config.json").read_text())
            pretrained = find_model(adapter["base_model_name_or_path"])
        self._adapter = Path(options["peft"]) if options.get("peft") else None
        self.context_mode, self.shuffle_seed, self._base = context_mode, int(shuffle_seed), base
        self.processor = None
        super().__init__(pretrained, **({"backend": "causal"} | options))
        if hasattr(self, "accelerator"):
            # HFLM takes these over on several GPUs only
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            self._device = self.accelerator.device
            self.model.to(self._device)
        self.pool = None
        if context_mode in CROSS_MODES:
            if not hasattr(self.model, "encode_context"):
                raise ValueError(
                    f"context_mode={context_mode} needs a model with cross-attention, {pretrained} is a plain "
                    f"{self.config.model_type!r}; use context_mode=prompt, prompt_kv or none."
                )
            if self.processor is None:
                self.processor = AutoProcessor.from_pretrained(
                    pretrained, trust_remote_code=options.get("trust_remote_code", False)
                )
            cut = bool(options.get("truncation"))
            self.pool = ContextPool(
                self.model, self.processor, context_cache_dir, cache_dtype, cut, self.rank, self._gather
            )

    # a folder of added weights is loaded where HFLM asks for its config

    def _get_config(self, pretrained: str, **options: Any) -> None:
        self._loaded = None
        if not is_added_weights(pretrained):
            super()._get_config(pretrained, **options)
            return
        self._loaded, self.processor = load_model(pretrained, self._base)
        self._config = self._loaded.config

    def _create_tokenizer(self, pretrained, tokenizer, **options: Any) -> None:
        if self._loaded is None or tokenizer is not None:
            super()._create_tokenizer(pretrained, tokenizer, **options)
            if self._adapter is not None and (template := self._adapter / "chat_template.jinja").is_file():
                # the template that the adapter was trained with
                self.tokenizer.chat_template = template.read_text()
        else:
            self.tokenizer = self.processor.tokenizer

    def _create_model(self, pretrained: str, dtype=None, peft: str | None = None, **options: Any) -> None:
        if self._loaded is None:
            super()._create_model(pretrained, dtype=dtype, peft=peft, **options)
            return
        if dtype not in (None, "auto"):
            self._loaded.to(get_dtype(dtype))
        self._model = self._loaded.to(self.device)
        if peft:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, peft)

    def _gather(self, items: list) -> list:
        return gather_object(items) if self.world_size > 1 else items

    def _texts(self, requests: Sequence[Instance]) -> list[Texts]:
        if self.context_mode == "none":
            return [() for _ in requests]
        if self.context_mode == "cross_shuffled":
            return other_contexts(requests, self.shuffle_seed, self._gather)
        return [contexts_of(request) for request in requests]

    def _row(self, prompt: str, request: Instance, texts: Texts, room: int, encode: Callable[[str], Row]) -> Row:
        """The row of a prompt with its contexts where the mode puts them.

        Args:
            room: most tokens of the prompt.
            encode: prompt -> row with its ids.

        Raises:
            ValueError: a prompt that is longer than the model takes.
        """
        if self.context_mode not in PROMPT_MODES:
            row = encode(prompt)
            self._check_length(row, request, room)
            return Row(row.prompt, row.continuation, texts)
        before, after = split_prompt(prompt, request) if prompt else ("", "")
        contexts = joined_contexts(texts)
        row = encode(before + contexts + after)
        if len(row.prompt) > room and self.truncation:
            ids = self.tok_encode(contexts, add_special_tokens=False)
            # a few tokens less: the cut text may be split otherwise
            keep = max(0, len(ids) - (len(row.prompt) - room) - len(SEPARATOR) - 4)
            contexts = self.tok_decode(ids[:keep]) + SEPARATOR
            row = encode(before + contexts + after)
        self._check_length(row, request, room)
        prefix = tuple(self.tok_encode(before + contexts)) if self.context_mode == "prompt_kv" else ()
        bare = len(encode(before + after).prompt) if before + after else 0
        return Row(row.prompt, row.continuation, (), prefix, len(row.prompt) - bare)

    def _check_length(self, row: Row, request: Instance, room: int) -> None:
        if len(row.prompt) > room:
            raise ValueError(
                f"the prompt of document {request.doc_id} of task {request.task_name!r} has {len(row.prompt)} tokens, "
                f"there is room for {room} of {self.max_length}; use context_mode=cross, add truncation=True to "
                "--model_args (cuts contexts), or leave the task out."
            )

    def _fetch(self, texts: Sequence[Texts]) -> list[bool]:
        """Encode what is missing; whether each request finds all its contexts there."""
        if self.pool is None:
            return [False for _ in texts]
        new = self.pool.fetch(text for own in texts for text in own)
        hits = []
        for own in texts:
            hits.append(not new & set(own))
            new -= set(own)
        return hits

    def _batches(self, rows: Sequence[Row], title: str):
        """(indices, context cache or None, keys and values of their prefix or None) of each batch of `rows`."""
        last, prefix = (), None
        progress = tqdm(total=len(rows), desc=title, disable=self.rank != 0)
        for batch in decoding.batches(rows, self.batch_size):
            first = rows[batch[0]]
            if first.prefix != last:
                last, prefix = first.prefix, decoding.prefix_cache(self.model, first.prefix)
            yield batch, self.pool.rows([rows[i].texts for i in batch]) if first.texts else None, prefix
            progress.update(len(batch))
        progress.close()

    def _costs(self, rows: Sequence[Row], hits: Sequence[bool]) -> list[Cost]:
        costs, prefixes = [], set()
        for row, hit in zip(rows, hits, strict=True):
            if row.texts:
                tokens, size = self.pool.size(row.texts)
                costs.append(Cost(tokens, len(row.prompt), size, hit))
            elif row.prefix:
                size = len(row.prefix) * self._bytes_per_token()
                costs.append(Cost(row.context_tokens, len(row.prompt), size, row.prefix in prefixes))
                prefixes.add(row.prefix)
            else:
                costs.append(Cost(row.context_tokens, len(row.prompt)))
        return costs

    def _bytes_per_token(self) -> int:
        return key_value_bytes(self.config, self.model.dtype.itemsize)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`; each answer carries its `cost`."""
        texts = self._texts(requests)
        hits = self._fetch(texts)
        responses: list[str | None] = [None] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        for indices in by_options.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
            room = self.max_length - options["max_gen_toks"]
            rows = [self._row(requests[i].args[0], requests[i], texts[i], room, self._prompt) for i in indices]
            costs = self._costs(rows, [hits[i] for i in indices])
            for batch, context, prefix in self._batches(rows, "Generating"):
                answers = self._generate([rows[i] for i in batch], dict(options), context, prefix)
                for i, (text, figures) in zip(batch, answers, strict=True):
                    responses[indices[i]] = measured(text, replace(costs[i], **figures))
        return responses

    def _prompt(self, text: str) -> Row:
        return Row(tuple(self.tok_encode(text)))

    def _generate(self, rows: list[Row], options: dict, context, prefix) -> list[tuple[str, dict]]:
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(options.pop("until", None), eos=eos)
        most = options.pop("max_gen_toks")
        decoding.synchronize(self.device)
        start = perf_counter()
        first = decoding.FirstLogits(self.device)
        inputs = decoding.generation_inputs(self.model, rows, self.tokenizer.pad_token_id, prefix)
        length = inputs["context"].shape[1]
        if context is not None:
            inputs["context_cache"] = context
        output = self._model_generate(
            **inputs, max_length=length + most, stop=stop, logits_processor=[first], **options
        )
        answers = []
        ends = {self.eot_token_id, self.tokenizer.pad_token_id}
        for ids in output[:, length:].tolist():
            end = next((place for place, token in enumerate(ids) if token in ends), None)
            text = postprocess_generated_text(self.tok_decode(ids), stop, None)
            figures = {
                "generated_tokens": len(ids) if end is None else end + 1,
                "time_to_first_token": first.time - start,
            }
            answers.append((text, figures))
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`; each score carries its `cost`."""
        texts = self._texts(requests)
        hits = self._fetch(texts)
        rows = []
        for request, own in zip(requests, texts, strict=True):
            prompt, continuation = request.args
            room = self.max_length + 1 - len(self.tok_encode(continuation, add_special_tokens=False))
            rows.append(self._row(prompt, request, own, room, partial(self._pair, continuation)))
        scored = zip(self._score(rows), self._costs(rows, hits), strict=True)
        return [measured(value, replace(cost, time_to_first_token=seconds)) for (value, seconds), cost in scored]

    def _pair(self, continuation: str, prompt: str) -> Row:
        if prompt:
            ids, target = self._encode_pair(prompt, continuation)
            return Row(tuple(ids), tuple(target))
        target = self.tok_encode(continuation, add_special_tokens=False)
        if target[0] == self.prefix_token_id:
            return Row(tuple(target[:1]), tuple(target[1:]))
        return Row((self.prefix_token_id,), tuple(target))

    def _score(self, rows: Sequence[Row]) -> list[tuple[tuple[float, bool], float]]:
        """((log-probability, is greedy), seconds that its batch took) of each row's continuation."""
        # choices of one token share their input: it goes through the model once
        distinct: dict[tuple, list[int]] = {}
        for index, row in enumerate(rows):
            distinct.setdefault((row.inputs, row.texts, row.prefix, len(row.continuation)), []).append(index)
        groups = list(distinct.values())
        scores: list[tuple[tuple[float, bool], float] | None] = [None] * len(rows)
        for batch, context, prefix in self._batches([rows[group[0]] for group in groups], "Scoring"):
            batch_rows = [rows[groups[i][0]] for i in batch]
            targets = [[rows[index].continuation for index in groups[i]] for i in batch]
            start = perf_counter()
            found = decoding.score(self.model, batch_rows, targets, self.tokenizer.pad_token_id, context, prefix)
            seconds = perf_counter() - start
            for index, value in zip((index for i in batch for index in groups[i]), found, strict=True):
                scores[index] = (value, seconds)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`; in the prompt modes the text follows its contexts, which are not scored."""
        texts = self._texts(requests)
        hits = self._fetch(texts)
        windows = [self._windows(request, own) for request, own in zip(requests, texts, strict=True)]
        scores = iter(self._score([row for rows in windows for row in rows]))
        totals = [sum(next(scores)[0][0] for _ in rows) for rows in windows]
        costs = self._costs([rows[0] for rows in windows], hits)
        return [measured(float(total), cost) for total, cost in zip(totals, costs, strict=True)]

    def _windows(self, request: Instance, texts: Texts) -> list[Row]:
        head: list[int] = []
        if self.context_mode in PROMPT_MODES:
            head = self.tok_encode(joined_contexts(texts))
        room = self.max_length - len(head)
        if room < 2:
            raise ValueError(
                f"the contexts of document {request.doc_id} of task {request.task_name!r} have {len(head)} tokens, "
                f"the model takes {self.max_length}; use context_mode=cross, or leave the task out."
            )
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(request.args[0]),
            prefix_token=self.prefix_token_id,
            max_seq_len=room,
            context_len=1,
        )
        prefix = tuple(head) if self.context_mode == "prompt_kv" else ()
        own = texts if self.context_mode in CROSS_MODES else ()
        pairs = map(make_disjoint_window, windows)
        return [Row((*head, *given), tuple(target), own, prefix, len(head)) for given, target in pairs]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        info = {
            "model_num_parameters": sum(weight.numel() for weight in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "context_mode": self.context_mode,
            "adapter": str(self._adapter) if self._adapter is not None else None,
            "base_model": getattr(self.config, "base_model_name_or_path", None) or self.pretrained,
        }
        if self.context_mode in PROMPT_MODES:
            info["cache_bytes_per_token"] = self._bytes_per_token()
        if hasattr(self.config, "base_model_digest"):
            info["base_model_digest"] = self.config.base_model_digest
        if self.context_mode in CROSS_MODES:
            info["added_digest"] = self.model.added_digest()
        return info | (self.pool.summary() if self.pool is not None else {})


def joined_contexts(texts: tuple[str, ...]) -> str:
    """The contexts as they stand in a prompt, up to the question."""
    return "".join(text + SEPARATOR for text in texts)


def split_prompt(prompt: str, request: Instance) -> tuple[str, str]:
    """`prompt` cut in front of the document's question, where the contexts go.

    Raises:
        ValueError: the document has no question, or the prompt does not hold it.
    """
    question = request.doc.get("question") or ""
    place = prompt.rfind(question) if question else -1
    if place < 0:
        raise ValueError(
            f"the prompt of document {request.doc_id} of task {request.task_name!r} does not hold its `question` "
            f"({question[:60]!r}), so there is no place for its contexts; use context_mode=none or another task."
        )
    return prompt[:place], prompt[place:]
