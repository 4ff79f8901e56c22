"""A recipe: everything that decides what a run computes, from one YAML file, checked before anything is loaded."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from dataset_builders.tasks import PASSAGE_TASKS

RECIPES = Path(__file__).parent / "recipes"

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True)]
# text too: YAML reads 1e-3 as such
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


# values that are checked once and never change; a name that is no field is refused
section = dataclass(frozen=True, config=ConfigDict(extra="forbid"))


@section
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
    encoder_layers: Positive | None = None
    train_encoder: bool = False
    attn_implementation: str | None = None
    chat_template: str | None = None
    init: Literal["self_attention", "random", "zero"] = "self_attention"
    transfer_from: str | None = None
    follow_steps: Count = 0
    least_squares_passages: Count = 0
    adapter_from: str | None = None
    start_from: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    )


@section
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
        max_passages: passages read from each source (None: all).
        renamed: passages that are added once more with invented names and numbers.
    """

    sources: dict[str, Weight]
    tasks: dict[Literal["answer", *PASSAGE_TASKS], Weight]
    max_context_words: Positive = 260
    windows: Positive = 1
    max_answer_words: Positive = 12
    max_history: Count = 2
    distractors: Count = 0
    max_passages: Positive | None = None
    renamed: Count = 0


@section
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

    steps: Positive
    passages_per_step: Positive = 8
    questions_per_passage: Positive = 2
    accumulate: Positive = 1
    learning_rate: Rate = 1e-3
    gate_learning_rate: Rate | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.02
    weight_decay: Weight = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    max_grad_norm: Rate = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    question_loss: Weight = 0.0
    span_loss: Weight = 0.0
    span_layers: tuple[Count, ...] = ()
    start_share: Share = 0.0
    context_dropout: Share = 0.1


@section
class DistillationSection:
    """A teacher that reads the passage in its prompt: the same frozen decoder.

    Args:
        weight: weight of the KL on answer tokens beside the likelihood of the answer.
        hidden_weight: weight of the relative squared distance of hidden states, on every token after the context.
        hidden_layers: indices into `output_hidden_states` where they are compared.
        adapter: peft folder of the teacher (None: the untuned base).
        temperature: of both distributions.
    """

    weight: Weight = 0.0
    hidden_weight: Weight = 0.0
    hidden_layers: tuple[Index, ...] = ()
    adapter: str | None = None
    temperature: Rate = 1.0


@section
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
    stop_step: Positive | None = None
    store_states: bool = True
    save_steps: Positive = 200
    keep: Positive = 2
    log_steps: Positive = 20
    evaluate_steps: Count = 0
    evaluate_questions: Positive = 64
    evaluate_source: str = "squad_sample"
    trackers: tuple[str, ...] = ()


@section
class Recipe:
    """One run; `digest` names what it computes."""

    name: str
    model: ModelSection
    data: DataSection
    optimization: OptimizationSection
    method: Literal["cross_attention", "lora_prompt", "lora_closed_book"] = "cross_attention"
    seed: Index = 0
    description: str = ""
    distillation: DistillationSection = DistillationSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for message in (*self._data_faults(), *self._model_faults(), *self._loss_faults()):
            raise ValueError(message)
        return self

    def _data_faults(self) -> Iterator[str]:
        for name, weights in (("tasks", self.data.tasks), ("sources", self.data.sources)):
            if not any(weights.values()):
                yield f"`data.{name}` needs weights and one above 0, got {weights}."
        if "squad_sample" in self.data.sources:
            yield "`data.sources` must not hold squad_sample: it is for evaluation only."

    def _model_faults(self) -> Iterator[str]:
        model = self.model
        if model.train_encoder and model.encoder is None:
            yield "`model.train_encoder` needs `model.encoder`; the decoder itself is never trained."
        if model.follow_steps and not (model.train_encoder and model.transfer_from):
            yield "`model.follow_steps` needs `model.train_encoder` and `model.transfer_from`."
        if model.transfer_from is not None and not model.least_squares_passages:
            yield "`model.transfer_from` needs `model.least_squares_passages` above 0."
        if model.start_from is not None and (model.transfer_from or model.least_squares_passages):
            yield "`model.start_from` brings all weights: no `transfer_from`, no `least_squares_passages`."
        if self.optimization.start_share and model.start_from is None:
            yield f"`optimization.start_share` ({self.optimization.start_share}) needs `model.start_from`."

    def _loss_faults(self) -> Iterator[str]:
        if self.distilled and (self.method != "cross_attention" or self.model.encoder is not None):
            yield (
                f"`distillation` needs method 'cross_attention' and no `model.encoder`, got {self.method!r} and "
                f"{self.model.encoder!r}."
            )
        if bool(self.distillation.hidden_weight) != bool(self.distillation.hidden_layers):
            yield "`distillation.hidden_weight` and `distillation.hidden_layers` go together."
        if not self.optimization.span_loss:
            return
        layers, drawn = self.model.config.get("cross_attention_layers") or (), self.optimization.span_layers
        if not drawn or not set(drawn) <= set(layers):
            yield (
                "`optimization.span_loss` needs `span_layers`, some of `model.config.cross_attention_layers` "
                f"({list(layers)}), got {list(drawn)}."
            )
        if self.model.config.get("cross_attention_share_weights"):
            yield "`optimization.span_loss` needs a block of its own for each layer."

    @property
    def distilled(self) -> bool:
        """Whether a teacher is followed."""
        return bool(self.distillation.weight or self.distillation.hidden_weight)

    @property
    def digest(self) -> str:
        """Digest of all that decides the weights: what is not at its default, but `run` and `description`."""
        fields = RECIPE.dump_python(self, mode="json", exclude={"run", "description"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file holds them."""
        return RECIPE.dump_python(self, mode="json")


RECIPE = TypeAdapter(Recipe)


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
    """A recipe from plain values.

    Raises:
        ValueError: a line for each fault: the field, the rule and the value.
    """
    try:
        return RECIPE.validate_python(values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    raise ValueError("\n".join(map(_told, faults)))


def _told(fault: dict[str, Any]) -> str:
    """One fault that pydantic found, as a sentence."""
    *sections, name = ("recipe", *fault["loc"])
    where = ".".join(map(str, sections))
    if fault["type"] == "missing":
        return f"`{where}` lacks {name}."
    if fault["type"] == "unexpected_keyword_argument":
        kind = Recipe
        for part in sections[1:]:
            kind = kind.__annotations__[part]
        return f"`{where}` has no field {name!r}; its fields are {', '.join(kind.__annotations__)}."
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return f"`{'.'.join(map(str, (*sections, name)))}`: {fault['msg']}, got {fault['input']!r:.80}."
