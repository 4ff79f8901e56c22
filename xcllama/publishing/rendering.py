"""Cards from templates: a slot without a value, an empty section or a broken header is an error, never published."""

import re
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from xcllama.provenance import caption

FOLDER = files("xcllama.templates")
HEADER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
EMPTY_SLOT = re.compile(r"\{\{|\{%|\[More Information Needed\]|\bNone\b|\bnan\b|``(?!`)|\(\)")


def render(template: str, values: dict[str, Any]) -> str:
    """The card of a template of model_cards/, checked by `check_card`.

    Raises:
        ValueError: a slot without a value, or a card that does not pass.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, finalize=_filled, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals["caption"] = caption
    try:
        text = environment.get_template(template).render(values)
    except (UndefinedError, ValueError) as error:
        raise ValueError(f"{template} has an empty slot: {error}.") from error
    check_card(text, template)
    return text


def _filled(value: Any) -> Any:
    if value is None or value == "":
        raise ValueError("a value is None or empty")
    return value


def check_card(text: str, name: str) -> dict[str, Any]:
    """The header of a card whose every section holds something.

    Raises:
        ValueError: no header, no licence, an empty slot or an empty section.
    """
    match = HEADER.match(text)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: the header is no YAML: {error}.") from error
    if not isinstance(header, dict) or not header.get("license"):
        raise ValueError(f"{name}: a card begins with a YAML header that has at least `license`.")
    if empty := [key for key, value in header.items() if value is None or value == [] or value == ""]:
        raise ValueError(f"{name}: the header has no value for {', '.join(empty)}.")
    # code is no prose: braces and parentheses stand for themselves there
    body = re.sub(r"```.*?```", "code", text[match.end() :], flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]+`", "code", body)
    if slot := EMPTY_SLOT.search(prose):
        line = prose[: slot.start()].count("\n")
        raise ValueError(f"{name}: an empty slot ({slot[0]}) in the line {prose.splitlines()[line]!r}.")
    sections = re.split(r"^(#{1,6}) +(.*)$", body, flags=re.MULTILINE)[1:]
    levels, titles, contents = sections[::3], sections[1::3], sections[2::3]
    for index, (level, title, content) in enumerate(zip(levels, titles, contents, strict=True)):
        has_parts = index + 1 < len(levels) and len(levels[index + 1]) > len(level)
        if not content.strip() and not has_parts:
            raise ValueError(f"{name}: the section {title!r} is empty; fill it or leave it out.")
    return header
