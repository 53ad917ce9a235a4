"""What every handler needs, made once per app, and the few things they do with it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..scheduler.sampling_params import SamplingParams
from .chat_template import ChatTemplate, ChatTemplateError
from .config import ServerConfig
from .engine.admission import MAX_CACHE_SALT_CHARS
from .engine.client import EngineClient, EngineState, EngineUnavailable
from .engine.messages import EngineReady, GenerateRequest
from .errors import RETRY_AFTER_DRAINING_S, invalid, model_not_found
from .metrics import Metrics
from .outputs import GenerationStream
from .request_metrics import RequestMetrics
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

INLINE_ENCODE_CHARS = 16_384
"""Longer texts are tokenised on a thread, so that other clients' streams do not pause."""


class TemplateMessage(Protocol):
    """One turn of a conversation, as a request body holds it."""

    @property
    def num_chars(self) -> int:
        """About how much text it is."""

    def for_template(self) -> dict[str, Any]: ...


class ServerState:
    """The app's engine, tokenizer, settings and measurements."""

    def __init__(
        self,
        client: EngineClient,
        config: ServerConfig,
        tokenizer: Tokenizer,
        generation_defaults: Mapping[str, float],
    ) -> None:
        self.client = client
        self.config = config
        self.tokenizer = tokenizer
        self.generation_defaults = generation_defaults
        self.chat_template = _make_chat_template(tokenizer)
        self.metrics = Metrics(client, prefix=config.metrics_prefix, model_name=self.model_name)
        self.draining = False
        """Set on SIGTERM: open requests run on, new ones get 503."""
        self.created = int(time.time())
        self._salt_secret = secrets.token_bytes(32)
        self._busy_since = 0.0
        """When the first of the requests now open came: an idle engine's silence is no stall."""
        self._num_open_generations = 0

    @property
    def model_name(self) -> str:
        return self.config.served_model_names[0]

    @property
    def num_open_generations(self) -> int:
        """Streams submitted and not yet closed: the engine may be done with one whose text is still being sent."""
        return self._num_open_generations

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.config.served_model_names:
            raise model_not_found(name)

    def why_not_ready(self) -> str | None:
        """None when requests are being served, else the reason in one line."""
        client = self.client
        if self.draining:
            return "the server is shutting down"
        if client.state is not EngineState.READY:
            reason = f": {client.dead_reason}" if client.dead_reason else ""
            return f"the engine is {client.state.value}{reason}"
        silence_s = time.monotonic() - max(client.last_message_at, self._busy_since)
        if client.num_open_requests and silence_s > self.config.engine_stall_timeout_s:
            return f"the engine has said nothing for {silence_s:.0f} s, with {client.num_open_requests} requests open"
        return None

    def require_engine(self) -> EngineReady:
        """What the engine derived at start. Raises EngineUnavailable if no request can be taken now."""
        client = self.client
        if self.draining:
            raise EngineUnavailable("the server is shutting down", retry_after_s=RETRY_AFTER_DRAINING_S)
        if client.state is not EngineState.READY or client.ready is None:
            raise EngineUnavailable(f"the engine is {client.state.value}", retry_after_s=5)
        return client.ready

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return (await self.encode_all([text], add_special_tokens=add_special_tokens))[0]

    async def encode_all(self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool) -> list[list[int]]:
        """The token ids of each prompt; those that are ids already are left alone."""

        def work() -> list[list[int]]:
            encode = self.tokenizer.encode
            return [
                prompt if isinstance(prompt, list) else encode(prompt, add_special_tokens=add_special_tokens)
                for prompt in prompts
            ]

        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return work() if num_chars <= INLINE_ENCODE_CHARS else await asyncio.to_thread(work)

    async def render_chat(
        self, messages: Sequence[TemplateMessage], *, add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> str:
        """The prompt text of a conversation; 400 if the model's template has none for it."""

        def work() -> str:
            return self.chat_template.render(
                [message.for_template() for message in messages],
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )

        num_chars = sum(message.num_chars for message in messages)
        try:
            return work() if num_chars <= INLINE_ENCODE_CHARS else await asyncio.to_thread(work)
        except ChatTemplateError as error:
            raise invalid(str(error), "messages") from error

    def cache_salt(self, api_key: bytes | None, requested: str | None) -> str:
        """Prefix blocks are shared within a key only; the secret keeps salts unguessable across restarts too."""
        salt = requested or ""
        if len(salt) > MAX_CACHE_SALT_CHARS or "\0" in salt:
            # Checked here, because the engine sees only the digest.
            raise invalid(f"cache_salt may have at most {MAX_CACHE_SALT_CHARS} characters and no NUL", "cache_salt")
        if api_key is None:
            return salt
        # The key's own digest has a fixed length, so that no (key, salt) pair can spell another.
        message = hashlib.sha256(api_key).digest() + salt.encode()
        return hmac.new(self._salt_secret, message, hashlib.sha256).hexdigest()

    def submit(self, request: GenerateRequest) -> GenerationStream:
        """Hand a request to the engine. Raises InvalidRequest or EngineUnavailable; close what is returned."""
        self.require_engine()
        if not self.client.num_open_requests:
            self._busy_since = time.monotonic()
        stream = self.client.submit(request)
        try:
            observer = RequestMetrics(self.metrics, request.params, len(request.prompt_token_ids))
            generation = GenerationStream(
                self.client, request, stream, self.tokenizer, observer, on_close=self._generation_closed
            )
        except BaseException:
            self.client.release(request.request_id)
            raise
        self._num_open_generations += 1
        return generation

    def _generation_closed(self) -> None:
        self._num_open_generations -= 1

    def default(self, name: str, value: float | None, neutral: float) -> float:
        """A sampling parameter as asked for, else as the model's authors recommend, else without effect."""
        if value is not None:
            return value
        return self.generation_defaults.get(name, neutral)

    def check_fan_out(self, num_prompts: int, params: SamplingParams) -> None:
        """Refuse, before anything is allocated, more samples than could ever run and wait at once."""
        engine = self.require_engine()
        if params.n > engine.max_num_seqs:
            params.check_against(vocab_size=engine.vocab_size, max_num_seqs=engine.max_num_seqs)
        limit = engine.max_num_seqs + engine.max_num_waiting
        if num_prompts * params.n > limit:
            raise invalid(f"{num_prompts} prompts of {params.n} samples exceed the limit of {limit} samples", "prompt")


def _make_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """A template that does not compile must not keep completions from being served: chat alone is refused."""
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    except ChatTemplateError as error:
        logger.error("chat is not available: %s", error)
        return ChatTemplate(None, None, None)
