"""One answer as its tokens come: chosen from logits, turned into text, ended by a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_xcllama.answer_scores import answer_score


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Args:
        max_new_tokens: at most.
        temperature: 0: the likeliest token, as `generate(do_sample=False)`.
        top_p: share of the probability to draw from.
        seed: of the draws; None: another one each time.
        stop: strings that end the answer; they are no part of it.
        top_logprobs: alternatives to report with each token's log-probability; None: report nothing.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass
class Piece:
    """What an answer has grown by.

    Args:
        text: new text.
        logprobs: of new tokens, as OpenAI's API has them.
        finish_reason: "stop" or "length" in the last piece.
        score: in the last piece, how sure the answer is (`answer_score`).
        weights: in the last piece where asked for, the attention over the context's tokens, `[num_tokens]`.
        error: why the answer ends without a finish reason: "timeout", "unreadable" or "stopped".
    """

    text: str = ""
    logprobs: list[dict] | None = None
    finish_reason: str | None = None
    score: float | None = None
    weights: Tensor | None = None
    error: str | None = None


class Answer:
    """The tokens of one answer and their text.

    Args:
        tokenizer: of the decoder.
        end_tokens: ids that end an answer.
        sampling: how tokens are chosen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int], sampling: Sampling):
        self.tokens: list[int] = []
        self._tokenizer, self._end_tokens, self._sampling = tokenizer, frozenset(end_tokens), sampling
        # tokens up to `_read` are text; those from `_window` on are decoded again with what follows them
        self._window, self._read, self._decoded, self._held = 0, 0, "", ""
        self._logprobs_of_tokens: list[float] = []
        self._generator: torch.Generator | None = None
        self._warpers = []
        if sampling.temperature:
            self._generator = torch.Generator()
            self._generator.seed() if sampling.seed is None else self._generator.manual_seed(sampling.seed)
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def add(self, logits: Tensor) -> Piece:
        """Choose the next token from `logits` `[vocabulary]`."""
        scores = logits.float()
        token = int(scores.argmax())
        if self._generator is not None:
            warped = scores[None]
            for warper in self._warpers:
                warped = warper(None, warped)
            token = int(torch.multinomial(warped[0].softmax(-1).cpu(), 1, generator=self._generator))
        normalizer = scores.logsumexp(-1)
        self._logprobs_of_tokens.append(float(scores[token] - normalizer))
        self.tokens.append(token)
        logprobs = None
        if self._sampling.top_logprobs is not None and token not in self._end_tokens:
            logprobs = [self._logprobs(token, scores - normalizer)]
        if token in self._end_tokens:
            return self._last(Piece(logprobs=logprobs, finish_reason="stop"))
        delta = self._new_text()
        self._decoded += delta
        piece = Piece(self._unheld(delta), logprobs)
        if piece.text is None:
            piece.text, self._held, piece.finish_reason = self._held, "", "stop"
            piece.score = self.score
        elif len(self.tokens) == self._sampling.max_new_tokens:
            piece.finish_reason = "length"
            return self._last(piece)
        return piece

    @property
    def score(self) -> float:
        """How sure the answer is, by its tokens so far."""
        return answer_score(torch.tensor(self._logprobs_of_tokens))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _new_text(self) -> str:
        """What the tokens say that were not read yet; nothing where they may end within a character."""
        text = self._decode(self.tokens[self._window :])
        if text.endswith("\ufffd"):
            return ""
        known = self._decode(self.tokens[self._window : self._read])
        self._window, self._read = self._read, len(self.tokens)
        return text[len(known) :]

    def _unheld(self, delta: str) -> str | None:
        """The text that can be shown; None: a stop string is there, and what comes before it is held."""
        text = self._held + delta
        found = [place for stop in self._sampling.stop if (place := text.find(stop)) >= 0]
        if found:
            self._held = text[: min(found)]
            return None
        # what may be the beginning of a stop string waits
        keep = max(
            (n for stop in self._sampling.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _last(self, piece: Piece) -> Piece:
        """The last piece, with what was still held: parts of characters, beginnings of stop strings."""
        whole = self._decode(self.tokens)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        shown = self._unheld(rest)
        piece.text += self._held if shown is None else shown + self._held
        piece.score = self.score
        return piece

    def _logprobs(self, token: int, scores: Tensor) -> dict:
        best = scores.topk(self._sampling.top_logprobs) if self._sampling.top_logprobs else None
        pairs = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return self._entry(token, float(scores[token])) | {"top_logprobs": [self._entry(*pair) for pair in pairs]}

    def _entry(self, token: int, logprob: float) -> dict:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
