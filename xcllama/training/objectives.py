"""What is minimized: likelihood of the answer and, where a recipe asks for them, more.

The likelihood of the question, attention to where the answer stands in the context, and how far a model is from its
teacher, which reads the passage in its prompt: KL on the answer, distance of hidden states on every token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from modeling_xcllama.context_cache import ContextCache, ProjectedContext
from modeling_xcllama.context_projection import ReadingPlan
from modeling_xcllama.cross_attention import ContextRows
from xcllama.training.batch import Batch
from xcllama.training.build import in_frozen_precision
from xcllama.training.recipe import Recipe
from xcllama.training.teacher import Teacher

# attention of a block that rests on the answer, as a mean over heads, from which on more is not asked for
SPAN_ATTENTION = 0.5


@dataclass
class Losses:
    """Sums over the tokens of a batch.

    Args:
        objective: what is minimized.
        answer: cross-entropy of the answer tokens.
    """

    objective: Tensor
    answer: Tensor


class Objective(nn.Module):
    """A model and its loss, as one module that accelerate can wrap.

    Args:
        model: an `XCLlamaForCausalLM`, or a decoder (peft's too) that reads its prompt or nothing.
        recipe: weights of the parts of the loss.
        teacher: of a recipe that distils.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, teacher: Teacher | None = None):
        super().__init__()
        self.model = model
        self.question_loss, self.span_loss = recipe.optimization.question_loss, recipe.optimization.span_loss
        self.span_layers = recipe.optimization.span_layers
        self.distillation = recipe.distillation
        self.reads_context = recipe.method == "cross_attention"
        # no module: it is neither trained nor saved
        self._teacher = teacher

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch; logits are computed for the targets alone."""
        with in_frozen_precision(self.model):
            return self._losses(batch)

    def _losses(self, batch: Batch) -> Losses:
        causal = _causal(self.model)
        context = {"context_cache": self.context(batch)} if self.reads_context else {}
        with _inputs_of(self._drawn_blocks(causal) if batch.span_mask is not None else []) as inputs:
            outputs = causal.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                output_hidden_states=bool(self.distillation.hidden_layers),
                **context,
            )
        hidden = outputs.last_hidden_state[:, :-1]
        targets, answer = batch.input_ids[:, 1:], batch.answer_mask[:, 1:]
        read = answer | batch.question_mask[:, 1:] if self.question_loss else answer
        logits = causal.lm_head(hidden[read]).float()
        losses = functional.cross_entropy(logits, targets[read], reduction="none")
        of_answer = answer[read]
        answer_loss = losses[of_answer].sum()
        objective = answer_loss + self.question_loss * losses[~of_answer].sum() if self.question_loss else answer_loss
        if batch.span_mask is not None and len(batch.span_mask):
            objective = objective + self.span_loss * _span_loss(batch, inputs)
        if self._teacher is not None and self.training:
            objective = objective + self._distance(batch, outputs.hidden_states, logits[of_answer])
        return Losses(objective, answer_loss)

    def context(self, batch: Batch) -> ContextCache | ProjectedContext:
        """What the rows of a batch read; with a gradient into the projections, and into a trained encoder."""
        model = _causal(self.model).model
        if batch.context_states is not None and model.config.context_layout == "hidden":
            ids = batch.context_ids.int().cpu()
            return ContextCache(
                {"hidden": batch.context_states}, batch.offsets, ids, model.context_fingerprint(), batch.rows
            )
        # fingerprints of trained weights change with every step, so no cache is made of their states
        states = batch.context_states
        if states is None:
            states = model.encode_packed(batch.passages())
        return model.project_states({"hidden": states}, ReadingPlan.of(batch.offsets, batch.rows))

    def _drawn_blocks(self, causal: nn.Module) -> list[nn.Module]:
        blocks = causal.model.cross_attention_blocks
        return [blocks[causal.model.block_after[layer]] for layer in self.span_layers]

    def _distance(self, batch: Batch, hidden_states: tuple[Tensor, ...] | None, logits: Tensor) -> Tensor:
        """How far the batch is from the teacher, summed over tokens."""
        wanted = self._teacher.hidden_states(batch.input_ids, batch.attention_mask, batch.passages(), batch.own)
        section, distance = self.distillation, logits.new_zeros(())
        if section.weight:
            teacher_logits = self._teacher.model.lm_head(wanted[-1][:, :-1][batch.answer_mask[:, 1:]]).float()
            teacher = functional.log_softmax(teacher_logits / section.temperature, -1)
            student = functional.log_softmax(logits / section.temperature, -1)
            divergence = functional.kl_div(student, teacher, log_target=True, reduction="sum")
            distance = distance + section.weight * section.temperature**2 * divergence
        if section.hidden_layers:
            counted = batch.attention_mask.bool()
            # the prefix does not see the context, and its states are huge
            counted[:, : len(self._teacher.prefix)] = False
            for layer in section.hidden_layers:
                near, far = hidden_states[layer][counted].float(), wanted[layer][counted].float()
                relative = (near - far).square().sum(-1) / far.square().sum(-1)
                distance = distance + section.hidden_weight / len(section.hidden_layers) * relative.sum()
        return distance


def _span_loss(batch: Batch, inputs: list[tuple[nn.Module, tuple]]) -> Tensor:
    """-log of the attention that rests on the answer's next token, summed over these tokens, mean over the blocks."""
    rows, positions = batch.span_positions.unbind(1)
    loss = 0.0
    for block, (hidden, key, value, context, _, rotary, _) in inputs:
        own = ContextRows(context.offsets, tuple(context.context_index[row] for row in rows.tolist()))
        if rotary is not None:
            rotary = tuple(part.expand(len(hidden), -1, -1)[rows, positions][:, None] for part in rotary)
        _, weights = block(hidden[rows, positions][:, None], key, value, own, "eager", rotary, True)
        attention = (weights[:, :, 0] * batch.span_mask[:, None]).sum(-1).mean(1)
        loss = loss - (attention / SPAN_ATTENTION).clamp(1e-5, 1.0).log().sum()
    return loss / len(inputs)


@contextmanager
def _inputs_of(modules: list[nn.Module]) -> Iterator[list[tuple[nn.Module, tuple]]]:
    """The modules with their positional inputs, in the order in which they run."""
    inputs: list[tuple[nn.Module, tuple]] = []
    hooks = [module.register_forward_pre_hook(lambda *call: inputs.append(call)) for module in modules]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _causal(model: nn.Module) -> nn.Module:
    """The causal language model itself, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
