"""What the tests of serving share: a tiny random model with a tokenizer of bytes, and what `generate` answers."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn
from conftest import scale, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from xcllama.store import ContextStore

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TEXTS = {
    f"manual-{i}": f"Part {i} turns {'left' if i % 2 else 'west'} at {i * 37:03d} degrees. " * (1 + i % 3)
    for i in range(8)
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; id 0 pads, id 1 ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {token: index + 2 for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load_tiny(seed: int = 0, **fields) -> tuple[XCLlamaForCausalLM, XCLlamaProcessor]:
    """A float32 model whose every token and context changes what it writes, and which never ends by itself."""
    base = tiny_llama(seed, vocab_size=258, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None)
    scale(base.parameters(), 15)
    torch.manual_seed(seed)
    fields = {"cross_attention_layers": [1, 3], "cross_attention_gate": None} | fields
    model = XCLlamaForCausalLM.from_decoder(base, init="random", **fields)
    scale((weight for _, weight in model.added_parameters()), 20)
    model.model.context_fingerprint()
    return model, XCLlamaProcessor(byte_tokenizer())


def generated(model, processor, question: str, cache, num_tokens: int, history=None, system=None) -> list[int]:
    """What `generate` answers, greedily."""
    inputs = processor(
        text=[question], history=None if history is None else [history], system=system, return_tensors="pt"
    )
    output = model.generate(**inputs, context_cache=cache, max_new_tokens=num_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


KEYS = "sk-alpha alpha\nsk-beta beta\nsk-old beta 2020-01-01\n"


def answer_of(model, processor, store: ContextStore, question: str, documents: list[str], num_tokens: int, **turns):
    """The text that `generate` answers from documents of a store."""
    cache = None
    if documents:
        cache = store.get(sorted(documents))
        cache = cache.join([range(len(cache))])
    return processor.decode(
        generated(model, processor, question, cache, num_tokens, **turns), skip_special_tokens=True
    )


@contextmanager
def served(app) -> Iterator[str]:
    """The URL of `app` on loopback, served from a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
