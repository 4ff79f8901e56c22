"""README and docs/: tables are what configs and results say, snippets run, commands and links exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from publishing_support import make_checkpoint
from transformers import LlamaConfig

from xcllama.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def scripts(monkeypatch):
    """`scripts/` on the path, as when one of them runs."""
    monkeypatch.syspath_prepend(ROOT / "scripts")


def test_everything_rendered_is_up_to_date(scripts):
    render = importlib.import_module("render")
    old = [
        str(path.relative_to(ROOT)) for path, text in render.rendered().items() if not render.is_up_to_date(path, text)
    ]
    assert not old, "run: python scripts/render.py"


def test_an_unknown_table_is_named(scripts):
    with pytest.raises(ValueError, match="table 'weather'; known are headline, quality"):
        importlib.import_module("render").render("<!-- table: weather -->\nx\n<!-- end -->")


def test_only_the_age_may_differ(scripts, tmp_path):
    is_up_to_date = importlib.import_module("render").is_up_to_date
    (tmp_path / "page.md").write_text("1 token: code of this figure unchanged, 3 commits ago.")
    assert is_up_to_date(tmp_path / "page.md", "1 token: code of this figure unchanged, 12 commits ago.")
    assert not is_up_to_date(tmp_path / "page.md", "2 tokens: code of this figure unchanged, 3 commits ago.")
    assert not is_up_to_date(tmp_path / "page.md", "1 token: measured before its code changed, 3 commits ago.")


def test_rows_measured_apart_have_lines_of_their_own(scripts):
    source = importlib.import_module("result_tables").source
    first = {"commit": "a" * 40, "dirty": False, "machine": "x", "date": "2026-01-01", "code": None}
    whole = {"provenance": first | {"command": "make it"}}
    assert source("it", whole).count("results/it.json") == 1
    lines = source("it", whole, [first, first, first | {"commit": "b" * 40, "dirty": True}, {}]).split("\n\n")
    assert "(3 rows): `make it`, commit aaaa" in lines[0]
    assert f"(1 rows): `make it`, commit {'b' * 40}, with uncommitted changes, 2026-01-01" in lines[1]


def test_bytes_a_token_follow_from_the_configs(scripts):
    """The same figures from the stock configs, worked out another way."""
    tables = importlib.import_module("result_tables")
    llama2, llama3 = LlamaConfig(), LlamaConfig(num_key_value_heads=8)
    for name, config in {"Llama-2-7B": llama2, "Llama-3-8B": llama3}.items():
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        ours = tables.decoder_config(name)
        assert tables.key_value_bytes(ours) == 2 * values
        assert tables.cache_bytes(ours) == 2 * config.hidden_size
        condensed = tables.decoder_config(name, cross_attention_share_key_value=True)
        assert tables.cache_bytes(condensed) == 2 * 2 * config.num_key_value_heads * config.head_dim
    # the paper's figures: 512 KiB and 8 KiB
    assert tables.key_value_bytes(tables.decoder_config("Llama-2-7B")) == 512 * 1024
    assert tables.cache_bytes(tables.decoder_config("Llama-2-7B")) == 8 * 1024
    small = tables.decoder_config("SmolLM2-135M")
    assert tables.key_value_bytes(small) == 23_040
    assert tables.cache_bytes(small) == 1_152
    # a float16 scale and two outliers for 64 values, and for int4 a zero beside them
    assert tables.cache_bytes(small, "int8") == 576 + 6 * 9
    assert tables.cache_bytes(small, "int4") == 576 / 2 + 8 * 9


def test_the_snippets_of_readme_run(tmp_path):
    """In an empty folder with a tiny checkpoint under the default one's name."""
    make_checkpoint(tmp_path / "cache", tmp_path / "checkpoints" / "xc-smollm2-135m")
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL))
    environment = os.environ | {"XCLLAMA_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "lighthouse.safetensors").is_file()
    assert done.stdout.strip()


def commands(page: Path) -> list[list[str]]:
    """The words of every line of a page's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_links_lead_somewhere(page):
    assert commands(page)
    for words in commands(page):
        while "=" in words[0]:
            words = words[1:]
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif words[0] == "xcllama":
            assert words[1] in COMMANDS
        elif words[0] in ("python", "pytest"):
            files = [word for word in words if re.fullmatch(r"(scripts|tests|kernels)/\S+\.py", word)]
            assert files
            assert not [file for file in files if not (ROOT / file).is_file()]
        else:
            assert words[0] in ("pip", "accelerate", "lm_eval"), words
    for link in re.findall(r"\]\(([^):#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_page_ends_with_what_proves_it():
    for page in PAGES[1:]:
        last = page.read_text().rstrip().split("\n## ")[-1]
        assert last.startswith("Proved by\n\n```bash\n"), page
        assert last.endswith("```"), page


def test_named_tests_exist():
    """`file::test` of the table of decoding modes; `::test` alone is of the file named before it."""
    named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", (ROOT / "docs" / "use.md").read_text())
    assert len(named) > 30
    file = None
    for given, function in named:
        file = given or file
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), f"{file}::{function}"
