"""The paper's comparison: every way to give a model its contexts, on the same tasks; one process a method and task.

OUTPUT/<checkpoint>/{cross, cross_int8, ...}     one folder a method, and the encoded contexts
OUTPUT/baselines/{prompt, none, lora_prompt, ...}
"""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# model arguments of the methods that read an encoded context
CROSS = {
    "cross": {"context_mode": "cross"},
    "cross_shuffled": {"context_mode": "cross_shuffled"},
    "cross_int8": {"context_mode": "cross", "cache_dtype": "int8"},
    "cross_int4": {"context_mode": "cross", "cache_dtype": "int4"},
}
PROMPT = {"context_mode": "prompt", "truncation": "True"}
CLOSED_BOOK = {"context_mode": "none"}
# baseline -> (which of `Models` it evaluates, model arguments)
BASELINES = {
    "none": ("checkpoints", CLOSED_BOOK),
    "prompt": ("checkpoints", PROMPT),
    "prompt_kv": ("checkpoints", PROMPT | {"context_mode": "prompt_kv"}),
    "lora_prompt": ("lora_prompt", PROMPT),
    "lora_closed_book": ("lora_closed_book", CLOSED_BOOK),
    "fid": ("fid", {}),
}
# controls, which need not run on every task
CONTROLS = ("cross_shuffled", "cross_int8", "cross_int4")


@dataclass(frozen=True)
class Models:
    """Folders or Hub ids of what is compared.

    Args:
        checkpoints: XC models or folders of added weights; the untuned baselines are the first one's base.
        lora_prompt, lora_closed_book: peft adapters that were trained with and without the contexts.
        fid: a T5 Fusion-in-Decoder.
    """

    checkpoints: Sequence[str]
    lora_prompt: str | None = None
    lora_closed_book: str | None = None
    fid: str | None = None

    def default_methods(self) -> list[str]:
        """All methods whose model is given."""
        return [*CROSS, *(name for name, (kind, _) in BASELINES.items() if getattr(self, kind))]


@dataclass(frozen=True)
class Evaluation:
    """A model and what it reads: where results go, the digest of all weights that take part, arguments of lm-eval."""

    output: Path
    digest: str
    options: tuple[str, ...]


def plan(models: Models, methods: Sequence[str], output: Path) -> Iterator[tuple[str, Evaluation]]:
    """(method, evaluation) of every method, of each checkpoint where it reads one's cache.

    Raises:
        ValueError: an unknown method, or one whose model is not given.
    """
    for method in methods:
        if method in CROSS:
            for checkpoint in models.checkpoints:
                folder = output / Path(checkpoint).name
                digest = weights_digest(checkpoint)
                values = CROSS[method] | {"context_cache_dir": str(folder / f"contexts-{digest[:8]}")}
                yield method, _evaluation(folder / method, "xcllama", checkpoint, digest, values)
            continue
        kind, values = BASELINES.get(method, ("", {}))
        found = getattr(models, kind) if kind else None
        if not found:
            known = ", ".join([*CROSS, *BASELINES])
            raise ValueError(f"method {method!r} is unknown or lacks its model; known are {known} (see --help).")
        place = output / "baselines" / method
        if kind == "checkpoints":
            yield method, _evaluation(place, "xcllama", found[0], base_digest(found[0]), values)
        else:
            name = "fid" if kind == "fid" else "xcllama"
            yield method, _evaluation(place, name, found, weights_digest(found), values)


def _evaluation(output: Path, kind: str, model: str, digest: str, values: dict[str, str]) -> Evaluation:
    pairs = ",".join(f"{key}={value}" for key, value in {"pretrained": model, **values}.items())
    template = ("--apply_chat_template",) if kind == "xcllama" else ()
    return Evaluation(
        output, digest, ("--model", kind, "--model_args", pairs, "--output_path", str(output), *template)
    )


def weights_digest(model: str) -> str:
    """Digest of the weights in a folder; of its name where `model` is a Hub id."""
    digest = hashlib.sha256(model.encode())
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def base_digest(checkpoint: str) -> str:
    """Digest of the frozen decoder of a checkpoint and of its chat template: all that its baselines use of it."""
    config, template = Path(checkpoint) / "config.json", Path(checkpoint) / "chat_template.jinja"
    base = json.loads(config.read_text()).get("base_model_digest") if config.is_file() else None
    if base is None:
        return weights_digest(checkpoint)
    return hashlib.sha256((base + (template.read_text() if template.is_file() else "")).encode()).hexdigest()


def compare(
    models: Models,
    methods: Sequence[str],
    output: Path,
    tasks: Sequence[str],
    control_tasks: Sequence[str],
    arguments: Sequence[str],
) -> int:
    """Evaluate `methods` one after the other; what has results of these weights and arguments is not run again.

    Args:
        control_tasks: of `CONTROLS`, instead of `tasks`.
        arguments: what all methods share: `--limit`, `--batch_size`, ...

    Returns:
        How many evaluations failed.

    Raises:
        ValueError: see `plan`.
    """
    failures = 0
    for method, evaluation in list(plan(models, methods, output)):
        for task in control_tasks if method in CONTROLS else tasks:
            asked = [*evaluation.options, "--tasks", task, *arguments, "--log_samples"]
            done, state = evaluation.output / f"{task}.done", f"{shlex.join(asked)}\n{evaluation.digest}\n"
            if done.exists() and done.read_text() == state:
                print(f"{evaluation.output}, {task}: done before")
                continue
            print(f"xcllama eval run {shlex.join(asked)}", flush=True)
            if subprocess.run([sys.executable, "-m", "xcllama", "eval", "run", *asked]).returncode:
                failures += 1
            else:
                done.write_text(state)
    return failures
