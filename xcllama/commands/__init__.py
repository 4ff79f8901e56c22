"""The command `xcllama`. The module of a sub-command is imported when it is asked for, so that `--help` is quick."""

import sys
from importlib import import_module

import typer
from huggingface_hub import constants

# sub-command -> (module that has its `app`, extra that installs what it needs, what it does)
COMMANDS = {
    "store": ("xcllama.commands.store", "store", "Documents encoded once, searched, asked, looked after, shared."),
    "ask": ("xcllama.commands.ask", "store", "Answer a question from a store of documents, or say that they do not."),
    "serve": ("xcllama.commands.serve", "serving", "An OpenAI-compatible server over a context store."),
    "fit": ("xcllama.commands.fit", "train", "Make a reader of cached contexts of any decoder, without training."),
    "train": ("xcllama.commands.train", "train", "Train a recipe and export what was trained."),
    "eval": ("xcllama.commands.eval", "eval", "lm-eval with this project's models and tasks; methods compared."),
    "publish": ("xcllama.commands.publish", "publish", "Assemble, check and upload Hub repositories."),
}
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="xcllama",
    help="Llama models that answer from context caches. `xcllama COMMAND --help` says more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _app() -> None:
    """Holds the sub-commands, were there only one."""


def _register(name: str, module: str, extra: str, summary: str) -> None:
    @app.command(name, help=summary, add_help_option=False, context_settings=PASS_ON)
    def run(context: typer.Context) -> None:
        try:
            import_module(module).app(args=context.args, prog_name=f"xcllama {name}")
        except ModuleNotFoundError as error:
            message = f'`xcllama {name}` needs the package {error.name}: pip install "xcllama[{extra}]"'
            raise ValueError(message) from error


for _name, _entry in COMMANDS.items():
    _register(_name, *_entry)


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit status 1, as in `hf`."""
    try:
        app()
    except (ValueError, OSError) as error:
        # as `hf` does: the traceback for those who ask
        if constants.HF_DEBUG:
            raise
        sys.exit(f"Error: {error}")
