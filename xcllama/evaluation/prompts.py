"""Prompts with contexts: the same text that the LoRA-prompt baseline is trained on."""

from lm_eval.api.instance import Instance

SEPARATOR = "\n\n"


def joined_contexts(texts: tuple[str, ...]) -> str:
    """The contexts as they stand in a prompt, up to the question."""
    return "".join(text + SEPARATOR for text in texts)


def split_prompt(prompt: str, request: Instance) -> tuple[str, str]:
    """`prompt` cut in front of the document's question, where the contexts go.

    Raises:
        ValueError: the document has no question, or the prompt does not hold it.
    """
    question = request.doc.get("question") or ""
    place = prompt.rfind(question) if question else -1
    if place < 0:
        raise ValueError(
            f"the prompt of document {request.doc_id} of task {request.task_name!r} does not hold its `question` "
            f"({question[:60]!r}), so there is no place for its contexts; use context_mode=none or another task."
        )
    return prompt[:place], prompt[place:]
