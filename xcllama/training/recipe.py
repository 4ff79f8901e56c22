"""A recipe: everything that decides what a run computes, from one YAML file, checked before anything is loaded."""

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dataset_builders.tasks import PASSAGE_TASKS

RECIPES = Path(__file__).parent / "recipes"
METHODS = ("cross_attention", "lora_prompt", "lora_closed_book")
TASKS = ("answer", *PASSAGE_TASKS)
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16")
# fields of `optimization` that recipes got later: where they are not used, a run keeps the digest that it had
LATER = ("span_loss", "span_layers", "start_share")


@dataclass(frozen=True)
class ModelSection:
    """What is trained, and on what.

    Args:
        base: folder or Hub id of the frozen decoder; a bare name is looked up in the project's cache of models first.
        encoder: folder or Hub id of a separate encoder (None: the decoder encodes).
        encoder_layers: of `encoder`, the first that are kept (None: all).
        train_encoder: train the layers of `encoder`, never its embeddings.
        attn_implementation: of the decoder's own attention (None: the library's choice; "eager" suits a CPU).
        chat_template: Jinja text instead of the tokenizer's own template.
        init: "self_attention", "random" or "zero", as `from_decoder` takes it.
        transfer_from: folder of trained added weights of another layout to start from; see `transfer.py`.
        follow_steps: steps of a separate encoder on the keys and values of `transfer_from`; see `following.py`.
        least_squares_passages: passages for the closed-form start of k and v (0: keep what `init` gave).
        adapter_from: peft folder of a LoRA on q and v, from which the context adapters of joint mode start; least
            squares then fit the keys and values of the decoder with it.
        start_from: run folder of an earlier stage; its newest weights are where this one starts.
        config: fields of `XCLlamaConfig`.
        lora: fields of peft's `LoraConfig`.
    """

    base: str
    encoder: str | None = None
    encoder_layers: int | None = None
    train_encoder: bool = False
    attn_implementation: str | None = None
    chat_template: str | None = None
    init: str = "self_attention"
    transfer_from: str | None = None
    follow_steps: int = 0
    least_squares_passages: int = 0
    adapter_from: str | None = None
    start_from: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    )


@dataclass(frozen=True)
class DataSection:
    """Where passages and questions come from.

    Args:
        sources: source name (`dataset_builders`) or JSON Lines file of rows -> weight of its questions.
        tasks: task -> weight; "answer" are the sources' own questions, the others are made from any passage.
        max_context_words: longer passages are cut to windows of that many words.
        windows: windows taken from a longer passage.
        max_answer_words: questions with longer answers are left out.
        max_history: earlier turns kept in front of a question.
        distractors: most other passages joined to the right one, drawn from its forward pass; their number varies.
        unanswerable: share of the groups of own questions that read another passage instead, of the same document
            where it has one: their answer is `NO_ANSWER`.
        max_passages: passages read from each source (None: all).
        renamed: passages that are added once more with invented names and numbers.
    """

    sources: dict[str, float]
    tasks: dict[str, float]
    max_context_words: int = 260
    windows: int = 1
    max_answer_words: int = 12
    max_history: int = 2
    distractors: int = 0
    unanswerable: float = 0.0
    max_passages: int | None = None
    renamed: int = 0


@dataclass(frozen=True)
class OptimizationSection:
    """How it is trained; a step is one update of the weights.

    Args:
        passages_per_step, questions_per_passage: the questions of a step, over all processes and accumulated batches.
        accumulate: forward passes that a step is cut into on each process.
        question_loss: weight of the question's own tokens (0: the question is masked).
        span_loss: weight of the loss that draws attention to the answer where the context holds it (0: none).
        span_layers: the cross-attention layers that it draws; needed with `span_loss`.
        start_share: share of the weights of `model.start_from` in those that are exported: an average of both often
            reads unlike data better than either (WiSE-FT, arXiv 2109.01903).
        context_dropout: share of context tokens hidden from a question.
        gate_learning_rate: of the gates (None: `learning_rate`).
    """

    steps: int
    passages_per_step: int = 8
    questions_per_passage: int = 2
    accumulate: int = 1
    learning_rate: float = 1e-3
    gate_learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.02
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    question_loss: float = 0.0
    span_loss: float = 0.0
    span_layers: tuple[int, ...] = ()
    start_share: float = 0.0
    context_dropout: float = 0.1


