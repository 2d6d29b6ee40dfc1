"""The routes that OpenAI's clients call."""

import time
from itertools import accumulate
from typing import Annotated, Any
from uuid import uuid4

import torch
from fastapi import APIRouter, Header, Request

from ..session.writing import Writer
from . import work
from .journal import message_digest
from .scheduler import Finish
from .schemas import Chat, Completion, OpenAI, SessionHeaders
from .service import Service
from .settings import NotFoundError, ServeError
from .sse import Json, outcome, streamed

router = APIRouter()

Of = Annotated[SessionHeaders, Header()]


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service = Service.of(request)
    return {"object": "list", "data": [_model(service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    service = Service.of(request)
    _check_model(service, name)
    return _model(service)


@router.post("/v1/chat/completions")
async def chat(body: Chat, request: Request, session: Of) -> Any:
    """Answer a conversation. A session reads the messages that it has not read yet."""
    service = Service.of(request)
    messages = [message.plain() for message in body.messages]
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    body = body.model_copy(update={"max_tokens": limit})
    top = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise ServeError("top_logprobs needs logprobs: true")
    reply = _Reply(service, body, "chat", top, session.x_session_id)
    default, remember = service.engine.limits.new_tokens, lambda text: message_digest("assistant", text)
    return await _answer(request, reply, [service.prompts.chat(messages)], default, session, remember)


@router.post("/v1/completions")
async def completions(body: Completion, request: Request, session: Of) -> Any:
    """Continue texts, or one session."""
    service = Service.of(request)
    renders = [service.prompts.plain(prompt, service.vocabulary) for prompt in body.prompts()]
    reply = _Reply(service, body, "text", body.logprobs, session.x_session_id)
    return await _answer(request, reply, renders, 16, session)


async def _answer(
    request: Request, reply: "_Reply", renders: list[Any], default: int, session: SessionHeaders, remember: Any = None
) -> Any:
    service, body = reply.service, reply.body
    limits = service.engine.limits
    _check_model(service, body.model)
    choices = body.n or 1
    if choices * len(renders) > limits.choices:
        raise ServeError(f"{choices * len(renders)} answers wanted, this server gives at most {limits.choices} at once")
    options = body.options(limits.new_tokens, default)
    job = service.engine.begin(
        lambda job: work.answer(
            service.engine, job, request.scope["owner"], reply.session, renders, options, choices=choices,
            version=session.x_session_version, learn=session.x_session_learn, remember=remember,
            look=None if reply.top is None else _look(reply.top),
        )
    )  # fmt: skip
    if body.stream:
        return await streamed(job, request, reply.chunks, reply.last)
    answers = await outcome(job, request)
    return Json(reply.whole(answers))


def _look(top: int) -> Any:
    """Find log-probabilities of a token just chosen, and of the ``top`` likeliest ones; runs beside the model."""

    def look(writer: Writer) -> Any:
        assert writer.logits is not None
        assert writer.token is not None
        scores = writer.logits.float().log_softmax(-1)
        best = torch.topk(scores, top) if top else None
        pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return float(scores[writer.token]), pairs

    return look


class _Reply:
    """OpenAI's form of answers, as a whole and in chunks."""

    def __init__(self, service: Service, body: OpenAI, kind: str, top: int | None, session: str | None) -> None:
        self.service, self.body, self.kind, self.top, self.session = service, body, kind, top, session
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid4().hex
        self.created, self.began = int(time.time()), time.perf_counter()
        self.started: set[int] = set()
        self.offsets: dict[int, int] = {}

    def _frame(self, choices: list[Any], ending: str = "") -> dict[str, Any]:
        name = "chat.completion" + ending if self.kind == "chat" else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.body.model, "choices": choices}

    def whole(self, answers: list[work.Answered]) -> dict[str, Any]:
        """Return the body of an answer that does not stream."""
        choices = []
        for index, found in enumerate(answers):
            choice: dict[str, Any] = {"index": index, "finish_reason": _reason(found.reason)}
            choice["logprobs"] = self._logprobs(found.ids, found.looked, index)
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": found.text, "refusal": None}
            else:
                choice["text"] = found.text
            choices.append(choice)
        return self._frame(choices) | self._ending(answers)

    def chunks(self, event: Any) -> list[dict[str, Any]]:
        """Return what one event is to a client."""
        if not self.started:
            self.service.metrics.first.observe(time.perf_counter() - self.began)
        index, found = event[0], []
        if self.kind == "chat" and index not in self.started:
            found.append(self._chunk(index, {"role": "assistant", "content": ""}, None, None))
        self.started.add(index)
        if isinstance(event[1], Finish):
            found.append(self._chunk(index, {}, _reason(event[1].reason), None))
        else:
            _, piece, ids, looked = event
            logprobs = self._logprobs(ids, [looked] if ids else [], index)
            if piece or logprobs:
                found.append(self._chunk(index, {"content": piece}, None, logprobs))
        return found

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None, logprobs: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        choice |= {"delta": delta} if self.kind == "chat" else {"text": delta.get("content", "")}
        return self._frame([choice], ".chunk")

    def last(self, answers: list[work.Answered]) -> list[dict[str, Any]]:
        """Return what comes after all chunks."""
        ending, options = self._ending(answers), self.body.stream_options
        return [self._frame([], ".chunk") | ending] if options and options.include_usage else []

    def _ending(self, answers: list[work.Answered]) -> dict[str, Any]:
        """Count the tokens; return usage, and where the session is now."""
        prompts = answers[:: self.body.n or 1]
        read, wrote = sum(a.prompt_tokens for a in prompts), sum(len(a.ids) for a in answers)
        self.service.metrics.read.inc(read)
        self.service.metrics.written.inc(wrote)
        usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        session = {} if self.session is None else {"session": {"id": self.session, "version": answers[0].version}}
        return {"usage": usage} | session

    def _logprobs(self, ids: list[int], looked: list[Any], index: int) -> Any:
        if self.top is None or not ids:
            return None
        text = self.service.token_text
        if self.kind == "chat":
            return {
                "content": [
                    {**_entry(text(i), p), "top_logprobs": [_entry(text(j), q) for j, q in best]}
                    for i, (p, best) in zip(ids, looked, strict=True)
                ],
                "refusal": None,
            }
        tokens = [text(i) for i in ids]
        offsets = list(accumulate(map(len, tokens), initial=self.offsets.get(index, 0)))
        self.offsets[index] = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [p for p, _ in looked],
            "top_logprobs": [{text(j): q for j, q in best} for _, best in looked] if self.top else None,
            "text_offset": offsets,
        }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _reason(reason: str) -> str:
    """Return a Finish's reason in OpenAI's words: of "cancelled" clients must learn that the answer is not complete."""
    return "length" if reason == "cancelled" else reason


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "inplace-ttt"}


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise NotFoundError(f"there is no model {name[:100]!r} here, only {service.name!r}", code="model_not_found")
