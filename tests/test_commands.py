"""The command `xcllama`: every sub-command, help without heavy imports, one line for what a user can mend."""

import subprocess
import sys

import pytest

from xcllama import commands

HELP = """
import sys
from xcllama.commands import app
sys.argv[0] = "xcllama"
try:
    app(sys.argv[1:])
finally:
    print(sorted(sys.modules.keys() & {"torch", "transformers", "datasets", "ray"}))
"""


def run(monkeypatch, *arguments: str) -> int | str | None:
    """What the command line exits with."""
    monkeypatch.setattr(sys, "argv", ["xcllama", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.main()
    return end.value.code


@pytest.mark.parametrize(
    "arguments", [(), *((name,) for name in commands.COMMANDS)], ids=lambda names: " ".join(names)
)
def test_help_is_there_without_heavy_imports(arguments):
    done = subprocess.run([sys.executable, "-c", HELP, *arguments, "--help"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert f"Usage: {' '.join(('xcllama', *arguments))}" in done.stdout
    assert arguments or all(f"│ {name} " in done.stdout for name in commands.COMMANDS)


def test_a_bad_value_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "train", "nothing").startswith("Error: No recipe file 'nothing'; recipes of this project:")
    assert run(monkeypatch, "publish", "all", "--namespace", "a", "--repo-id", "a/b").startswith(
        "Error: give --namesp"
    )
    assert run(monkeypatch, "publish", "nothing", "--namespace", "a") == 2
    assert "'nothing' is not one of" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "xcllama.commands.train", raising=False)
    monkeypatch.delitem(sys.modules, "xcllama.training.recipe", raising=False)
    message = 'Error: `xcllama train` needs the package yaml: pip install "xcllama[train]"'
    assert run(monkeypatch, "train", "smoke") == message
