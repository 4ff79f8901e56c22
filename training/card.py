"""The card of an exported checkpoint; every number comes from training.json, recipe.yaml or a results file."""

import json
from pathlib import Path
from typing import Any

from dataset_builders import SOURCES
from training.recipe import Recipe

_CARD = """---
license: apache-2.0
language: en
base_model: {base}
pipeline_tag: question-answering
tags: [xcllama, cross-attention, context-cache]
---

# {name}

{description}. These are the added weights only ({size:.1f} MB in bfloat16); the base stays as it is.

```python
from modeling_xcllama.checkpoints import load_checkpoint

model, processor = load_checkpoint("checkpoints/{name}")
cache = model.encode_context(**processor(contexts=[text], return_tensors="pt"))
output = model.generate(**processor(text=[question], return_tensors="pt"), context_cache=cache, max_new_tokens=16)
```

Questions were trained in the chat template of `chat_template.jinja`, which has no system message.

## Training

Recipe `{name}` (digest {digest}, seed {seed}), steps of {questions} questions on one CPU core; curve in curve.json.

| stage | steps | hours |
|---|---|---|
{stages}

![training curve](curve.png)

| source | licence |
|---|---|
{sources}

Questions of these sources have weight {answer_weight:.0%} of what is trained; the rest are made from the passages
themselves ({others}). Base: {base_source}, digest `{base_digest}`: the weights fit these bits best.

## Held-out figures

{figures}

## Limits

A small model that copies short answers out of a passage. It answers wrongly with confidence, does not say when a
passage holds no answer, and neither counts nor compares.
"""

_FIGURES = """{questions} questions of `{source}`, never trained on (greedy, 16 new tokens), from `{file}`:

| context | token F1 | exact match | loss of an answer token |
|---|---|---|---|
| right passage, from the cache | {right[f1]:.3f} | {right[exact_match]:.3f} | {loss[right_context]:.3f} |
| another question's passage | {wrong[f1]:.3f} | {wrong[exact_match]:.3f} | {loss[wrong_context]:.3f} |"""


def write_card(recipe: Recipe, folder: Path, results: Path | None = None) -> None:
    """Write README.md of an exported checkpoint; without a results file it says that nothing was measured."""
    trained = json.loads((folder / "training.json").read_text())
    weights = next(iter(sorted(folder.glob("*.safetensors"))))
    tasks = recipe.data.tasks
    named = [name for name in recipe.data.sources if name in SOURCES]
    text = _CARD.format(
        name=recipe.name,
        base=recipe.run.base_id or recipe.model.base,
        description=recipe.description or recipe.name,
        size=weights.stat().st_size / 1e6,
        digest=recipe.digest,
        seed=recipe.seed,
        stages="\n".join(
            f"| training/recipes/{stage['recipe']}.yaml | {stage['step']:,} | {stage['seconds'] / 3600:.2f} |"
            for stage in trained["stages"]
        ),
        questions=recipe.optimization.passages_per_step * recipe.optimization.questions_per_passage,
        sources="\n".join(f"| [{name}]({SOURCES[name].homepage}) | {SOURCES[name].licence} |" for name in named),
        answer_weight=tasks.get("answer", 0) / sum(tasks.values()),
        others=", ".join(name for name in tasks if name != "answer"),
        base_source=trained["base_source"],
        base_digest=trained["base_digest"],
        figures=_figures(results),
    )
    temporary = folder / ".README.md"
    temporary.write_text(text)
    temporary.replace(folder / "README.md")


def _figures(results: Path | None) -> str:
    if results is None or not results.is_file():
        return "Not measured."
    held_out: dict[str, Any] = json.loads(results.read_text())["held_out"]
    return _FIGURES.format(
        questions=held_out["questions"],
        source=held_out["source"],
        file=f"results/{results.name}",
        right=held_out["right_context"],
        wrong=held_out["wrong_context"],
        loss=held_out["answer_loss"],
    )
