"""`xcllama fit`: a reader of cached contexts around any Llama-family decoder, without training."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fit(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the decoder.")],
    text: Annotated[list[Path], typer.Option(help="File or folder: txt, md, html, docx, epub, pdf; several: again.")],
    output: Annotated[Path, typer.Option(help="New folder of added weights.")],
    rank_layers: Annotated[bool, typer.Option(help="Measure what each layer brings.")] = True,
) -> None:
    """Fit the context projections by least squares, in minutes; 20,000 tokens of text or more."""
    from xcllama.documents import ReadReport, find_files, read_documents
    from xcllama.training.fit import fit_reader

    read = ReadReport()
    texts = (document.text for document in read_documents(find_files(text), read))
    report = fit_reader(base, texts, output, rank_layers)
    for name, reason in read.skipped.items():
        typer.echo(f"skipped {name}: {reason}")
    typer.echo("layer  R2 of keys and values" + ("  loss without it" if report.gain else ""))
    for layer, score in report.r_squared.items():
        typer.echo(f"{layer:5d}  {score:22.3f}" + (f"  {report.gain[layer]:+15.4f}" if report.gain else ""))
    typer.echo(
        f"{report.num_tokens:,} tokens fitted. Loss of held-out text: {report.loss_prompt:.3f} with its beginning in "
        f"the prompt, {report.loss_cached:.3f} from the cache, {report.loss_without:.3f} without; the cache brings "
        f"{100 * report.share:.0f} % of what the prompt brings."
    )
    typer.echo(f"Written to {output}.")
