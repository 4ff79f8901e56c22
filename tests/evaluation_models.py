"""What tests of the lm-eval model share: a tiny checkpoint that reads bytes, its base, and requests on three texts."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_xcllama import XCLlamaForCausalLM
from xcllama.evaluation.model import XCLlamaLM

CONTEXTS = ["Ann lives in Oslo.", "Bob has two red cars and a boat.", "The tower is 300 m high. It is old."]
QUESTIONS = ["Where?", "Who has what?", "Where?", "How high is it?"]
READS = [(0,), (1, 2), (2,), (0,)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
GENERATION = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    fast.chat_template = TEMPLATE
    return fast


def save_base(folder, seed: int = 0) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in base.parameters():
            # large enough for answers to depend on what was read
            weight.normal_(std=0.2) if weight.dim() == 2 else None
    base.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base")
    model = XCLlamaForCausalLM.from_decoder(base, context_layer=2, cross_attention_layers=[1, 2, 3])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.added_parameters():
            weight.normal_(std=0.3) if weight.dim() == 2 else weight.fill_(1.0) if "gate" in name else None
    model.save_cross_attention(root / "xc")
    return SimpleNamespace(base=base, xc=str(root / "xc"), root=root)


@pytest.fixture
def lm(folders):
    def build(mode: str = "cross", pretrained: str | None = None, batch_size: int = 3, **options) -> XCLlamaLM:
        return XCLlamaLM(
            pretrained or folders.xc, mode, device="cpu", dtype="float32", batch_size=batch_size, **options
        )

    return build


@pytest.fixture
def hflm(folders):
    return HFLM(pretrained=folders.base, device="cpu", dtype="float32", batch_size=2)


def document(index: int) -> dict:
    return {"question": QUESTIONS[index], "contexts_list": [CONTEXTS[i] for i in READS[index]], "history": []}


def requests(kind: str, arguments, task: str = "task") -> list[Instance]:
    return [
        Instance(kind, document(index), value, 0, metadata=(task, index, 1))
        for index, value in ((index, arguments(index)) for index in range(len(QUESTIONS)))
    ]


def plain(index: int) -> str:
    return f"Question: {QUESTIONS[index]}\nAnswer:"


def expanded(index: int) -> str:
    texts = "".join(CONTEXTS[i] + "\n\n" for i in READS[index])
    return f"Question: {texts}{QUESTIONS[index]}\nAnswer:"


def generation(prompt=plain) -> list[Instance]:
    return requests("generate_until", lambda index: (prompt(index), dict(GENERATION)))


def choices(prompt=plain) -> list[Instance]:
    return [
        request
        for continuation in (" yes", " no", " x", " y", "")
        for request in requests("loglikelihood", lambda index, c=continuation: (prompt(index), c or " Oslo."))
    ]
