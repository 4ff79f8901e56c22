"""Local re-exports; a Hub model repo holds the files beside this one, not this one."""

from .configuration_xcllama import XCLlamaConfig
from .context_cache import ContextCache, ProjectedContext
from .modeling_xcllama import XCLlamaForCausalLM, XCLlamaModel
from .processing_xcllama import XCLlamaProcessor

__all__ = [
    "ContextCache",
    "ProjectedContext",
    "XCLlamaConfig",
    "XCLlamaForCausalLM",
    "XCLlamaModel",
    "XCLlamaProcessor",
]
