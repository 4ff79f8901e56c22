"""Cross-attention over packed contexts, in Triton: prefill, decode, training, int8 and int4 caches.

from xcllama_kernels import cross_attention
output = cross_attention(query, key, value, offsets, context_index)
"""

from .functional import cross_attention, cross_attention_with_lse, project_quantized
from .reference import dequantize_int4, dequantize_int8

__all__ = [
    "cross_attention",
    "cross_attention_with_lse",
    "dequantize_int4",
    "dequantize_int8",
    "project_quantized",
]
