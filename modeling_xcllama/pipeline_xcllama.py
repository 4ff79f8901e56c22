"""The pipeline "context-question-answering": contexts and questions in; answers, their places, and the cache, out."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import AutoModelForCausalLM, GenerationConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .answer_scores import NOT_FOUND, judge, surest
from .context_cache import ContextCache, ProjectedContext
from .evidence import find_evidence
from .passages import find_sentence, rank_passages, split_passages

TASK = "context-question-answering"
# passages that a question reads, each by itself
NUM_PASSAGES = 4


class ContextQuestionAnsweringPipeline(Pipeline):
    """Answers questions from contexts that are encoded once; `pipeline(TASK, model=repo, trust_remote_code=True)`."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=64, do_sample=False)

    def __call__(
        self,
        questions: str | Sequence[str],
        contexts: str | Sequence[str | Sequence[str]] | None = None,
        context_cache: ContextCache | ProjectedContext | None = None,
        **kwargs,
    ) -> dict:
        """Answer `questions`.

        Contexts are read passage by passage: longer texts are split, the passages that fit a question best are read
        each by itself, and the surest answer is given.

        Args:
            questions: one or several.
            contexts: one text that all questions read; or, for each question, a text or several.
            context_cache: instead of encoding: row i for question i, or one row that all questions read. The documents
                of a row are its passages; `contexts` beside it are their texts (without them: what their tokens say).
                Keys and values (`project_context`) are read together, as they are.
            kwargs: `num_passages` (most passages that a question reads, each by itself; None: all texts of a question
                are read together, whole), `num_evidence` (spans that were attended to, to return with each answer;
                needs `contexts` and a fast tokenizer), or anything that `generate` takes.

        Returns:
            "answers": for each question a dict of "answer", "score" (see `answer_scores.answer_score`), "found"
            (False: the score is below the config's `answer_threshold`, and "answer" says so), "sentence" (text,
            "document" of the question's contexts, and its characters "start" to "end" there: where the answer comes
            from), "passages" (what was read, in the order of the search: the same places, and each one's own answer
            and score) and, if asked for, "evidence". "cache": row i is what question i may read, to be passed back in.

        Raises:
            ValueError: neither `contexts` nor `context_cache`, no text in `contexts`, counts that differ, or evidence
                that cannot be found.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        if contexts is None and context_cache is None:
            raise ValueError("give `contexts`, `context_cache`, or a cache and its texts.")
        if kwargs.get("num_evidence", self._postprocess_params.get("num_evidence")):
            if contexts is None:
                raise ValueError("`num_evidence` needs the texts: pass `contexts`.")
            if not self.processor.context_tokenizer.is_fast:
                raise ValueError(
                    "`num_evidence` needs a fast tokenizer: a slow one knows no characters of its tokens."
                )
        shared = isinstance(contexts, str)
        given = [contexts] if shared else contexts
        num_rows = len(given if context_cache is None else context_cache)
        if num_rows != len(questions) and not (num_rows == 1 and (shared or context_cache is not None)):
            raise ValueError(f"{len(questions)} questions need as many contexts, or one for all, got {num_rows}.")
        groups = None if given is None else [[group] if isinstance(group, str) else list(group) for group in given]
        if context_cache is not None and groups is not None:
            counts = [len(row) for row in getattr(context_cache, "cache", context_cache).rows]
            if counts != [len(group) for group in groups]:
                raise ValueError(f"`contexts` must have the texts of the cache's documents, row by row: {counts}.")
        inputs = {"questions": questions, "contexts": groups, "context_cache": context_cache}
        # a dict is one item for the base class: the whole batch runs at once
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, num_evidence: int | None = None, **generate_kwargs):
        # None says something: what is not given is not in the call
        reading = {"num_passages": generate_kwargs.pop("num_passages")} if "num_passages" in generate_kwargs else {}
        if (most := reading.get("num_passages")) is not None and most < 1:
            raise ValueError(f"`num_passages` must be at least 1, or None to read all together, got {most}.")
        forward = reading | ({"generate_kwargs": generate_kwargs} if generate_kwargs else {})
        return reading, forward, {} if num_evidence is None else {"num_evidence": num_evidence}

    def preprocess(self, inputs: dict, num_passages: int | None = NUM_PASSAGES) -> dict:
        """Texts to passages (text, document of the question, first character), and their ids."""
        questions, groups, cache = inputs["questions"], inputs["contexts"], inputs["context_cache"]
        encoded = {"questions": questions, "context_cache": cache}
        if groups is None:
            return encoded | {"passages": self._decoded(cache)}
        spans = {text: [(0, len(text))] for group in groups for text in group}
        if not spans:
            raise ValueError("`contexts` has no text for any question; `generate` answers without a context.")
        if num_passages is not None and cache is None:
            spans = {text: split_passages(text, self._count_tokens) or own for text, own in spans.items()}
        passages = [
            [(text[start:stop], document, start) for document, text in enumerate(group) for start, stop in spans[text]]
            for group in groups
        ]
        # equal passages are encoded once
        texts = list(dict.fromkeys(text for group in passages for text, _, _ in group))
        encoded["rows"] = [[texts.index(text) for text, _, _ in group] for group in passages]
        offsets = {"return_offsets_mapping": self.processor.context_tokenizer.is_fast}
        return encoded | {"passages": passages} | dict(self.processor(contexts=texts, return_tensors="pt", **offsets))

    def _count_tokens(self, text: str) -> int:
        return len(self.processor.context_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decoded(self, cache: ContextCache | ProjectedContext) -> list[list[tuple[str, int, int]]]:
        """The documents of the rows as text, as far as their token ids tell."""
        cache = getattr(cache, "cache", cache)
        spans = [cache.token_ids[start:stop] for start, stop in zip(cache.offsets, cache.offsets[1:], strict=False)]
        decode = self.processor.context_tokenizer.decode
        texts = {document: decode(spans[document], skip_special_tokens=True) for row in cache.rows for document in row}
        return [[(texts[number], place, 0) for place, number in enumerate(row)] for row in cache.rows]

    def _forward(
        self, model_inputs: dict, num_passages: int | None = NUM_PASSAGES, generate_kwargs: dict | None = None
    ) -> dict:
        questions, cache, passages = (model_inputs[name] for name in ("questions", "context_cache", "passages"))
        if cache is None:
            encoding = model_inputs["context_input_ids"], model_inputs["context_attention_mask"]
            cache = self.model.encode_context(*encoding).join(model_inputs["rows"])
        if len(cache) != len(questions):
            cache, passages = cache.select([0] * len(questions)), passages * len(questions)
        # (question, passages that are read together)
        together = num_passages is None or not hasattr(cache, "states")
        readings = [
            (number, places)
            for number, own in enumerate(passages)
            for places in ([list(range(len(own)))] if together else _chosen(questions[number], own, num_passages))
        ]
        read = cache
        if not together:
            rows = tuple(tuple(cache.rows[number][place] for place in places) for number, places in readings)
            read = replace(cache, rows=rows)
        self.processor.check_prefix(self.model.config.context_prefix)
        inputs = self.processor(text=[questions[number] for number, _ in readings], return_tensors="pt")
        prompts = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        projected = self.model.model.resolve_context(read, None, None, len(readings))
        options = self._prepare_generate_kwargs(
            generate_kwargs or {}, return_dict_in_generate=True, output_scores=True
        )
        outputs = self.model.generate(**prompts, context_cache=projected, **options)
        if outputs.sequences.shape[0] != len(readings):
            raise ValueError("one answer a question: leave `num_return_sequences` at 1.")
        decode = partial(self.processor.decode, skip_special_tokens=True)
        length = prompts["input_ids"].shape[1]
        return {
            "judged": judge(self.model, decode, outputs, length, options.get("eos_token_id")),
            "readings": readings,
            "passages": passages,
            "cache": getattr(cache, "cache", cache),
            "sequences": outputs.sequences,
            "prompts": prompts,
            "projected": projected,
            "inputs": model_inputs,
        }

    def postprocess(self, model_outputs: dict, num_evidence: int = 0) -> dict:
        """Of each question the surest answer, and where it comes from."""
        readings, judged = model_outputs["readings"], model_outputs["judged"]
        weights = self._attended(model_outputs) if num_evidence else None
        answers = []
        for number, own in enumerate(model_outputs["passages"]):
            rows = [row for row, (question, _) in enumerate(readings) if question == number]
            row = rows[surest([judged[row] for row in rows])]
            answer = dict(judged[row])
            read = [own[place] for place in readings[row][1]]
            question = model_outputs["inputs"]["questions"][number]
            if read:
                found = find_sentence([text for text, _, _ in read], question, answer["answer"])
                answer |= _place(read[found[0]], *found[1:])
            answer["passages"] = [
                _place(own[place], 0, len(own[place][0]), "text") | judged[row]
                for row in rows
                for place in readings[row][1]
            ]
            if not answer["found"]:
                answer["answer"] = NOT_FOUND
            if num_evidence:
                answer["evidence"] = self._evidence(weights[row], read, model_outputs["inputs"], num_evidence)
            answers.append(answer)
        return {"answers": answers, "cache": model_outputs["cache"]}

    def _attended(self, outputs: dict):
        device, prompts = self.model.device, outputs["prompts"]
        return self.model.context_weights(
            outputs["sequences"].to(device),
            outputs["projected"],
            prompts["input_ids"].shape[1],
            prompts["attention_mask"].to(device),
        )

    def _evidence(self, weights, read: Sequence[tuple[str, int, int]], inputs: dict, num_evidence: int) -> list[dict]:
        """Spans of the passages that were read, in the characters of the documents that they were cut from."""
        texts = list(dict.fromkeys(text for group in inputs["passages"] for text, _, _ in group))
        masks = inputs["context_attention_mask"].bool()
        places = [texts.index(text) for text, _, _ in read]
        mappings = [inputs["context_offset_mapping"][place][masks[place]] for place in places]
        spans = find_evidence(weights, mappings, [text for text, _, _ in read], num_spans=num_evidence)
        return [
            vars(replace(span, document=document, start=span.start + start, end=span.end + start))
            for span in spans
            for _, document, start in [read[span.document]]
        ]


def _chosen(question: str, passages: Sequence[tuple[str, int, int]], num_passages: int) -> list[list[int]]:
    """The passages that a question reads, each by itself; one reading of nothing where there are none."""
    ranked = rank_passages(question, [text for text, _, _ in passages], num_passages)
    return [[place] for place in ranked] or [[]]


def _place(passage: tuple[str, int, int], start: int, stop: int, name: str = "sentence") -> dict:
    """Characters of a passage as those of the document that it was cut from."""
    text, document, first = passage
    return {name: text[start:stop], "document": document, "start": first + start, "end": first + stop}


def custom_pipelines(module: str) -> dict:
    """What a config says of the pipeline, whose class stands in the file `module` beside it."""
    return {TASK: {"impl": f"{module}.ContextQuestionAnsweringPipeline", "pt": ["AutoModelForCausalLM"]}}


def register_pipeline() -> None:
    """Let `pipeline(TASK, model=model, processor=processor)` find the class."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, ContextQuestionAnsweringPipeline, pt_model=AutoModelForCausalLM)
