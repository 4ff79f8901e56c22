"""The Space as the Hub runs it: its folder alone, the model by the Auto classes, visitors over HTTP."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from transformers import AutoTokenizer

from modeling_xcllama import XCLlamaProcessor

gradio_client = pytest.importorskip("gradio_client", reason="the extra `space` is not installed")
from xcllama.publishing.assembling import SPACE_MODULES, copy_space  # noqa: E402
from xcllama.publishing.running_space import served_clean  # noqa: E402

SPACE = Path(__file__).resolve().parent.parent / "space"


@pytest.fixture
def space(make_llama, make_model, smollm2_folder, tmp_path) -> Iterator[str]:
    """The URL of the Space with a tiny random model, in a process that cannot see this repository."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = make_model(make_llama(vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=1024))
    model.save_pretrained(tmp_path / "model")
    XCLlamaProcessor(tokenizer).save_pretrained(tmp_path / "model")
    copy_space(SPACE, tmp_path / "space")
    with served_clean(tmp_path / "space", tmp_path / "model", tmp_path / "uploads") as url:
        yield url


def connect(url: str):
    return gradio_client.Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 300})


def test_the_space_as_the_hub_runs_it(space, tmp_path):
    (tmp_path / "notes.txt").write_text("The harbour was built in 1812.")
    first, second = connect(space), connect(space)
    upload = [gradio_client.handle_file(tmp_path / "notes.txt")]
    status, chosen, *_ = first.predict(upload, [], api_name="/add_files")
    assert "notes.txt" in status
    assert chosen["value"] == ["notes.txt"]
    # uploads are deleted once they are read
    assert not list((tmp_path / "uploads").rglob("notes.txt"))
    answer, figures, _, places, *_ = first.predict("When was it built?", ["notes.txt"], api_name="/ask")
    assert answer
    assert "first token" in figures
    assert "harbour" in places
    assert "first token" in first.predict("When?", ["notes.txt"], True, api_name="/ask_prompt")[1]
    # a switch that another visitor's list does not have
    with pytest.raises(gradio_client.exceptions.AppError):
        second.predict("When was it built?", ["notes.txt"], api_name="/ask")
    _, chosen, costs = second.predict("mine", "Something else.", [], api_name="/add_text")
    assert chosen["choices"] == [["mine", "mine"]]
    assert "notes.txt" not in costs
    # what was streamed came in parts
    job = first.submit("When was it built?", ["notes.txt"], api_name="/ask")
    job.result()
    assert len(job.outputs()) > 1


def test_requirements_cover_what_is_imported():
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    required = {Requirement(line).name.replace("-", "_") for line in lines if line and not line.startswith("--")}
    files = sorted(SPACE.glob("*.py"))
    brought = [SPACE.parent / "xcllama" / name for name in SPACE_MODULES]
    names = set()
    for file in files + brought:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    foreign = names - set(sys.stdlib_module_names) - {file.stem for file in files} - {"xcllama"}
    # Parquet files are for the commands
    assert {{"bs4": "beautifulsoup4"}.get(name, name) for name in foreign} - required == {"pyarrow"}


def test_header_of_the_space():
    header = metadata_load(SPACE / "README.md")
    assert header["sdk"] == "gradio"
    assert (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    assert header["models"]
    pins = (SPACE.parent / "constraints.txt").read_text()
    assert re.search(r"^gradio==(.*)$", pins, re.MULTILINE).group(1) == header["sdk_version"]


def test_nothing_calls_home():
    """No font, script or picture from elsewhere in what the Space itself serves."""
    for file in SPACE.rglob("*"):
        if file.suffix in (".py", ".css"):
            assert not re.search(r"https?://|//cdn|GoogleFont|@import", file.read_text()), file
    assert "analytics_enabled=False" in (SPACE / "page.py").read_text()
