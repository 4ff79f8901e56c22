"""XCLlamaProcessor: contexts and questions (text) to ids; the one home of the prompt templates."""

import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .checkpoints import added_weights_tokenizers, is_added_weights

# a new version refuses caches made with the old one: raise it when `context_text` changes
TEMPLATE_VERSION = "1"
# a fast tokenizer keeps padding and truncation of its last call: two threads would cut each other's texts
_tokenizing = threading.Lock()


class XCLlamaProcessor(ProcessorMixin):
    """Tokenizes contexts for the encoder and questions for the decoder.

    Args:
        tokenizer: of the decoder.
        context_tokenizer: of what encodes the contexts; the decoder's own where the decoder encodes.
        context_max_length: most tokens of a context; longer ones are refused unless `truncation=True`.
        template_version: that a saved processor had; its context template must be this code's.
        chat_template: what questions are put into, before saving and after; None: that of `tokenizer`.

    Raises:
        ValueError: another context template, or several chat templates of which none is the default.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_tokenizer: PreTrainedTokenizerBase | None = None,
        context_max_length: int = 131072,
        template_version: str = TEMPLATE_VERSION,
        chat_template: str | None = None,
    ):
        if template_version.partition("-")[0] != TEMPLATE_VERSION:
            raise ValueError(
                f"this processor was saved with template version {template_version!r}, the code has "
                f"{TEMPLATE_VERSION!r}; load the code of the same revision."
            )
        chat_template = tokenizer.chat_template if chat_template is None else chat_template
        if isinstance(chat_template, dict):
            if "default" not in chat_template:
                raise ValueError(f"name one `chat_template`: none of {', '.join(chat_template)} is the default.")
            chat_template = chat_template["default"]
        # an empty one is none
        super().__init__(tokenizer, chat_template=chat_template or None)
        self._encoder_tokenizer = context_tokenizer
        self.context_max_length = context_max_length

    @property
    def template_version(self) -> str:
        """Version of the context template and digest of the chat template: stores of contexts compare it."""
        return f"{TEMPLATE_VERSION}-{hashlib.sha256((self.chat_template or '').encode()).hexdigest()[:8]}"

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        contexts: str | Sequence[str] | None = None,
        *,
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        question_in_context: bool = False,
        add_generation_prompt: bool = True,
        system: str | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
    ) -> BatchEncoding:
        """Ids of questions (`input_ids`, left-padded) and of contexts (`context_input_ids`, right-padded).

        Args:
            text: questions, put into the chat template (or used as they are where the tokenizer has none).
            contexts: texts to encode.
            history: earlier (question, answer) turns of each question.
            question_in_context: put the question before its context in what is encoded.
            add_generation_prompt: end the prompt where the answer starts.
            system: system message of the chat template; None: the template's own.
            padding: as in a tokenizer.
            truncation: cut contexts longer than `context_max_length`; without it they are an error.
            return_tensors: "pt", or None for lists.
            return_offsets_mapping: also give `context_offset_mapping`, the character span of every context token.

        Raises:
            ValueError: nothing to do, an empty list, counts that differ, or a context that is too long.
        """
        if text is None and contexts is None:
            raise ValueError("give `text` (questions), `contexts`, or both.")
        questions = [text] if isinstance(text, str) else text
        documents = [contexts] if isinstance(contexts, str) else contexts
        for name, values in (("text", questions), ("contexts", documents)):
            if values is not None and (len(values) == 0 or not all(isinstance(value, str) for value in values)):
                raise ValueError(f"`{name}` must be a string or a non-empty list of strings, got {values!r:.80}.")
        encoding: dict = {}
        if questions is not None:
            prompts = self.prompts(questions, history, add_generation_prompt, system)
            special = not self.chat_template
            encoding |= self._tokenize(self.tokenizer, prompts, "left", padding, return_tensors, special)
        if documents is not None:
            if question_in_context:
                if questions is None or len(questions) != len(documents):
                    raise ValueError("`question_in_context=True` needs one question in `text` for each context.")
                documents = [
                    f"{question}\n\n{document}" for question, document in zip(questions, documents, strict=True)
                ]
            encoding |= self._contexts(documents, padding, truncation, return_tensors, return_offsets_mapping)
        return BatchEncoding(encoding)

    def prompts(
        self,
        questions: Sequence[str],
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        add_generation_prompt: bool = True,
        system: str | None = None,
    ) -> list[str]:
        """The prompt of each question, as text.

        Raises:
            ValueError: another number of histories than of questions.
        """
        turns = [[]] * len(questions) if history is None else history
        if len(turns) != len(questions):
            raise ValueError(f"`history` must have one entry a question ({len(questions)}), got {len(turns)}.")
        if not self.chat_template:
            return [
                "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in earlier) + f"Question: {question}\nAnswer:"
                for question, earlier in zip(questions, turns, strict=True)
            ]
        prompts = []
        for question, earlier in zip(questions, turns, strict=True):
            messages = [] if system is None else [{"role": "system", "content": system}]
            for earlier_question, answer in earlier:
                messages.append({"role": "user", "content": earlier_question})
                messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": question})
            options = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
            prompts.append(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        return prompts

    def context_prefix(self) -> list[int]:
        """Token ids with which every prompt starts, before the question: what `XCLlamaConfig.context_prefix` takes."""
        if not self.chat_template:
            return self.tokenizer("")["input_ids"]
        marker = "question"
        head = self.prompts([marker])[0].rpartition(marker)[0]
        return self.tokenizer(head, add_special_tokens=False)["input_ids"]

    def check_prefix(self, prefix: Sequence[int] | None) -> None:
        """Raise a ValueError if prompts do not start with `prefix`, the `context_prefix` of a model's config."""
        if prefix is not None and list(prefix) != self.context_prefix():
            raise ValueError(
                f"the model's contexts were encoded behind the prefix {list(prefix)}, prompts of this chat template "
                f"start with {self.context_prefix()}; use the template that the model was trained with."
            )

    def _contexts(
        self, documents: list[str], padding, truncation: bool, return_tensors: str | None, offsets: bool
    ) -> dict:
        limit = {"truncation": True, "max_length": self.context_max_length} if truncation else {}
        encoding = self._tokenize(
            self.context_tokenizer,
            documents,
            "right",
            padding,
            return_tensors,
            True,
            return_offsets_mapping=offsets,
            **limit,
        )
        masks = encoding["attention_mask"]
        longest = max(int(sum(mask)) for mask in masks)
        if longest > self.context_max_length:
            raise ValueError(
                f"a context has {longest} tokens, `context_max_length` is {self.context_max_length}; pass "
                "`truncation=True` to cut it, or split the text and join the parts with `cache.join`."
            )
        names = {"input_ids": "context_input_ids", "attention_mask": "context_attention_mask"}
        names |= {"offset_mapping": "context_offset_mapping"} if offsets else {}
        return {new: encoding[old] for old, new in names.items()}

    @staticmethod
    def _tokenize(
        tokenizer, texts: list[str], side: str, padding, return_tensors, special_tokens: bool, **options
    ) -> BatchEncoding:
        if tokenizer.pad_token is None:
            # a padded position is masked everywhere: which token stands there does not matter
            tokenizer.pad_token = tokenizer.eos_token
        with _tokenizing:
            return tokenizer(
                texts,
                padding=padding,
                padding_side=side,
                add_special_tokens=special_tokens,
                return_tensors=return_tensors,
                return_token_type_ids=False,
                verbose=False,
                **options,
            )

    @property
    def context_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of what encodes the contexts."""
        return self._encoder_tokenizer or self.tokenizer

    # the base class would write the decoder's tokenizer twice: only a tokenizer of its own gets a subfolder

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What `ProcessorMixin` saves and loads by itself."""
        return ["tokenizer"]

    def to_dict(self) -> dict:
        """The processor's config."""
        own = {"has_context_tokenizer": self._encoder_tokenizer is not None, "template_version": self.template_version}
        return super().to_dict() | own

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, base: str | None = None, **kwargs
    ) -> "XCLlamaProcessor":
        """`ProcessorMixin.from_pretrained`, also of a folder of added weights: with its base's tokenizer.

        Args:
            base: of added weights: folder or Hub id of the decoder, in place of the one in their config.
        """
        if not is_added_weights(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config, tokenizers = added_weights_tokenizers(pretrained_model_name_or_path, base)
        processor = cls(*tokenizers, context_max_length=config.context_max_length)
        processor.check_prefix(config.context_prefix)
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> list[str]:
        """`ProcessorMixin.save_pretrained`, with an encoder's tokenizer in the subfolder context_tokenizer."""
        files = super().save_pretrained(save_directory, **kwargs)
        # the tokenizer's own, which this processor does not use
        shutil.rmtree(Path(save_directory, "additional_chat_templates"), ignore_errors=True)
        if self.chat_template is None:
            Path(save_directory, "chat_template.jinja").unlink(missing_ok=True)
        if self._encoder_tokenizer is not None:
            self._encoder_tokenizer.save_pretrained(os.path.join(save_directory, "context_tokenizer"))
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        # code beside a tokenizer is run, or asked about, where that was said
        kwargs.setdefault("trust_remote_code", False)
        arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        if (processor_dict or {}).get("has_context_tokenizer"):
            options = kwargs | {"subfolder": os.path.join(kwargs.get("subfolder", ""), "context_tokenizer")}
            arguments.append(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options))
        return arguments

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """The decoder tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """The decoder tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names that a call may return."""
        return ["input_ids", "attention_mask", "context_input_ids", "context_attention_mask"]


XCLlamaProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["XCLlamaProcessor"]
