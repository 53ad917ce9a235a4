"""The offline class, on the default model."""

from __future__ import annotations

import pytest
from octavo.scheduler.sampling_params import InvalidRequest, SamplingParams
from octavo.server.llm import LLM

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", kv_cache_memory=2**28, max_num_seqs=8)


def test_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = ["The capital of France is", "1, 2, 3, 4, 5,", "def add(a, b):\n    return"]
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6), progress=False)
    assert [result.completions[0].finish_reason for result in results] == ["length"] * 3
    assert results[0].completions[0].text.startswith(" Paris")
    assert results[1].completions[0].text.startswith(" 6")
    one = llm.generate(prompts[1], SamplingParams(temperature=0, max_tokens=6), progress=False)
    assert one[0].completions == results[1].completions


def test_token_prompts_own_params_samples_and_stops(llm: LLM) -> None:
    ids = llm.tokenizer.encode("1, 2, 3, 4, 5,", add_special_tokens=False)
    results = llm.generate(
        [ids, ids],
        [
            SamplingParams(temperature=0, max_tokens=20, stop=("8",)),
            SamplingParams(n=3, seed=1, max_tokens=4, logprobs=1),
        ],
        progress=False,
    )
    stopped = results[0].completions[0]
    assert stopped.text == " 6, 7, "
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "8")
    assert [completion.index for completion in results[1].completions] == [0, 1, 2]
    for completion in results[1].completions:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
    assert not llm._client.core.scheduler.requests


def test_more_prompts_than_seats(llm: LLM) -> None:
    results = llm.generate(["Hello"] * 20, SamplingParams(temperature=0, max_tokens=3), progress=True)
    assert len({result.completions[0].text for result in results}) == 1


def test_chat_uses_the_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0))
    assert answer.completions[0].text == "The capital of France is Paris."
    assert answer.completions[0].finish_reason == "stop"


def test_what_cannot_be_served_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["fine", []], SamplingParams(max_tokens=2), progress=False)
    with pytest.raises(ValueError, match="as many"):
        llm.generate(["a", "b"], [SamplingParams()], progress=False)
    assert llm._client.num_open_requests == 0
    assert llm.generate([], progress=False) == []
