"""The card of a model repository, and its `.eval_results`: figures from results/*.json, training.json and config."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from dataset_builders import SOURCES
from modeling_xcllama import XCLlamaConfig
from xcllama.costs import cache_bytes, key_value_bytes, projected_bytes
from xcllama.publishing.rendering import render

# base models and encoders whose terms we know: licence, address of its text, what a derivative must say
LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
    "meta-llama/Llama-2-7b-hf": "llama2",
    "meta-llama/Llama-2-7b-chat-hf": "llama2",
    "meta-llama/Meta-Llama-3-8B": "llama3",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
}
LLAMA_TERMS = {
    "llama2": {"notice": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
               "All Rights Reserved.", "link": "https://ai.meta.com/llama/license/"},
    "llama3": {"notice": "Built with Meta Llama 3. Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
               "Copyright (c) Meta Platforms, Inc. All Rights Reserved.", "link": "https://llama.meta.com/llama3/license/"},
}  # fmt: skip
# the checkpoint that scripts measure when they are told of none, and the requests of scripts/benchmark.py in its card
DEFAULT = "xc-smollm2-135m"
CASES = ("hidden 16-bit, file warm", "hidden 16-bit, projected", "hidden int8, file warm", "KV prefix, file warm",
         "KV prefix, memory", "text in the prompt")  # fmt: skip
# what answers are scored by; of a task the first that it has stands in tables
METRICS = {"f1": "token F1", "acc": "accuracy", "exact_match": "exact match"}
TAGS = ["xcllama", "cross-attention", "context-cache", "question-answering"]
ADAPTER_TAGS = ["xcllama", "lora", "baseline", "question-answering"]
# where the passage of a question is, by what a recipe trains
READING = {"cross_attention": "from the cache", "lora_prompt": "in the prompt", "lora_closed_book": "not read"}


def read_result(results: Path, name: str) -> dict[str, Any] | None:
    """results/NAME.json; None where it was not measured: its section is then left out."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def base_licence(base: str) -> str:
    """The licence of a base model or encoder.

    Raises:
        ValueError: one that is not in `LICENCES`.
    """
    if base not in LICENCES:
        raise ValueError(
            f"the licence of {base} is not known; add it to LICENCES in xcllama/publishing/model_card.py."
        )
    return LICENCES[base]


def licence_fields(base: str, sources: list[str]) -> dict[str, str]:
    """`license` and, where it is no standard one, its name: the base's, or non-commercial where a source is."""
    if any(not SOURCES[name].commercial for name in sources if name in SOURCES):
        return {"license": "other", "license_name": "trained-on-non-commercial-data"}
    if base not in LICENCES:
        return {"license": "other", "license_name": "terms-of-the-base-model"}
    return {"license": LICENCES[base]}


