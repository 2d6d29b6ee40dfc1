"""Bodies of requests. What the server does not do is refused, not ignored, unless it changes no answer."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names that a session may have."""
Learn = Literal["all", "read", "written", "none"]
"""The names in ``settings.LEARN``."""


class Body(BaseModel):
    """A request's body; unknown fields are refused, and texts with half a surrogate pair, which is not a character."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("a text has half a surrogate pair in it, or lists are nested too deep") from None
        return values


class Sampled(Body):
    """Sampling settings: OpenAI's and this library's."""

    max_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float | None, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int | None, Field(ge=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    seed: Annotated[int | None, Field(ge=0, lt=1 << 62)] = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = False

    def options(self, most: int, default: int) -> dict[str, Any]:
        """Return options as ``Session.generate`` takes them."""
        given = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "temperature": 1.0,
            **self.model_dump(include=given, exclude_none=True),
            "stop": [s for s in stop if s],
            "max_new_tokens": min(default if self.max_tokens is None else self.max_tokens, most),
        }


class StreamOptions(BaseModel):
    """OpenAI's options of a stream; those that only pad it are accepted."""

    include_usage: bool | None = False


class OpenAI(Sampled):
    """Fields that both OpenAI routes take."""

    model: str
    n: Annotated[int | None, Field(ge=1)] = 1
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None


def _as_text(content: Any) -> Any:
    """Join OpenAI's content parts to one text; only text parts are known."""
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(part["text"] for part in content)
    return content


class Message(BaseModel):
    """One message of a conversation, text only."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]

    def plain(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ResponseFormat(BaseModel):
    """Only text."""

    type: Literal["text"]


class Chat(OpenAI):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default"] | None = None


class Completion(OpenAI):
    """``POST /v1/completions``."""

    prompt: str | list[int] | Annotated[list[str | list[int]], Field(max_length=64)]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[Any]:
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and prompt and not all(isinstance(part, int) for part in prompt)
        return prompt if several else [prompt]


class SessionHeaders(BaseModel):
    """Headers of OpenAI's routes: a session, the version it must be at, and what it learns of this request."""

    x_session_id: Annotated[str, Field(pattern=ID)] | None = None
    x_session_version: int | None = None
    x_session_learn: Learn | None = None


class NewSession(Body):
    """``POST /v1/sessions``."""

    id: Annotated[str, Field(pattern=ID)] | None = None
    frozen: bool | None = None
    learn: Learn | None = None


class AtVersion(Body):
    """Compare and set: the request holds only if the session is at this version."""

    if_version: Annotated[int | None, Field(ge=0)] = None


class Fork(AtVersion):
    """``POST /v1/sessions/ID/fork``."""

    id: Annotated[str, Field(pattern=ID)] | None = None


class Freeze(AtVersion):
    """``POST /v1/sessions/ID/freeze``."""

    frozen: bool = True


class Rollback(AtVersion):
    """``POST /v1/sessions/ID/rollback``; ``version`` left out: the one saved last."""

    version: Annotated[int | None, Field(ge=0)] = None


class Read(AtVersion):
    """``POST /v1/sessions/ID/read``."""

    text: str
    stream: bool = False
    learn: Literal["all", "read", "none"] | None = None


class ScoreRequest(Body):
    """``POST /v1/sessions/ID/score``."""

    text: str
    losses: bool = False


class Ask(Sampled):
    """``POST /v1/sessions/ID/ask``."""

    question: str
    temperature: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0


class Export(Body):
    """``POST /v1/sessions/ID/export``."""

    rank: Annotated[int | None, Field(ge=1)] = 16
