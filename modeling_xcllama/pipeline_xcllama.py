"""The pipeline "context-question-answering": contexts and questions in; answers with scores, and the cache, out."""

from collections.abc import Sequence

from transformers import AutoModelForCausalLM, GenerationConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .answer_scores import NOT_FOUND, answer_score, is_found, token_scores, unanswerable_probabilities
from .context_cache import ContextCache, ProjectedContext
from .evidence import find_evidence

TASK = "context-question-answering"


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

        Args:
            questions: one or several.
            contexts: one text that all questions read; or, for each question, a text or several.
            context_cache: instead of `contexts`: row i for question i, or one row that all questions read.
            kwargs: `num_evidence` (spans of the contexts to return with each answer, needs `contexts` and a fast
                tokenizer), or anything that `generate` takes.

        Returns:
            "answers": for each question a dict of "answer", "score" (see `answer_scores.answer_score`), "found"
            (False: the score is below the config's `answer_threshold`, and "answer" says so) and, if asked for,
            "evidence"; "cache": row i is what question i read, to be passed back in.

        Raises:
            ValueError: not exactly one of `contexts` and `context_cache`, no text in `contexts`, counts that differ,
                or evidence that cannot be found.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        if (contexts is None) == (context_cache is None):
            raise ValueError("give exactly one of `contexts` and `context_cache`.")
        if kwargs.get("num_evidence", self._postprocess_params.get("num_evidence")):
            if contexts is None:
                raise ValueError("`num_evidence` needs the texts: pass `contexts`.")
            if not self.processor.context_tokenizer.is_fast:
                raise ValueError(
                    "`num_evidence` needs a fast tokenizer: a slow one knows no characters of its tokens."
                )
        shared = isinstance(contexts, str)
        given = [contexts] if shared else contexts
        num_rows = len(context_cache if contexts is None else given)
        if num_rows != len(questions) and not (num_rows == 1 and (shared or contexts is None)):
            raise ValueError(f"{len(questions)} questions need as many contexts, or one for all, got {num_rows}.")
        inputs = {"questions": questions, "contexts": given, "context_cache": context_cache}
        # a dict is one item for the base class: the whole batch runs at once
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, num_evidence: int | None = None, **generate_kwargs):
        forward = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        return {}, forward, {} if num_evidence is None else {"num_evidence": num_evidence}

    def preprocess(self, inputs: dict) -> dict:
        """Questions to ids, distinct texts to ids, and which of them each question reads."""
        questions, contexts = inputs["questions"], inputs["contexts"]
        encoded = {"context_cache": inputs["context_cache"], "texts": None}
        encoded["inputs"] = dict(self.processor(text=questions, return_tensors="pt"))
        if contexts is None:
            return encoded
        groups = [[group] if isinstance(group, str) else list(group) for group in contexts]
        texts = list(dict.fromkeys(text for group in groups for text in group))
        if not texts:
            raise ValueError("`contexts` has no text for any question; `generate` answers without a context.")
        encoded["texts"] = texts
        encoded["groups"] = [[texts.index(text) for text in group] for group in groups]
        offsets = {"return_offsets_mapping": self.processor.context_tokenizer.is_fast}
        return encoded | dict(self.processor(contexts=texts, return_tensors="pt", **offsets))

    def _forward(self, model_inputs: dict, generate_kwargs: dict | None = None) -> dict:
        cache = model_inputs["context_cache"]
        prompts = model_inputs["inputs"]
        batch, prompt_length = prompts["input_ids"].shape
        if cache is None:
            encoding = model_inputs["context_input_ids"], model_inputs["context_attention_mask"]
            cache = self.model.encode_context(*encoding).join(model_inputs["groups"])
        cache = cache if len(cache) == batch else cache.select([0] * batch)
        projected = self.model.model.resolve_context(cache, None, None, batch)
        options = self._prepare_generate_kwargs(
            generate_kwargs or {}, return_dict_in_generate=True, output_scores=True
        )
        outputs = self.model.generate(**prompts, context_cache=projected, **options)
        return {
            "sequences": outputs.sequences,
            "scores": token_scores(self.model, outputs, options.get("eos_token_id")),
            "unanswerable": unanswerable_probabilities(self.model, outputs),
            "prompt_length": prompt_length,
            "attention_mask": prompts["attention_mask"],
            "projected": projected,
            "inputs": model_inputs,
        }

    def postprocess(self, model_outputs: dict, num_evidence: int = 0) -> dict:
        """Answers, scores and, if asked for, evidence."""
        sequences, start = model_outputs["sequences"], model_outputs["prompt_length"]
        projected = model_outputs["projected"]
        if sequences.shape[0] != len(projected):
            raise ValueError("one answer a question: leave `num_return_sequences` at 1.")
        answers = []
        parts = sequences[:, start:], model_outputs["scores"], model_outputs["unanswerable"]
        for tokens, scores, unanswerable in zip(*parts, strict=True):
            answer = self.processor.decode(tokens[: len(scores)], skip_special_tokens=True).strip()
            score = answer_score(scores, unanswerable)
            found = is_found(score, self.model.config.answer_threshold)
            answers.append({"answer": answer if found else NOT_FOUND, "score": score, "found": found})
        if num_evidence:
            self._add_evidence(answers, model_outputs, num_evidence)
        return {"answers": answers, "cache": projected.cache}

    def _add_evidence(self, answers: list[dict], outputs: dict, num_evidence: int) -> None:
        inputs, device = outputs["inputs"], self.model.device
        weights = self.model.context_weights(
            outputs["sequences"].to(device),
            outputs["projected"],
            outputs["prompt_length"],
            outputs["attention_mask"].to(device),
        )
        masks = inputs["context_attention_mask"].bool()
        mappings = [offsets[mask] for offsets, mask in zip(inputs["context_offset_mapping"], masks, strict=True)]
        groups = inputs["groups"] if len(inputs["groups"]) == len(answers) else inputs["groups"] * len(answers)
        for answer, row, group in zip(answers, weights, groups, strict=True):
            texts = [inputs["texts"][text] for text in group]
            spans = find_evidence(row, [mappings[text] for text in group], texts, num_spans=num_evidence)
            answer["evidence"] = [vars(span) for span in spans]


def custom_pipelines(module: str) -> dict:
    """What a config says of the pipeline, whose class stands in the file `module` beside it."""
    return {TASK: {"impl": f"{module}.ContextQuestionAnsweringPipeline", "pt": ["AutoModelForCausalLM"]}}


def register_pipeline() -> None:
    """Let `pipeline(TASK, model=model, processor=processor)` find the class."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, ContextQuestionAnsweringPipeline, pt_model=AutoModelForCausalLM)
