"""Added weights: their code is in the installed package xcllama, their base is named in config.json."""

from xcllama.models import ContextQuestionAnsweringPipeline, XCLlamaConfig, XCLlamaForCausalLM, XCLlamaProcessor

__all__ = ["ContextQuestionAnsweringPipeline", "XCLlamaConfig", "XCLlamaForCausalLM", "XCLlamaProcessor"]
