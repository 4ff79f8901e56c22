"""`xcllama eval`: lm-eval with this project's models and tasks, methods compared, tables."""

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


@app.command(context_settings=PASS_ON)
def compare(
    context: typer.Context,
    checkpoint: Annotated[list[str], typer.Option(help="XC model or folder of added weights; several: again.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups, as lm-eval takes them: xc_coqa,xc_drop.")],
    output: Annotated[Path, typer.Option(help="Folder of all runs; a second call goes on.")],
    lora_prompt: Annotated[str | None, typer.Option(help="LoRA trained with the contexts in its prompt.")] = None,
    lora_closed_book: Annotated[str | None, typer.Option(help="LoRA trained without the contexts.")] = None,
    fid: Annotated[str | None, typer.Option(help="T5 Fusion-in-Decoder folder.")] = None,
    methods: Annotated[str | None, typer.Option(help="As none,cross; default: all whose model is given.")] = None,
    control_tasks: Annotated[str | None, typer.Option(help="Of wrong and quantized caches; default: all.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder for eval_CHECKPOINT.json and .png.")] = None,
) -> None:
    """The paper's comparison: caches, controls, prompt, LoRA, FiD. What is not listed here goes to lm-eval.

    The first checkpoint's results hold all methods.
    """
    from xcllama.evaluation.command import MEASURED
    from xcllama.evaluation.comparison import Models
    from xcllama.evaluation.comparison import compare as compare_methods
    from xcllama.evaluation.plots import draw
    from xcllama.evaluation.tables import load_runs, markdown, summarize

    require_clean(results)
    models = Models(checkpoint, lora_prompt, lora_closed_book, fid)
    asked = methods.split(",") if methods else models.default_methods()
    on_controls = (control_tasks or tasks).split(",")
    failures = compare_methods(models, asked, output, tasks.split(","), on_controls, context.args)
    first, *others = (Path(name).name for name in checkpoint)
    folders = {first: [output]} | {name: [output / name, output / "baselines"] for name in others}
    summaries = {name: summarize(load_runs(places)) for name, places in folders.items()}
    typer.echo(markdown(summaries[first]))
    for name, summary in summaries.items() if results else ():
        write_result(results / f"eval_{name}.json", summary, MEASURED, seed=0)
        draw(summary, results / f"eval_{name}.png")
    raise typer.Exit(1 if failures else 0)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="--output_path folders of runs with --log_samples.")],
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
    results: Annotated[Path | None, typer.Option(help="Also write all figures to this JSON.")] = None,
) -> None:
    """Tables of finished runs, as Markdown."""
    from xcllama.evaluation import tables
    from xcllama.evaluation.command import MEASURED

    summary = tables.summarize(tables.load_runs(folders))
    text = tables.markdown(summary)
    typer.echo(text)
    if markdown:
        markdown.write_text(text + "\n")
    if results:
        write_result(results, summary, MEASURED, seed=0)
