"""Token ids of prompts, answers and passages; the templates themselves are the processor's."""

from collections.abc import Sequence

from modeling_xcllama import XCLlamaProcessor

Turn = tuple[str, str]
Encoded = tuple[list[int], slice]


class Prompts:
    """What the decoder and the encoder read.

    Args:
        processor: of the model; its chat template, where it has one, frames the questions.
    """

    def __init__(self, processor: XCLlamaProcessor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        # ChatML ends a turn with its own token, base models with the end of the text
        self.end_token_id = self.tokenizer.eos_token_id
        # a template ends where the answer starts; without one a space parts them
        self._before_answer = "" if processor.chat_template else " "
        self.pad_token_id = self.end_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def prompt_ids(
        self, question: str, history: Sequence[Turn] = (), passages: Sequence[str] | None = None
    ) -> Encoded:
        """(ids of the prompt, where the question stands in them); `passages` go in front of the question."""
        text = question if passages is None else "\n\n".join([*passages, question])
        prompt = self.processor.prompts([text], [list(history)])[0]
        special = not self.processor.chat_template
        encoding = self.tokenizer(prompt, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        start = prompt.rindex(question)
        end = start + len(question)
        inside = [
            index for index, (first, last) in enumerate(encoding["offset_mapping"]) if start <= first < last <= end
        ]
        where = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
        return encoding["input_ids"], where

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer and the token that ends it."""
        encoding = self.tokenizer(self._before_answer + answer, add_special_tokens=False)
        return [*encoding["input_ids"], self.end_token_id]

    def answer_offsets(self, answer: str) -> list[tuple[int, int]]:
        """The characters of an answer that each of its `answer_ids` but the last stands for."""
        space = len(self._before_answer)
        encoding = self.tokenizer(self._before_answer + answer, add_special_tokens=False, return_offsets_mapping=True)
        return [(max(0, first - space), last - space) for first, last in encoding["offset_mapping"]]

    def context_ids(self, passage: str) -> list[int]:
        """Ids of a passage, as the processor gives them to what encodes it."""
        return self.processor(contexts=[passage])["context_input_ids"][0]

    def context_offsets(self, passage: str) -> list[tuple[int, int]]:
        """The characters of a passage that each of its `context_ids` stands for."""
        return self.processor(contexts=[passage], return_offsets_mapping=True)["context_offset_mapping"][0]
