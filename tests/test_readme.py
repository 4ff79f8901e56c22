"""README's tables are what the configs and results say."""

import importlib.util
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def renderer():
    spec = importlib.util.spec_from_file_location("renderer", ROOT / "scripts" / "render_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(renderer):
    text = (ROOT / "README.md").read_text()
    assert renderer.render(text) == text, "run: python scripts/render_readme.py"


def test_cards_of_checkpoints_are_up_to_date(renderer):
    for path in sorted((ROOT / "checkpoints").glob("*/README.md")):
        card = renderer.readme(path.parent, renderer.RESULTS)
        assert card == path.read_text(), "run: python scripts/render_readme.py"


def test_bytes_a_token_follow_from_the_configs(renderer):
    """The same figures from the stock configs, worked out another way."""
    llama2, llama3 = LlamaConfig(), LlamaConfig(num_key_value_heads=8)
    for name, config in {"Llama-2-7B": llama2, "Llama-3-8B": llama3}.items():
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        ours = renderer.decoder_config(name)
        assert renderer.key_value_bytes(ours) == 2 * values
        assert renderer.cache_bytes(ours) == 2 * config.hidden_size
        condensed = renderer.decoder_config(name, cross_attention_share_key_value=True)
        assert renderer.cache_bytes(condensed) == 2 * 2 * config.num_key_value_heads * config.head_dim
    # the paper's figures: 512 KiB and 8 KiB
    assert renderer.key_value_bytes(renderer.decoder_config("Llama-2-7B")) == 512 * 1024
    assert renderer.cache_bytes(renderer.decoder_config("Llama-2-7B")) == 8 * 1024
    small = renderer.decoder_config("SmolLM2-135M")
    assert renderer.key_value_bytes(small) == 23_040
    assert renderer.cache_bytes(small) == 1_152
    # one float16 scale for 64 values, and for int4 a zero beside it
    assert renderer.cache_bytes(small, "int8") == 576 + 2 * 9
    assert renderer.cache_bytes(small, "int4") == 576 / 2 + 4 * 9


def test_named_tests_exist():
    """`file::test` of the table of decoding modes; `::test` alone is of the file named before it."""
    named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", (ROOT / "README.md").read_text())
    assert len(named) > 30
    file = None
    for given, function in named:
        file = given or file
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), f"{file}::{function}"


def test_unknown_tables_are_named(renderer):
    with pytest.raises(ValueError, match="table 'weather'; known are bytes, demo"):
        renderer.render("<!-- table: weather -->\nx\n<!-- end -->")
