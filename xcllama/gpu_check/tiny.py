"""What a dry run takes for the decoder, the recipe and the data: random, of a few layers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xcllama.training.recipe import Recipe, recipe_from_dict
from xcllama.training.token_pool import Ragged, TokenPool

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
# as in the real recipe: every prompt starts with it
PREFIX = [7, 8]


def tiny_base(folder: Path) -> Path:
    """Write a random decoder of four layers and a tokenizer of bytes; its head size is the least of the kernels."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(fast), num_key_value_heads=2, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_recipe(base: Path) -> Recipe:
    """The parts of the real recipe: joint reading, a start in closed form, a teacher, bf16."""
    config = {"cross_attention_mode": "joint", "context_layer": 2, "context_prefix": PREFIX}
    return recipe_from_dict(
        {
            "name": "tiny",
            "model": {
                "base": str(base),
                "init": "random",
                "least_squares_passages": 4,
                "config": config | {"cross_attention_layers": [1, 3], "cross_attention_adapter_rank": 2},
            },
            "data": {"sources": {"none": 1}, "tasks": {"answer": 1}, "distractors": 1},
            "distillation": {"weight": 0.5, "hidden_weight": 1.0, "hidden_layers": [2, 4]},
            "optimization": {
                "steps": 2, "passages_per_step": 4, "questions_per_passage": 2, "context_dropout": 0.0,
                "precision": "bf16",
            },
        }
    )  # fmt: skip


def tiny_pool() -> TokenPool:
    """Twelve random passages with two questions each, and four held-out questions."""
    generator = torch.Generator().manual_seed(0)

    def random(count: int, *lengths: int, head: tuple[int, ...] = ()) -> Ragged:
        sizes = (lengths * count)[:count]
        return Ragged.of([[*head, *torch.randint(10, 200, (size,), generator=generator).tolist()] for size in sizes])

    prompts = random(24, 5, 7, head=tuple(PREFIX))
    return TokenPool(
        passages=random(12, 9, 14),
        prompts=prompts,
        answers=random(24, 2, 3),
        questions=torch.tensor([(len(PREFIX), size) for size in prompts.lengths]),
        group_passages=torch.arange(12),
        # the last questions read a passage that does not answer them
        group_own=torch.tensor([*range(11), 0]),
        group_offsets=torch.arange(0, 25, 2),
        weights=torch.ones(12),
        held_passages=random(4, 11),
        held_prompts=random(4, 5, 6, head=tuple(PREFIX)),
        held_answers=[["a"], ["b", "c"], ["d"], ["e"]],
        pad_token_id=0,
        origin={"recipe": "tiny"},
    )
