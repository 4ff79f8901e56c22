"""Local re-exports; a Hub model repo holds the files beside this one, not this one."""

from .configuration_xcllama import XCLlamaConfig
from .context_cache import ContextCache, ProjectedContext
from .evidence import find_evidence
from .modeling_xcllama import XCLlamaForCausalLM, XCLlamaModel
from .pipeline_xcllama import ContextQuestionAnsweringPipeline
from .processing_xcllama import XCLlamaProcessor

__all__ = [
    "ContextCache",
    "ContextQuestionAnsweringPipeline",
    "ProjectedContext",
    "XCLlamaConfig",
    "XCLlamaForCausalLM",
    "XCLlamaModel",
    "XCLlamaProcessor",
    "find_evidence",
]
