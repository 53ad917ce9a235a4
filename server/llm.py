"""Offline generation in this process: `LLM(model).generate(prompts, params)`, with the server's own engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..model.config import Device, DType, LoadFormat, ModelConfig
from ..model.weights.resolve import resolve_model
from ..scheduler.batch import TokenLogprobs
from ..scheduler.config import CacheConfig, SchedulerConfig
from ..scheduler.sampling_params import SamplingParams
from .chat_template import ChatTemplate, ChatTemplateError
from .config import EngineConfig
from .engine.client import RequestStream
from .engine.inline import InlineClient
from .engine.messages import GenerateRequest
from .outputs import GenerationFailed, TextAssembler
from .tokenizer import load_tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(slots=True)
class Completion:
    """One sample of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """The stop token included, if one ended it."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """stop | length."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for eos and length."""


@dataclass(slots=True)
class Generation:
    """What became of one prompt."""

    prompt_token_ids: list[int]
    completions: list[Completion]
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""


@dataclass(slots=True)
class _Open:
    """A prompt on its way through the engine."""

    stream: RequestStream
    text: TextAssembler
    generation: Generation

    def take(self) -> int:
        """Take in what has arrived; the number of new tokens. Raises GenerationFailed."""
        num_new = 0
        for delta in self.text.process(self.stream.take()):
            completion = self.generation.completions[delta.index]
            completion.text += delta.text
            completion.token_ids += delta.token_ids
            if delta.logprobs is not None:
                completion.logprobs = completion.logprobs or []
                completion.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
            num_new += len(delta.token_ids)
        self.generation.num_cached_tokens = self.text.num_cached_tokens
        if self.text.error is not None:
            raise GenerationFailed(self.text.error)
        return num_new


class LLM:
    """A model loaded into this process. Prompts are batched continuously over one paged K/V pool, as in the server."""

    def __init__(
        self,
        model: str | None = None,
        *,
        device: Device = "auto",
        dtype: DType = "auto",
        load_format: LoadFormat = "auto",
        kernel_backend: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 32,
        kv_cache_memory: int | None = None,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """`model` is what `octavo serve --model` takes; None is the default model. `kv_cache_memory` is in bytes.
        Raises ModelError (one line, with the mend) if the model cannot be served."""
        from .engine.startup import build_engine  # imports torch, which the HTTP process must not

        files = resolve_model(model, needs_weights=load_format != "dummy")
        self.tokenizer = load_tokenizer(files)
        core, self.ready = build_engine(
            EngineConfig(
                model=ModelConfig(
                    path=str(files.path),
                    load_format=load_format,
                    dtype=dtype,
                    device=device,
                    max_model_len=max_model_len,
                    kernel_backend=kernel_backend,
                    seed=seed,
                ),
                cache=CacheConfig(
                    block_size=block_size,
                    kv_cache_memory=kv_cache_memory,
                    enable_prefix_caching=enable_prefix_caching,
                ),
                scheduler=SchedulerConfig(
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                    # A list of prompts waits in memory anyway; only a server has to refuse.
                    max_num_waiting=2**31 - 1,
                ),
            )
        )
        self._client = InlineClient(core, self.ready)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Generation]:
        """Continue every prompt; results are in the order of the prompts.

        `params` is one for all or one for each. Raises InvalidRequest for a prompt or parameters that cannot be
        served (nothing has been generated then), GenerationFailed if the engine fails on one.
        """
        prompt_list: list[Prompt] = [prompts] if _is_prompt(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        params_list = [params or SamplingParams()] * len(prompt_list) if not isinstance(params, Sequence) else params
        if len(params_list) != len(prompt_list):
            raise ValueError(f"{len(prompt_list)} prompts need as many SamplingParams, not {len(params_list)}")
        opened: list[_Open] = []
        try:
            for prompt, one in zip(prompt_list, params_list, strict=True):
                opened.append(self._submit(prompt, one))
            self._run(opened, progress)
        finally:
            for item in opened:
                self._client.release(item.stream.request_id)
            self._client.step()  # delivers aborts; nothing is left that it could compute
        return [item.generation for item in opened]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
    ) -> Generation:
        """The assistant's answer to one conversation. Raises ChatTemplateError if the model has no chat template."""
        if self.tokenizer.chat_template is None:
            raise ChatTemplateError("this model has no chat template; use generate")
        tokenizer = self.tokenizer
        template = ChatTemplate(self.tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
        text = template.render([dict(message) for message in messages], add_generation_prompt=True)
        return self.generate(self.tokenizer.encode(text, add_special_tokens=False), params, progress=progress)[0]

    def _submit(self, prompt: Prompt, params: SamplingParams) -> _Open:
        token_ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        request = GenerateRequest(request_id=f"llm-{next(self._ids)}", prompt_token_ids=token_ids, params=params)
        text = TextAssembler(
            request, self.tokenizer, lambda sample_index: self._client.abort(request.request_id, sample_index)
        )
        generation = Generation(token_ids, [Completion(index) for index in range(params.n)])
        return _Open(self._client.submit(request), text, generation)

    def _run(self, opened: list[_Open], progress: bool) -> None:
        """Step the engine until every prompt is done."""
        pending = {item.stream.request_id: item for item in opened}
        num_tokens = 0
        with tqdm(total=len(opened), unit="prompt", disable=None if progress else True) as bar:
            while pending:
                output = self._client.step()
                for request_id in {item.request_id for item in output.outputs} if output is not None else ():
                    item = pending[request_id]
                    num_tokens += item.take()
                    if item.text.finished:
                        del pending[request_id]
                        bar.update()
                elapsed = bar.format_dict["elapsed"] or 1e-9
                bar.set_postfix_str(f"{num_tokens / elapsed:.0f} tok/s", refresh=False)


def _is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """A single prompt: text, or a flat list of ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
