"""The one boundary at which every front end's requests are validated against the running engine."""

from __future__ import annotations

from ...scheduler.sampling_params import InvalidRequest
from .messages import EngineReady, GenerateRequest

MAX_CACHE_SALT_CHARS = 1024


def check_request(request: GenerateRequest, engine: EngineReady) -> None:
    """Raises InvalidRequest for a request that this engine can never serve, before anything is allocated."""
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequest("the prompt must not be empty", param="prompt")
    # Length first: it is O(1), and a prompt of millions of ids ends here.
    max_tokens = request.params.max_tokens
    wanted = num_prompt_tokens + (1 if max_tokens is None else max_tokens)
    if num_prompt_tokens > engine.max_model_len or wanted > engine.max_model_len:
        asked = "" if max_tokens is None else f" and asks for {max_tokens} more"
        raise InvalidRequest(
            f"the model's context is {engine.max_model_len} tokens; the prompt has {num_prompt_tokens}{asked}",
            param="prompt" if max_tokens is None else "max_tokens",
            code="context_length_exceeded",
        )
    low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
    if low < 0 or high >= engine.vocab_size:
        raise InvalidRequest(
            f"the prompt holds token id {low if low < 0 else high}, outside the vocabulary of {engine.vocab_size}",
            param="prompt",
        )
    request.params.check_against(vocab_size=engine.vocab_size, max_num_seqs=engine.max_num_seqs)
    if len(request.cache_salt) > MAX_CACHE_SALT_CHARS or "\0" in request.cache_salt:
        raise InvalidRequest(
            f"cache_salt may have at most {MAX_CACHE_SALT_CHARS} characters and no NUL", param="cache_salt"
        )
    if not -(2**31) <= request.priority < 2**31:
        raise InvalidRequest("priority must be a 32-bit integer", param="priority")