@dataclass(frozen=True)
class DistillationSection:
    """A teacher that reads the passage in its prompt: the same frozen decoder.

    Args:
        weight: weight of the KL on answer tokens beside the likelihood of the answer.
        hidden_weight: weight of the relative squared distance of hidden states, on every token after the context.
        hidden_layers: indices into `output_hidden_states` where they are compared.
        adapter: peft folder of the teacher (None: the untuned base).
        temperature: of both distributions.
    """

    weight: float = 0.0
    hidden_weight: float = 0.0
    hidden_layers: tuple[int, ...] = ()
    adapter: str | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class RunSection:
    """What does not change the weights: where and how often things are written.

    Args:
        base_id, encoder_id: Hub ids to write into the exported config (None: `model.base`, `model.encoder`).
        stop_step: end after this step, in the middle of the schedule (a stage that another recipe goes on from).
        store_states: compute the states of all passages first and keep them on disk; false: as they are needed.
        keep: newest checkpoints that are kept.
        evaluate_steps: steps between two looks at held-out questions (0: none).
        trackers: of accelerate, as "tensorboard" or "wandb".
    """

    base_id: str | None = None
    encoder_id: str | None = None
    stop_step: int | None = None
    store_states: bool = True
    save_steps: int = 200
    keep: int = 2
    log_steps: int = 20
    evaluate_steps: int = 0
    evaluate_questions: int = 64
    evaluate_source: str = "squad_sample"
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One run; `digest` names what it computes."""

    name: str
    model: ModelSection
    data: DataSection
    optimization: OptimizationSection
    method: str = "cross_attention"
    seed: int = 0
    description: str = ""
    distillation: DistillationSection = DistillationSection()
    run: RunSection = RunSection()

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        data, optimization = self.data, self.optimization
        _one_of("optimization.schedule", optimization.schedule, SCHEDULES)
        _one_of("optimization.precision", optimization.precision, PRECISIONS)
        for name in data.tasks:
            _one_of("data.tasks", name, TASKS)
        for section, weights in (("tasks", data.tasks), ("sources", data.sources)):
            if not weights or min(weights.values()) < 0 or not any(weights.values()):
                raise ValueError(f"`data.{section}` needs weights >= 0 and one above 0, got {weights}.")
        for name in ("steps", "passages_per_step", "questions_per_passage", "accumulate"):
            _at_least(f"optimization.{name}", getattr(optimization, name), 1)
        for name in ("max_context_words", "windows", "max_answer_words"):
            _at_least(f"data.{name}", getattr(data, name), 1)
        _at_least("data.renamed", data.renamed, 0)
        if not 0 <= data.unanswerable < 1:
            raise ValueError(f"`data.unanswerable` must lie in [0, 1), got {data.unanswerable}.")
        for name in ("save_steps", "keep", "log_steps"):
            _at_least(f"run.{name}", getattr(self.run, name), 1)
        if not (optimization.learning_rate > 0 and math.isfinite(optimization.learning_rate)):
            raise ValueError(f"`optimization.learning_rate` must be above 0, got {optimization.learning_rate}.")
        for name in ("warmup", "context_dropout", "start_share"):
            if not 0 <= getattr(optimization, name) < 1:
                raise ValueError(f"`optimization.{name}` must lie in [0, 1), got {getattr(optimization, name)}.")
        if self.distilled and (self.method != "cross_attention" or self.model.encoder is not None):
            raise ValueError(
                f"`distillation` needs method 'cross_attention' and no `model.encoder`, got {self.method!r} and "
                f"{self.model.encoder!r}."
            )
        if bool(self.distillation.hidden_weight) != bool(self.distillation.hidden_layers):
            raise ValueError("`distillation.hidden_weight` and `distillation.hidden_layers` go together.")
        if optimization.start_share and self.model.start_from is None:
            raise ValueError(f"`optimization.start_share` ({optimization.start_share}) needs `model.start_from`.")
        if optimization.span_loss:
            layers = self.model.config.get("cross_attention_layers") or ()
            if not optimization.span_layers or not set(optimization.span_layers) <= set(layers):
                raise ValueError(
                    "`optimization.span_loss` needs `span_layers`, some of `model.config.cross_attention_layers` "
                    f"({list(layers)}), got {list(optimization.span_layers)}."
                )
            if self.model.config.get("cross_attention_share_weights"):
                raise ValueError("`optimization.span_loss` needs a block of its own for each layer.")
        if self.model.follow_steps and not (self.model.train_encoder and self.model.transfer_from):
            raise ValueError("`model.follow_steps` needs `model.train_encoder` and `model.transfer_from`.")
        if self.model.train_encoder and self.model.encoder is None:
            raise ValueError("`model.train_encoder` needs `model.encoder`; the decoder itself is never trained.")
        if self.model.transfer_from is not None and not self.model.least_squares_passages:
            raise ValueError("`model.transfer_from` needs `model.least_squares_passages` above 0.")
        if self.model.start_from is not None and (self.model.transfer_from or self.model.least_squares_passages):
            raise ValueError("`model.start_from` brings all weights: no `transfer_from`, no `least_squares_passages`.")
        if "squad_sample" in data.sources:
            raise ValueError("`data.sources` must not hold squad_sample: it is for evaluation only.")

    @property
    def distilled(self) -> bool:
        """Whether a teacher is followed."""
        return bool(self.distillation.weight or self.distillation.hidden_weight)

    @property
    def digest(self) -> str:
        """Digest of all that decides the weights: every field but `run` and `description`."""
        fields = dataclasses.asdict(self)
        fields = {name: value for name, value in fields.items() if name not in ("run", "description")}
        for name in LATER:
            if not fields["optimization"][name]:
                del fields["optimization"][name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; what it does not say is as in the file beside it that its `extends` names, field by field.

    Args:
        path: a YAML file, or the name of a recipe of this project.

    Raises:
        ValueError: no such file, no mapping, an unknown or missing field, a value out of range.
    """
    return recipe_from_dict(_read(Path(path)))


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe file."""
    if path.resolve() in extended_by:
        raise ValueError(f"`extends` goes in a circle: {' -> '.join(file.name for file in (*extended_by, path))}.")
    if not path.is_file():
        known = {file.stem: file for file in RECIPES.glob("*.yaml")}
        if str(path) in known:
            return _read(known[str(path)], extended_by)
        raise ValueError(f"No recipe file {str(path)!r}; recipes of this project: {', '.join(sorted(known))}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(values, dict) or "extends" not in values:
        return values
    other = _read(path.parent / values.pop("extends"), (*extended_by, path.resolve()))
    merged = other | values
    for name in set(other) & set(values):
        if isinstance(other[name], dict) and isinstance(values[name], dict):
            merged[name] = other[name] | values[name]
    return merged


def recipe_from_dict(values: Any) -> Recipe:
    """A recipe from plain values, with the same checks."""
    return _build(Recipe, values, "recipe")


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"`{where}` must be a mapping, got {type(values).__name__}.")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"`{where}` has no field {unknown[0]!r}; its fields are {', '.join(fields)}.")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        arguments[name] = _value(hints[name], value, f"{where}.{name}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"`{where}` lacks {', '.join(missing)}.")
    return kind(**arguments)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{where}` must be a list, got {value!r}.")
        return tuple(value)
    allowed = tuple(
        typing.get_origin(option) or option
        for option in (options if origin and origin is not dict else (origin or hint,))
    )
    # YAML reads 1e-3 as a string and 1 as an integer
    if float in allowed and (isinstance(value, int | str) and not isinstance(value, bool)):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"`{where}` must be a number, got {value!r}.") from None
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("null" if item is type(None) else item.__name__ for item in allowed)
        raise ValueError(f"`{where}` must be {names}, got {value!r}.")
    return value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
