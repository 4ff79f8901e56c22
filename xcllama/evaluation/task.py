"""`ContextTask`: an lm-eval task whose documents bring contexts; its prompts are the questions only."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from dataset_builders import NO_ANSWER
from xcllama.evaluation.cost import COST_METRICS, cost_metrics
from xcllama.evaluation.metrics import ANSWER_METRICS, Metric, no_answer_accuracy
from xcllama.evaluation.semantic_metrics import resource_metrics


class ContextTask(ConfigurableTask):
    """A task over rows of `dataset_builders`.

    With a chat template the question is the user's message and earlier turns are messages before it; without one the
    prompt is "Question: ...", "Answer:", as `XCLlamaProcessor` writes it. A generated answer is scored by every metric
    whose resources are here; with `--metadata '{"bertscore_model": FOLDER}'` another model serves BERTScore.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._answer_metrics: dict[str, Metric] | None = None

    @property
    def answer_metrics(self) -> dict[str, Metric]:
        """Metrics of generated answers, by name."""
        if self._answer_metrics is None:
            self._answer_metrics = ANSWER_METRICS | resource_metrics(
                (self.config.metadata or {}).get("bertscore_model")
            )
            if NO_ANSWER in self.task_docs["answer"]:
                self._answer_metrics |= {"no_answer_accuracy": no_answer_accuracy}
        return self._answer_metrics

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        """The prompt of a document, without its contexts.

        Raises:
            ValueError: few-shot examples are asked for.
        """
        if num_fewshot:
            raise ValueError(
                f"`num_fewshot` must be 0 for task {self.task_name!r}: an example would need its contexts."
            )
        turns = [(turn["question"], turn["answer"]) for turn in doc["history"]]
        system = "\n\n".join(part for part in (system_instruction, self.config.description) if part)
        if not apply_chat_template:
            earlier = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in turns)
            return f"{system}\n\n" * bool(system) + f"{earlier}Question: {doc['question']}\nAnswer:"
        messages = [{"role": "system", "content": system}] if system else []
        if fewshot_as_multiturn:
            for question, answer in turns:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": doc["question"]})
        else:
            earlier = "".join(f"{question}\n{answer}\n\n" for question, answer in turns)
            messages.append({"role": "user", "content": earlier + doc["question"]})
        return chat_template(messages)

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
        """Quality and cost of one document's responses."""
        if "bypass" in self._metric_fn_list or self.OUTPUT_TYPE != "generate_until":
            return super().process_results(doc, results) | cost_metrics(results[0])
        answer = results[0].strip()
        quality = {
            name: metric(answer, doc["answers"], doc["contexts_list"]) for name, metric in self.answer_metrics.items()
        }
        return quality | cost_metrics(results[0])

    def aggregation(self) -> dict[str, Callable]:
        """The mean, for all metrics of answers and of cost."""
        names = (*ANSWER_METRICS, "bert_score", "meteor", "no_answer_accuracy", *COST_METRICS)
        return dict.fromkeys(names, mean) | super().aggregation()

    def higher_is_better(self) -> dict[str, bool]:
        """Quality up, cost down; a cache hit is good."""
        quality = dict.fromkeys((*ANSWER_METRICS, "bert_score", "meteor", "no_answer_accuracy", "cache_hit"), True)
        return dict.fromkeys(COST_METRICS, False) | quality | super().higher_is_better()
