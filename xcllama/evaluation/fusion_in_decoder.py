"""The lm-eval model `fid`: Fusion-in-Decoder (Izacard and Grave, 2021), the paper's encoder-decoder baseline.

A T5 encodes every context together with the question, apart from the others; the decoder attends to all of them.
"""

from functools import partial
from time import perf_counter
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

from xcllama.evaluation.contexts import contexts_of
from xcllama.evaluation.cost import Cost, measured
from xcllama.evaluation.decoding import FirstLogits, synchronize

# the authors' checkpoints wrap the encoder and each of its blocks once more
KEY_MAPPING = {r"^encoder\.encoder\.": "encoder.", r"^(encoder\.block\.\d+)\.module\.": r"\1."}


@register_model("fid")
class FusionInDecoderLM(HFLM):
    """A T5 that reads all contexts of a document at once, each encoded with the question.

    Args:
        pretrained: T5 folder or Hub id with safetensors weights, of Transformers or of the FiD authors.
        context_length: most tokens of a context with its question; longer ones are cut.
        options: of `HFLM`.

    Raises:
        ValueError: a model that is no T5.
    """

    def __init__(self, pretrained: str, context_length: int = 250, **options: Any):
        self.context_length = int(context_length)
        super().__init__(pretrained, **options, use_safetensors=True, key_mapping=KEY_MAPPING)
        if self.config.model_type not in ("t5", "mt5"):
            raise ValueError(f"model `fid` needs a T5, {pretrained} is a {self.config.model_type!r}; use `xcllama`.")
        if hasattr(self, "accelerator"):
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            self._device = self.accelerator.device
            self.model.to(self._device)

    def passages(self, request: Instance) -> list[str]:
        """What the encoder reads: the authors' format, earlier turns of a conversation in front of the question."""
        turns = [part for turn in request.doc["history"] for part in (turn["question"], turn["answer"])]
        question = " ".join([*turns, request.doc["question"]])
        pairs = zip(request.doc["titles_list"], contexts_of(request), strict=True)
        return [f"question: {question} title: {title} context: {text}" for title, text in pairs]

    @torch.no_grad()
    def encode(self, passages: list[str]) -> tuple[torch.Tensor, int]:
        """Encoder states of all passages in a row `[1, tokens, width]`, and the number of passage tokens."""
        inputs = self.tokenizer(
            passages, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        ).to(self.device)
        states = self.model.get_encoder()(**inputs).last_hidden_state
        kept = states[inputs["attention_mask"].bool()]
        return kept[None], len(kept)

    def _respond(self, request: Instance, act) -> Any:
        """The response of `act(encoder outputs)`, which adds the time of the first logits and the generated tokens."""
        start = perf_counter()
        states, tokens = self.encode(self.passages(request))
        response, first, generated = act(BaseModelOutput(last_hidden_state=states))
        cost = Cost(tokens, tokens, generated_tokens=generated, time_to_first_token=first - start)
        return measured(response, cost)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`; one document at a time."""
        return [
            self._respond(request, partial(self._answer, dict(request.args[1])))
            for request in tqdm(requests, desc="Generating", disable=self.rank != 0)
        ]

    def _answer(self, options: dict, encoded: BaseModelOutput) -> tuple[str, float, int]:
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        stop = handle_stop_sequences(options.pop("until", None), eos=None)
        most, first = options.pop("max_gen_toks"), FirstLogits(self.device)
        if not options.get("do_sample"):
            options.pop("temperature", None)
        # neither ends nor pads inside: every row is one document
        output = self.model.generate(
            encoder_outputs=encoded, max_new_tokens=most, logits_processor=[first], **options
        )[0].tolist()
        synchronize(self.device)
        text = postprocess_generated_text(self.tok_decode(output), stop, None)
        return text, first.time, len(output) - 1

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`: of the continuation alone, from the decoder's start."""
        return [
            self._respond(request, partial(self._score, request.args[1].strip()))
            for request in tqdm(requests, desc="Scoring", disable=self.rank != 0)
        ]

    @torch.no_grad()
    def _score(self, continuation: str, encoded: BaseModelOutput) -> tuple[tuple[float, bool], float, None]:
        labels = self.tokenizer(continuation, return_tensors="pt").input_ids.to(self.device)
        logits = self.model(encoder_outputs=encoded, labels=labels).logits[0].float().log_softmax(-1)
        value = logits.gather(1, labels[0][:, None]).sum().item()
        return (value, bool((logits.argmax(-1) == labels[0]).all())), perf_counter(), None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not defined for an encoder-decoder that was trained to answer.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("model `fid` has no rolling log-likelihood; leave perplexity tasks out.")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        count = sum(weight.numel() for weight in self.model.parameters())
        return {"model_num_parameters": count, "model_dtype": str(self.model.dtype), "context_mode": "fid"}
