import json

import pytest
from transformers import AutoConfig, BertConfig

from modeling_xcllama import XCLlamaConfig

SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_defaults_follow_the_decoder():
    config = XCLlamaConfig(**SMALL)
    assert config.cross_attention_layers == [2]
    assert (config.cross_attention_num_heads, config.cross_attention_num_key_value_heads) == (4, 2)
    assert (config.cross_attention_head_dim, config.cross_attention_hidden_size) == (16, 64)
    assert (config.context_width, config.context_layout) == (64, "hidden")


def test_json_round_trip(tmp_path):
    config = XCLlamaConfig(
        **SMALL,
        cross_attention_layers=[1, 3],
        cross_attention_hidden_size=32,
        cross_attention_num_heads=8,
        cross_attention_gate="tanh",
        cross_attention_share_key_value=True,
        context_layer=1,
        encoder_config=BertConfig(hidden_size=48, num_hidden_layers=3),
        cross_attn_implementation="eager",
    )
    config.save_pretrained(tmp_path)
    loaded = XCLlamaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.encoder_config, BertConfig)
    assert (loaded.context_width, loaded.context_layout) == (48, "condensed")
    # the backend is chosen at load time, never written
    assert "cross_attn_implementation" not in json.loads((tmp_path / "config.json").read_text())
    assert loaded.cross_attn_implementation == "auto"
    assert (
        XCLlamaConfig.from_pretrained(tmp_path, cross_attn_implementation="sdpa").cross_attn_implementation == "sdpa"
    )


def test_auto_config_loads_it(tmp_path):
    XCLlamaConfig(**SMALL).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).model_type == "xcllama"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_attention_layers": [4]}, r"\[0, 3\].*got \[4\]"),
        ({"cross_attention_layers": [-1]}, r"got \[-1\]"),
        ({"cross_attention_layers": [2, 2]}, "distinct"),
        ({"cross_attention_layers": [2, 1]}, "increasing"),
        ({"cross_attention_layers": []}, "at least one"),
        ({"cross_attention_num_heads": 3, "cross_attention_num_key_value_heads": 2}, "multiple.*got 3 and 2"),
        ({"cross_attention_hidden_size": 33}, "multiple of `cross_attention_num_heads`"),
        ({"cross_attention_hidden_size": 32, "cross_attention_head_dim": 16}, "= 64, got 32"),
        ({"cross_attention_head_dim": 5, "cross_attention_rope": True}, "even"),
        ({"cross_attention_norm": "batch_norm"}, "'rms_norm', 'layer_norm', got 'batch_norm'"),
        ({"cross_attention_gate": "sigmoid"}, "'scalar', 'tanh', got 'sigmoid'"),
        ({"cross_attn_implementation": "cuda"}, "got 'cuda'"),
        ({"cross_attention_dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"cross_attention_intermediate_size": 0}, "positive or None"),
        ({"context_max_length": 0}, "positive, got 0"),
        ({"context_layer": 5}, r"\[0, 4\].*got 5"),
        ({"sliding_window": 0}, "positive or None"),
        ({"cross_attention_layer": [1]}, "no field .*cross_attention_layer"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        XCLlamaConfig(**SMALL, **fields)