def scored_runs(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The runs whose answers were scored, the best of a task first, each with `metric` and its figure as `score`."""
    runs = []
    for run in (evaluation or {"runs": []})["runs"]:
        if metric := next((metric for metric in METRICS if metric in run["quality"]), None):
            runs.append(run | {"metric": METRICS[metric], "score": run["quality"][metric]})
    return sorted(runs, key=lambda run: (run["task"], -run["score"]["value"]))


def own_runs(evaluation: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The runs of what is published: the model on its own cache in its dtype, an adapter as it was trained."""
    methods = [f"{name} / cross / {dtype}" for dtype in ("bfloat16", "float16", "float32")]
    methods += [f"{name} / LoRA / {mode}" for mode in ("prompt", "none")]
    return [run for run in scored_runs(evaluation) if run["method"] in methods]


def hub_dataset(task: str) -> str:
    """The Hub id of the data set behind an evaluation task (`xc_<source>`)."""
    source = task.removeprefix("xc_")
    return SOURCES[source].hub_id or source if source in SOURCES else source


def eval_results(evaluation: dict[str, Any] | None, name: str) -> list[EvalResult]:
    """The model-index entries of the published model."""
    return [
        EvalResult(
            task_type="question-answering",
            dataset_type=hub_dataset(run["task"]),
            dataset_name=run["task"],
            metric_type=metric,
            metric_name=f"{METRICS[metric]} ({run['quality'][metric]['documents']} questions)",
            metric_value=run["quality"][metric]["value"],
        )
        for run in own_runs(evaluation, name)
        for metric in METRICS
        if metric in run["quality"]
    ]


def eval_results_yaml(evaluation: dict[str, Any] | None, name: str) -> str:
    """The content of `.eval_results/xcllama.yaml`; '' where the published model itself was not measured."""
    entries = [
        EvalResultEntry(
            dataset_id=hub_dataset(run["task"]),
            task_id=run["task"],
            value=run["score"]["value"],
            date=run["origin"]["date"],
            notes=f"{run['metric']}, {run['method']}, {run['score']['documents']} questions, "
            f"95 % interval {run['score']['interval']}",
        )
        for run in own_runs(evaluation, name)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def bases_of(config: XCLlamaConfig) -> list[str]:
    """Names of the decoder and, where there is one, of the separate encoder."""
    return [name for name in (config.base_model_name_or_path, config.encoder_name_or_path) if name is not None]


def header(
    name: str,
    bases: list[str],
    digest: str,
    sources: list[str] = (),
    evaluation: dict[str, Any] | None = None,
    adapter: bool = False,
) -> str:
    """The YAML header, without its fences.

    Args:
        bases: Hub ids of what it is made from, the decoder first.
        digest: of the decoder's weights.
        sources: of the training data.
        adapter: whether the repository holds an adapter of peft, not a model.
    """
    terms = licence_fields(bases[0], sources)
    datasets = sorted({SOURCES[source].hub_id for source in sources if source in SOURCES} - {""})
    fields = {
        "base_model": bases,
        "base_model_relation": "adapter" if adapter else "finetune",
        "base_model_digest": digest,
        "datasets": datasets or None,
        "eval_results": eval_results(evaluation, name) or None,
        "language": ["en"],
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ADAPTER_TAGS if adapter else TAGS,
    }
    if results := fields["eval_results"]:
        fields |= {"model_name": name, "metrics": sorted({result.metric_type for result in results})}
    return ModelCardData(**fields, **terms).to_yaml()


def token_costs(config: XCLlamaConfig) -> dict[str, Any]:
    """Bytes a context token: in files of each dtype, resident once projected, in the decoder's KV cache."""
    files = {dtype: cache_bytes(config, dtype) for dtype in ("bfloat16", "int8", "int4")}
    return {"file": files, "projected": projected_bytes(config), "key_value": key_value_bytes(config)}


def training_values(folder: Path, bases: list[str], digest: str, results: Path, repo_id: str | None) -> dict[str, Any]:
    """What every card of something trained says of it.

    Args:
        folder: training.json and recipe.yaml, as `xcllama train` exports them.
        bases: the decoder and, where there is one, the encoder.
        digest: of the decoder's weights.

    Raises:
        ValueError: the folder lacks one of them, or it is published and the licence of a base is not known.
    """
    for file in ("training.json", "recipe.yaml"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}, which fills its card; export it with `xcllama train`.")
    trained = json.loads((folder / "training.json").read_text())
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for base in bases if repo_id is not None else ():
        base_licence(base)
    named = [SOURCES[source] for source in trained["sources"] if source in SOURCES]
    measured = read_result(results, f"training_{trained['recipe']}")
    if measured is not None and _runs(measured) != _runs(trained):
        # figures of an earlier training are no figures of these weights
        measured = None
    return {
        "name": folder.name,
        "repo_id": repo_id,
        "base": bases[0],
        "base_digest": digest,
        "base_licence": LICENCES.get(bases[0], "as its owner states"),
        "trained": trained,
        "recipe": recipe,
        "reading": READING[recipe["method"]],
        "tasks": [task for task, weight in recipe["data"]["tasks"].items() if weight],
        "sources": named,
        "other_sources": [source for source in trained["sources"] if source not in SOURCES],
        "restricted": [source.name for source in named if not source.commercial],
        "hours": sum(stage["seconds"] for stage in trained["stages"]) / 3600,
        "measured": measured,
        "curve": (folder / "curve.png").is_file(),
    }


def _runs(trained: dict[str, Any]) -> list[tuple]:
    """What names the runs behind weights; the seconds of a stage are another machine's business."""
    return [tuple(stage[name] for name in ("recipe", "digest", "step")) for stage in trained["stages"]]


def evaluation_of(folder: Path, results: Path) -> dict[str, Any] | None:
    """results/eval_NAME.json of a folder of added weights, None where it was measured with other weights."""
    evaluation = read_result(results, f"eval_{folder.name}")
    if evaluation is None:
        return None
    measured = {run.get("added_digest") for run in evaluation["runs"] if run["model"] == folder.name}
    return evaluation if measured <= {read_result(folder, "training")["added_digest"]} else None


def measured_with(results: Path, file: str, name: str) -> dict[str, Any] | None:
    """results/FILE.json where it was measured with this checkpoint (`DEFAULT` when its command names none)."""
    measured = read_result(results, file)
    if measured is None:
        return None
    words = measured["provenance"]["command"].split()
    used = Path(words[words.index("--checkpoint") + 1]).name if "--checkpoint" in words else DEFAULT
    return measured if used == name else None


def request_rows(benchmark: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of results/benchmark.json the requests that a card compares: seconds (medians) and bytes, by context length."""
    rows = []
    for part, figures in (benchmark or {}).items():
        if part.startswith("context_") and "requests" in figures:
            found = [(case, figures["requests"][case]) for case in CASES if case in figures["requests"]]
            length = int(part.removeprefix("context_"))
            rows += [
                {"tokens": length, "case": case, "resident": row["resident_bytes"]}
                | {field: row[f"{field}_seconds"]["median"] for field in ("first_token", "step")}
                for case, row in found
            ]
    return rows


def checkpoint_card(folder: Path, config: XCLlamaConfig, results: Path, repo_id: str | None = None) -> str:
    """The card of the added weights in a folder of checkpoints/.

    Args:
        config: of the model that they belong to.
        results: the folder results/; what was not measured has no section.
        repo_id: where base and added weights are published as one model; None: the folder as it is.

    Raises:
        ValueError: an empty slot, or what is published has a base or encoder whose licence is not known.
    """
    bases, digest = bases_of(config), config.base_model_digest
    values = training_values(folder, bases, digest, results, repo_id)
    evaluation = evaluation_of(folder, results)
    values |= {
        "header": header(folder.name, bases, digest, values["trained"]["sources"], evaluation),
        "config": config,
        "evaluation": evaluation,
        "runs": scored_runs(evaluation),
        "costs": token_costs(config),
        "demo": measured_with(results, "demo", folder.name),
        "benchmark": (benchmark := measured_with(results, "benchmark", folder.name)),
        "requests": request_rows(benchmark),
    }
    return render("model_card.md.jinja", values)


def adapter_card(folder: Path, results: Path, repo_id: str | None = None) -> str:
    """The card of an adapter of peft in a folder of checkpoints/, a baseline; arguments and errors as above."""
    adapter = json.loads((folder / "adapter_config.json").read_text())
    bases, digest = [adapter["base_model_name_or_path"]], read_result(folder, "training")["base_digest"]
    values = training_values(folder, bases, digest, results, repo_id)
    # baselines are evaluated beside the checkpoint that is compared with them
    evaluation = read_result(results, f"eval_{DEFAULT}")
    values |= {
        "header": header(folder.name, bases, digest, values["trained"]["sources"], evaluation, adapter=True),
        "config": None,
        "adapter": adapter,
        "evaluation": evaluation,
        "runs": own_runs(evaluation, folder.name),
    }
    return render("adapter_card.md.jinja", values)


def readme(folder: Path, results: Path) -> str:
    """The card of a folder that `xcllama train` exported, as it lies there.

    Raises:
        ValueError: an empty slot, or files that are missing.
    """
    if is_adapter(folder):
        return adapter_card(folder, results)
    return checkpoint_card(folder, XCLlamaConfig.from_pretrained(folder), results)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (folder / "adapter_config.json").is_file()


def conversion_card(name: str, config: XCLlamaConfig, repo_id: str, original: str) -> str:
    """The card of a checkpoint of the original code, converted (`scripts/convert_checkpoint.py`).

    Args:
        original: where the original checkpoint came from.

    Raises:
        ValueError: a base that is no Llama with known terms, or an empty slot.
    """
    licence = base_licence(config.base_model_name_or_path)
    if licence not in LLAMA_TERMS:
        raise ValueError(f"{config.base_model_name_or_path} is no Llama 2 or 3; conversions of it have no card.")
    # the licence asks that the name of a derivative begins so
    if licence == "llama3" and not repo_id.rpartition("/")[2].startswith("Llama-3"):
        raise ValueError(f"the Llama 3 licence asks for a name that begins with 'Llama-3', got {repo_id!r}.")
    values = {
        "name": name,
        "repo_id": repo_id,
        "header": header(name, bases_of(config), config.base_model_digest),
        "config": config,
        "original": original,
        "terms": LLAMA_TERMS[licence],
        "costs": token_costs(config),
    }
    return render("conversion_card.md.jinja", values)
