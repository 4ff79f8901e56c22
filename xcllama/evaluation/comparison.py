"""Every way to give a model its texts, on the same questions; what was answered is kept, question by question.

OUTPUT/SOURCE-SPLIT/MODEL/{cross, cross_int8, ...}.jsonl     one line a question
OUTPUT/SOURCE-SPLIT/MODEL/{cross, cross_int8, ...}.json      what the run was, and what it cost
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from xcllama.durable import write_text
from xcllama.evaluation.metrics import ANSWER_METRICS
from xcllama.evaluation.questions import Shelf, has_absent, read_questions
from xcllama.evaluation.reader import Reader, Request
from xcllama.provenance import write_result

logger = logging.getLogger(__name__)
MEASURED = ("modeling_xcllama", "dataset_builders", "xcllama/evaluation")


@dataclass(frozen=True)
class Method:
    """A way to ask.

    Args:
        model: which of `Models` answers.
        reads: where it finds the texts: "cache", "prompt" or "nothing".
        passage, documents: the texts, see `Shelf.texts_of`.
        cache_dtype: of the cached states; None: nothing is cached.
    """

    model: str
    reads: str
    passage: str = "right"
    documents: int = 1
    cache_dtype: str | None = None


def _cached(cache_dtype: str = "bfloat16", **options) -> Method:
    return Method("checkpoints", "cache", cache_dtype=cache_dtype, **options)


METHODS = {
    "none": Method("base", "nothing"),
    "prompt": Method("base", "prompt"),
    "lora_closed_book": Method("lora_closed_book", "nothing"),
    "lora_prompt": Method("lora_prompt", "prompt"),
    "cross": _cached(),
    "cross_joined4": _cached(documents=4),
    "cross_joined16": _cached(documents=16),
    "cross_int8": _cached("int8"),
    "cross_int4": _cached("int4"),
    "cross_shuffled": _cached(passage="other"),
    "cross_absent": _cached(passage="absent"),
    "lora_prompt_absent": Method("lora_prompt", "prompt", passage="absent"),
    "lora_prompt_joined4": Method("lora_prompt", "prompt", documents=4),
    "lora_prompt_joined16": Method("lora_prompt", "prompt", documents=16),
}
# what takes most of the time of all; asked for by name
SLOW = ("lora_prompt_joined4", "lora_prompt_joined16")
MODES = {"lora_prompt": "LoRA / prompt", "lora_closed_book": "LoRA / none"}


@dataclass(frozen=True)
class Models:
    """Folders or Hub ids of what is compared.

    Args:
        checkpoints: folders of added weights; the untuned baselines are the first one's base.
        lora_prompt, lora_closed_book: peft adapters that were trained with and without the contexts.
    """

    checkpoints: Sequence[str]
    lora_prompt: str | None = None
    lora_closed_book: str | None = None

    def of(self, method: str) -> Sequence[str]:
        """The models that a method is measured on.

        Raises:
            ValueError: an unknown method, or one whose model is not given.
        """
        kind = METHODS[method].model if method in METHODS else None
        found = {"checkpoints": self.checkpoints, "base": self.checkpoints[:1]}.get(kind)
        if found is None:
            found = [folder] if (folder := kind and getattr(self, kind)) else []
        if not found:
            raise ValueError(f"method {method!r} is unknown or lacks its model; known are {', '.join(METHODS)}.")
        return found

    def default_methods(self, source: str) -> list[str]:
        """All methods whose model and questions are there, but for the slow ones."""
        given = {"checkpoints", "base"} | {kind for kind in MODES if getattr(self, kind)}
        passages = {"right", "other", "absent"} if has_absent(source) else {"right", "other"}
        return [
            name
            for name, method in METHODS.items()
            if method.model in given and method.passage in passages and name not in SLOW
        ]


@dataclass(frozen=True)
class Settings:
    """What all methods of a comparison share.

    Args:
        source, split, path: of the questions, see `read_source`.
        limit: so many questions, of a sample that is always the same; None: all.
        seed: of the texts that are drawn beside a question's own.
        max_new_tokens: most tokens of an answer.
    """

    source: str
    split: str
    path: str | None = None
    limit: int | None = None
    seed: int = 0
    max_new_tokens: int = 24


def compare(
    models: Models,
    methods: Sequence[str],
    settings: Settings,
    output: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Path]:
    """Answer the questions with every method; what these weights answered under these settings is not run again.

    Returns:
        The JSON of each run.

    Raises:
        ValueError: see `Models.of` and `read_questions`.
    """
    planned: dict[str, list[str]] = {}
    for method in methods:
        for folder in models.of(method):
            planned.setdefault(folder, []).append(method)
    questions = read_questions(settings.source, settings.split, settings.path)
    shelf, asked = Shelf(questions, settings.seed), questions[: settings.limit]
    place = output / f"{settings.source}-{settings.split}"
    written = []
    for folder, own in planned.items():
        load = _Loaded(folder, dtype, device, settings.max_new_tokens)
        for method in own:
            name, digest = identity(folder, METHODS[method].model == "base")
            path = place / name / f"{method}.json"
            key = {"weights": digest, "dtype": str(dtype), **asdict(settings), **asdict(METHODS[method])}
            if not _is_done(path, key):
                _run(METHODS[method], shelf, asked, load(), path, {"method": method, "model": name, "key": key})
            written.append(path)
    return written


def identity(folder: str, base: bool = False) -> tuple[str, str]:
    """(name, digest) of the weights in a folder, or of the base alone that a checkpoint was trained on.

    The chat template counts: it is part of every prompt.
    """
    digest, config = (
        hashlib.sha256(folder.encode() if not Path(folder).is_dir() else b""),
        Path(folder) / "config.json",
    )
    saved = json.loads(config.read_text()) if base and config.is_file() else {}
    if saved.get("base_model_digest"):
        name = Path(saved["base_model_name_or_path"]).name
        digest.update(saved["base_model_digest"].encode())
    else:
        name = Path(folder).name
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    if (template := Path(folder) / "chat_template.jinja").is_file():
        digest.update(template.read_bytes())
    return name, digest.hexdigest()


class _Loaded:
    """A reader that is loaded when it is first called for."""

    def __init__(self, folder: str, dtype: torch.dtype, device: str, max_new_tokens: int):
        self._arguments, self._options = (folder, dtype, device), {"max_new_tokens": max_new_tokens}
        self._reader: Reader | None = None

    def __call__(self) -> Reader:
        self._reader = self._reader or Reader.load(*self._arguments, **self._options)
        return self._reader


def _is_done(path: Path, key: dict[str, Any]) -> bool:
    return path.is_file() and json.loads(path.read_text())["key"] == key


def _run(method: Method, shelf: Shelf, questions: Sequence, reader: Reader, path: Path, run: dict[str, Any]) -> None:
    """Answer, score and write; the JSON last, since it says that all is there."""
    asked = [question for question in questions if method.passage != "absent" or question.absent is not None]
    requests = [Request(q, shelf.texts_of(q, method.passage, method.documents)) for q in asked]
    start = perf_counter()
    answers = reader.answer(requests, method.reads, method.cache_dtype or "bfloat16")
    seconds = perf_counter() - start
    lines = []
    for request, answer in zip(requests, answers, strict=True):
        accepted = request.question.answers
        scores = {name: metric(answer.text, accepted, request.texts) for name, metric in ANSWER_METRICS.items()}
        record = {"id": request.question.id, "question": request.question.question, "answers": accepted}
        record |= {"prediction": answer.text, **scores, "answer_loss": answer.loss}
        record |= {"token_scores": [round(score, 5) for score in answer.token_scores]}
        record |= {"context_tokens": answer.context_tokens, "prompt_tokens": answer.prompt_tokens}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".jsonl"), "".join(lines))
    config = reader.model.config
    run |= {
        "base": getattr(config, "base_model_name_or_path", None) or config._name_or_path,
        "added_digest": reader.model.added_digest() if hasattr(reader.model, "added_digest") else None,
        "seconds_per_question": seconds / len(requests),
        **reader.bytes_per_token(method.reads, method.cache_dtype or "bfloat16"),
    }
    write_result(path, run, MEASURED, seed=shelf.seed)
    logger.info(f"{path}: {len(requests)} questions, {seconds / len(requests):.2f} s each")
