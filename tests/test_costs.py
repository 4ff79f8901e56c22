"""Bytes of a context token, in files and in memory, are those of what a model really makes."""

import torch
from transformers import BertConfig, GPT2Config

from modeling_xcllama import XCLlamaConfig, XCLlamaForCausalLM
from xcllama.costs import cache_bytes, key_value_bytes, projected_bytes


def test_bytes_a_token_are_what_a_request_holds(make_llama):
    """Resident bytes are those of keys and values that the model really makes."""
    for fields in ({}, {"cross_attention_share_weights": True}, {"cross_attention_share_key_value": True}):
        model = XCLlamaForCausalLM.from_decoder(make_llama().to(torch.bfloat16), **fields)
        cache = model.encode_context(torch.arange(3, 43)[None])
        assert cache_bytes(model.config) == cache.bytes_per_token
        report = model.project_context(cache).memory_report()
        assert report.key_value_bytes / 40 == projected_bytes(model.config)
    encoder = XCLlamaConfig(encoder_config=BertConfig(hidden_size=384))
    assert cache_bytes(encoder) == 768
    assert key_value_bytes(encoder) == 512 * 1024
    # twelve layers of 768 values, in a family that says nothing of groups or of the size of heads
    assert key_value_bytes(GPT2Config(), itemsize=4) == 2 * 12 * 768 * 4
