"""`xcllama eval`: lm-eval with this project's models and tasks; methods compared."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from xcllama.commands import PASS_ON
from xcllama.provenance import require_clean, write_result

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command(add_help_option=False, context_settings=PASS_ON)
def run(context: typer.Context) -> None:
    """Evaluate: lm-eval's arguments; each task is kept when done.

    xcllama eval run --model xcllama --model_args pretrained=FOLDER,context_mode=cross --tasks xc_offline
    """
    from xcllama.evaluation.command import main

    raise typer.Exit(main(context.args))


@app.command("tasks")
def list_tasks() -> None:
    """List this project's tasks and groups, and where they lie, for `lm_eval --include_path`."""
    from lm_eval.tasks import TaskManager

    from xcllama.evaluation.command import TASKS

    typer.echo(TaskManager(include_path=str(TASKS), include_defaults=False).list_all_tasks())
    typer.echo(TASKS)


@app.command()
def compare(
    checkpoint: Annotated[list[str], typer.Option(help="XC model or folder of added weights; several: again.")],
    split: Annotated[str, typer.Option(help="Of the questions: dev (for choices), test (once a release), ...")],
    source: Annotated[list[str], typer.Option(help="Of the questions; several: again.")] = ["squad_sample"],  # noqa: B006
    lora_prompt: Annotated[str | None, typer.Option(help="LoRA trained with the texts in its prompt.")] = None,
    lora_closed_book: Annotated[str | None, typer.Option(help="LoRA trained without the texts.")] = None,
    methods: Annotated[str | None, typer.Option(help="As none,cross; default: all whose model is given.")] = None,
    limit: Annotated[int | None, typer.Option(help="So many questions of each source.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 24,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder of all runs; a second call goes on.")] = Path("runs/compare"),
    results: Annotated[
        Path | None, typer.Option(help="Folder for eval_CHECKPOINT.json and .png; the first has all.")
    ] = None,
    store_threshold: Annotated[
        bool, typer.Option("--store-threshold", help="Let checkpoints decline below the score chosen here.")
    ] = False,
) -> None:
    """Every way to give a model its texts, on the same questions: answers, paired differences, what is declined.

    xcllama eval compare --checkpoint checkpoints/xc-smollm2-135m --lora-prompt checkpoints/lora-prompt --split dev
    """
    import torch

    from xcllama.evaluation.comparison import MEASURED, Models, Settings
    from xcllama.evaluation.comparison import compare as compare_methods
    from xcllama.evaluation.not_in_text import store_threshold as choose_threshold
    from xcllama.evaluation.not_in_text import stored_threshold
    from xcllama.evaluation.plots import draw
    from xcllama.evaluation.tables import answers_of, load_runs, markdown, summarize

    require_clean(results)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    models, paths = Models(checkpoint, lora_prompt, lora_closed_book), []
    for name in source:
        settings = Settings(name, split, limit=limit, max_new_tokens=max_new_tokens)
        asked = methods.split(",") if methods else models.default_methods(name)
        paths += compare_methods(models, asked, settings, output, getattr(torch, dtype), device)
    runs = load_runs(paths)
    for folder in checkpoint if store_threshold else ():
        typer.echo(f"{folder} declines answers below {choose_threshold(folder, answers_of(runs, folder))}")
    thresholds = {Path(folder).name: stored_threshold(folder) for folder in checkpoint}
    typer.echo(markdown(summarize(runs, thresholds)))
    for number, name in enumerate(thresholds) if results else ():
        # the others' hold their own methods and the baselines
        shown = [run for run in runs if number == 0 or run.model == name or run.model not in thresholds]
        summary = summarize(shown, thresholds)
        write_result(results / f"eval_{name}.json", summary, MEASURED, seed=0)
        draw(summary, results / f"eval_{name}.png")
