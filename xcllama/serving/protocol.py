"""What requests may say, in the form of OpenAI's API; what they may not is refused, never ignored."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# what clients send without meaning it: the value that changes nothing
NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "service_tier": "auto",
    "store": False,
}
MAX_CONTEXTS = 64

Parsed = TypeVar("Parsed", bound=BaseModel)


@dataclass(eq=False)
class ApiError(Exception):
    """An error as OpenAI's API says it.

    Args:
        status: of HTTP.
        message: for the one who asked; names nothing of other tenants and no path.
        code: a short name of what is wrong.
        param: the field of the request.
        kind: of error, OpenAI's `type`.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    kind: str = "invalid_request_error"

    def body(self) -> dict:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


class Strict(BaseModel):
    """Types as JSON has them, no other fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; other kinds of parts are refused."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn. Roles "system" and "developer" may only come first."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """Of streams."""

    include_usage: bool = False


def _changes_nothing(name: str, value) -> bool:
    same = name in NEUTRAL and value == NEUTRAL[name] and isinstance(value, bool) == isinstance(NEUTRAL[name], bool)
    return value is None or same


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class ChatRequest(Strict):
    """`POST /v1/chat/completions`; `contexts`, `retrieve`, `evidence` and `decline` are ours."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    contexts: Annotated[list[Name] | None, Field(max_length=MAX_CONTEXTS)] = None
    retrieve: Annotated[int | None, Field(ge=1, le=MAX_CONTEXTS)] = None
    evidence: bool = False
    decline: bool = False

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_changes_nothing(cls, values):
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not _changes_nothing(name, value)}

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        given = self.contexts is not None, self.retrieve is not None
        rules = {
            "`max_tokens` and `max_completion_tokens` are the same: give one": self.max_tokens is not None
            and self.max_completion_tokens is not None,
            "`top_logprobs` needs `logprobs: true`": self.top_logprobs is not None and not self.logprobs,
            "`stream_options` needs `stream: true`": self.stream_options is not None and not self.stream,
            "give `contexts` or `retrieve`, not both": all(given),
            "`evidence` and `decline` need `contexts` or `retrieve`": (self.evidence or self.decline)
            and not any(given),
            "`decline` may replace the answer: leave out `logprobs`": self.decline and self.logprobs,
            "`contexts` must name each document once": len(set(self.contexts or ())) < len(self.contexts or ()),
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)
        self.turns()
        return self

    def turns(self) -> tuple[str | None, list[tuple[str, str]], str]:
        """System message, earlier (question, answer) turns, and the last question."""
        messages = list(self.messages)
        system = messages.pop(0).text if messages[0].role in ("system", "developer") else None
        roles = [message.role for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ValueError(
                "`messages` must be an optional system message, then user and assistant in turns, and "
                "end with the user's question"
            )
        texts = [message.text for message in messages]
        return system, list(zip(texts[:-1:2], texts[1:-1:2], strict=True)), texts[-1]

    @property
    def stops(self) -> tuple[str, ...]:
        """All stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ContextRequest(Strict):
    """`POST /v1/contexts`: a document to encode."""

    id: Name
    text: Annotated[str, Field(min_length=1)]
    metadata: dict = {}
    ttl: Annotated[float | None, Field(gt=0)] = None


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """A request out of the bytes of its body.

    Raises:
        ApiError: 400 that says what is wrong and where, without repeating the value.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> ApiError:
    """What is wrong first, as OpenAI's API says it."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg']}.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"`{param}` is not supported by this server: leave it out."
        return ApiError(400, message, code="unsupported_parameter", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{f'`{param}`: ' if param else ''}{message}.", code="invalid_value", param=param)


def event(data: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
