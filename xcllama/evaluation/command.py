"""`xcllama eval run`: lm-eval's arguments, this project's models and tasks, each task kept when done."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (registers lm-eval's own models before ours)
from lm_eval import simple_evaluate
from lm_eval._cli.run import Run
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, setup_logging

import xcllama.evaluation.fusion_in_decoder
import xcllama.evaluation.model  # noqa: F401  (registers xcllama)
from xcllama.durable import write_text
from xcllama.provenance import provenance

# whose code makes the figures
MEASURED = ("modeling_xcllama", "dataset_builders", "xcllama/evaluation")
logger = logging.getLogger(__name__)

TASKS = Path(__file__).parent / "tasks"
# where tasks are looked for: first among ours, then among all
INCLUDE_DEFAULTS = (False, True)
# parts of lm-eval's results that are keyed by task or group
MERGED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
# what a task may fail with and leave the other tasks unharmed
TASK_ERRORS = (ValueError, KeyError, OSError, RuntimeError, NotImplementedError)


def main(arguments: list[str]) -> int:
    """Run `lm-eval run` with these arguments; returns the exit code."""
    setup_logging()
    commands = argparse.ArgumentParser(prog="xcllama eval").add_subparsers()
    Run.create(commands)
    try:
        return evaluate(EvaluatorConfig.from_cli(commands.choices["run"].parse_args(arguments)))
    except (ValueError, TypeError, OSError) as error:
        return _fail(error)


def evaluate(config: EvaluatorConfig) -> int:
    """Evaluate the tasks of a configuration one by one, saving after each; returns the exit code.

    Raises:
        ValueError: a configuration that cannot be run.
    """
    _check(config)
    manager, names = find_tasks(config)
    common = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device}
    language_model = get_model(config.model).create_from_arg_obj(config.model_args, common)
    if config.output_path:
        config.hf_hub_log_args["output_path"] = config.output_path
    tracker = EvaluationTracker(**config.hf_hub_log_args)
    merged: dict[str, Any] = {}
    failures = 0
    for name in names:
        try:
            results = _evaluate_task(config, language_model, manager, name, tracker)
        except TASK_ERRORS as error:
            failures += 1
            code = _fail(error, name)
            if language_model.world_size > 1:
                # the others wait for this process: its end is theirs
                return code
            continue
        if results is not None:
            _save(config, tracker, merged, results)
    if merged:
        print(f"{config.model} ({config.model_args}), limit: {config.limit}, batch_size: {config.batch_size}")
        print(make_table(merged))
    return 1 if failures else 0


def _check(config: EvaluatorConfig) -> None:
    if config.use_cache:
        raise ValueError(
            "`--use_cache` is refused: it keys answers by the prompt alone, so equal questions about other contexts "
            "would get each other's answers; use `context_cache_dir` in --model_args to keep encoded contexts."
        )
    if config.wandb_args or config.trackio_args:
        raise ValueError("`--wandb_args` and `--trackio_args` are not supported; log the JSON of --output_path.")
    if config.num_fewshot:
        raise ValueError("`--num_fewshot` must be 0: an example of a context task would need its own contexts.")


def find_tasks(config: EvaluatorConfig) -> tuple[TaskManager, list[str]]:
    """The task manager with this project's tasks, and the names of the tasks that a configuration asks for.

    Raises:
        ValueError: an unknown task.
    """
    own = [config.include_path] if isinstance(config.include_path, str) else list(config.include_path or [])
    asked = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks
    if not asked:
        raise ValueError("`--tasks` is empty; try `--tasks xc_offline`.")
    # lm-eval's thousands of tasks take long to index: only when one of them is asked for
    for include_defaults in INCLUDE_DEFAULTS:
        manager = TaskManager(
            include_path=[*own, str(TASKS)], include_defaults=include_defaults, metadata=config.metadata
        )
        matches = {task: manager.match_tasks([task]) for task in asked}
        if all(matches.values()):
            break
    if unknown := [task for task, found in matches.items() if not found]:
        ours = ", ".join(sorted(name for name in manager.all_tasks if name.startswith("xc_")))
        raise ValueError(
            f"task {unknown[0]!r} is unknown; this project's are {ours} (`xcllama eval tasks` lists them)."
        )
    names = [leaf for found in matches.values() for name in found for leaf in _leaves(manager, name)]
    return manager, list(dict.fromkeys(names))


def _leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks of one of this project's groups; any other name stays as it is, for lm-eval to expand."""
    path = TASKS / f"{name}.yaml"
    if name not in manager.all_groups or not path.exists():
        return [name]
    import yaml

    return yaml.safe_load(path.read_text())["task"]


def _evaluate_task(config, language_model, manager: TaskManager, name: str, tracker) -> dict[str, Any] | None:
    """lm-eval's results of one task; None on all processes but the first."""
    seeds = config.seed or [None] * 4
    results = simple_evaluate(
        model=language_model,
        model_args=config.model_args,
        tasks=[name],
        batch_size=config.batch_size,
        device=config.device,
        cache_requests=config.cache_requests.get("cache_requests", False),
        rewrite_requests_cache=config.cache_requests.get("rewrite_requests_cache", False),
        delete_requests_cache=config.cache_requests.get("delete_requests_cache", False),
        limit=config.limit,
        samples=config.samples,
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        log_samples=config.log_samples,
        evaluation_tracker=tracker,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs=config.gen_kwargs,
        task_manager=manager,
        predict_only=config.predict_only,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )
    if results is not None:
        # lm-eval names the class of a model object
        results["config"]["model"] = tracker.general_config_tracker.model_source = config.model
    return results


def _save(config, tracker, merged: dict[str, Any], results: dict[str, Any]) -> None:
    """Merge the results of a finished task into those before and write them; the file before is replaced."""
    samples = results.pop("samples", {})
    for part, values in results.items():
        if part in MERGED:
            merged.setdefault(part, {}).update(values)
        else:
            merged[part] = values
    seed = merged["config"].get("torch_seed")
    merged["config"] |= {"provenance": provenance(MEASURED, seed)}
    if not config.output_path:
        return
    before, hashes = getattr(tracker, "date_id", None), merged.get("task_hashes", {})
    tracker.save_results_aggregated(results=merged, samples=samples if config.log_samples else None)
    if config.log_samples:
        for task, task_samples in samples.items():
            tracker.save_results_samples(task_name=task, samples=task_samples)
            merged.setdefault("samples_files", {})[task] = f"samples_{task}_{tracker.date_id}.jsonl"
    merged["task_hashes"] = hashes | merged.get("task_hashes", {})
    written = _results_files(tracker, tracker.date_id)
    if not written:
        raise OSError(f"the results could not be written to `--output_path` {config.output_path!r}.")
    text = json.dumps(merged, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_text(written[0], text + "\n")
    for stale in _results_files(tracker, before) if before is not None else ():
        stale.unlink(missing_ok=True)


def _results_files(tracker, date_id: str) -> list[Path]:
    path = Path(tracker.output_path)
    if path.suffix == ".json":
        return list(path.parent.glob(f"{path.stem}_{date_id}.json"))
    return list((path / tracker.general_config_tracker.model_name_sanitized).glob(f"results_{date_id}.json"))


def _fail(error: BaseException, task: str | None = None) -> int:
    """Say in one line what went wrong; the traceback goes to the debug log."""
    logger.debug("details", exc_info=error)
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    where = f"task {task}: " if task else ""
    if int(os.environ.get("RANK", "0")) == 0 or task:
        print(f"Error: {where}{' '.join(message.split())}", file=sys.stderr)
    return 1
