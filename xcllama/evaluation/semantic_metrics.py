"""Metrics that need resources: BERTScore (a local model), METEOR (nltk's WordNet). Absent ones are left out."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from dataset_builders.wheels import cache_folder
from xcllama.evaluation.metrics import Metric, answer_tokens

logger = logging.getLogger(__name__)
DEFAULT_MODEL = "all-MiniLM-L6-v2"


class BertScore:
    """BERTScore (Zhang et al., 2020): F of greedily matched token embeddings, without idf weights or rescaling.

    Args:
        model: folder or Hub id of an encoder; its last layer is used.

    Raises:
        ValueError: no such model.
    """

    def __init__(self, model: str | Path):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        except OSError as error:
            raise ValueError(
                f"`bertscore_model` {str(model)!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        self._embedded: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Unit embeddings of a text's tokens `[length, width]`, special tokens left out."""
        if text not in self._embedded:
            if len(self._embedded) > 4096:
                self._embedded.clear()
            limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
            encoding = self.tokenizer(
                text, return_tensors="pt", truncation=True, max_length=limit, return_special_tokens_mask=True
            )
            words = encoding.pop("special_tokens_mask")[0] == 0
            width = self.model.config.hidden_size
            states = self.model(**encoding).last_hidden_state[0][words] if words.any() else torch.empty(0, width)
            self._embedded[text] = torch.nn.functional.normalize(states, dim=-1)
        return self._embedded[text]

    def __call__(self, prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
        """The best F over `answers`; 0 for an empty side, 1 for two empty ones."""
        return max(self._score(self.embed(prediction), self.embed(answer)) for answer in answers)

    @staticmethod
    def _score(predicted: Tensor, answer: Tensor) -> float:
        if not len(predicted) or not len(answer):
            return float(len(predicted) == len(answer))
        similarity = predicted @ answer.T
        precision, recall = similarity.amax(1).mean().item(), similarity.amax(0).mean().item()
        return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def meteor(prediction: str, answers: Sequence[str], contexts: Sequence[str] = ()) -> float:
    """METEOR of nltk, the best over `answers`."""
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score([answer_tokens(answer) for answer in answers], answer_tokens(prediction)))


def wordnet_installed() -> bool:
    """Whether nltk finds WordNet, which METEOR needs."""
    import nltk

    for resource in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(resource)
            return True
        except LookupError:
            continue
    return False


@cache
def resource_metrics(bertscore_model: str | None = None) -> dict[str, Metric]:
    """The metrics of this module whose resources are here.

    Args:
        bertscore_model: folder or Hub id; None: all-MiniLM-L6-v2 where `make models` put it; "none": no BERTScore.
    """
    metrics: dict[str, Metric] = {}
    if bertscore_model is None:
        local = cache_folder() / "models" / DEFAULT_MODEL
        bertscore_model = str(local) if local.is_dir() else "none"
        if bertscore_model == "none":
            logger.warning(f"no BERTScore: {local} is not there; `make models` fetches it.")
    if bertscore_model != "none":
        metrics["bert_score"] = BertScore(bertscore_model)
    if wordnet_installed():
        metrics["meteor"] = meteor
    else:
        logger.info("no METEOR: nltk has no WordNet here; `python -m nltk.downloader wordnet` fetches it.")
    return metrics
