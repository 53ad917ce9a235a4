"""Field types of request bodies whose checks say one clear thing, where pydantic's unions would say five."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ...scheduler.sampling_params import MAX_LOGIT_BIAS

MAX_FIELDS = 256
MAX_MESSAGES = 16_384
MAX_CONTENT_PARTS = 4096
MAX_PROMPTS = 2048
MAX_STOPS = 4
"""OpenAI's limit."""
MAX_TOKEN_ID = 2**31 - 1

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Prompt = str | list[int]
"""Text or token ids."""

T = TypeVar("T")


class WireModel(BaseModel):
    """A JSON object of a request: no coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, value: Any) -> Any:
        """No object has so many fields, and each unknown one would cost an error record."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            # The field to blame is the first that we do not know; there is one, as no object has so many.
            unknown = next((name for name in value if name not in cls.model_fields), "")
            raise PydanticCustomError(
                "too_many_fields", f"an object may have at most {MAX_FIELDS} fields", {"field": unknown}
            )
        return value


def _fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", message)


def _all_are(values: list[Any], kind: type) -> bool:
    """By exact type: a bool is not an int here. In C, since prompts have up to millions of ids."""
    return set(map(type, values)) == {kind}


def _check_token_ids(ids: list[int]) -> list[int]:
    if min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        raise _fail("token ids must be between 0 and the size of the vocabulary")
    return ids


def parse_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or (value and not _all_are(value, int)):
        raise _fail("must be a list of integers")
    return _check_token_ids(value) if value else value


def parse_prompts(value: Any) -> list[Prompt]:
    """Every form of `prompt` as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _all_are(value, int):
            return [_check_token_ids(value)]
        if len(value) > MAX_PROMPTS:
            raise _fail(f"at most {MAX_PROMPTS} prompts are allowed in one request")
        if _all_are(value, str):
            return list(value)
        if _all_are(value, list) and all(ids and _all_are(ids, int) for ids in value):
            return [_check_token_ids(ids) for ids in value]
    raise _fail("must be a string, a list of strings, a list of token ids or a list of such lists, none empty")


def parse_content(value: Any) -> str:
    """The text of a message: a string, or text parts joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _fail("must be a string or a list of content parts")
    if len(value) > MAX_CONTENT_PARTS:
        raise _fail(f"a message may have at most {MAX_CONTENT_PARTS} content parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _fail("every content part must be an object with a type")
        if part["type"] != "text":
            raise _fail("only content parts of type 'text' are supported")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise _fail("a content part of type 'text' must have a string 'text' and nothing else")
        texts.append(part["text"])
    return "".join(texts)


def parse_stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or (value and not _all_are(value, str)):
        raise _fail("must be a string or a list of strings")
    if len(value) > MAX_STOPS:
        raise _fail(f"at most {MAX_STOPS} stop strings are allowed")
    return tuple(value)


def parse_logit_bias(value: Any) -> dict[int, float]:
    """JSON keys are strings; these must be token ids in decimal."""
    if not isinstance(value, dict):
        raise _fail("must be an object from token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise _fail(f"at most {MAX_LOGIT_BIAS} entries are allowed")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise _fail("keys must be token ids")
        if type(bias) not in (int, float):
            raise _fail("values must be numbers")
        biases[int(key)] = bias
    return biases


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}

Prompts = Annotated[list[Prompt], PlainValidator(parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
TokenIds = Annotated[
    list[int], PlainValidator(parse_token_ids), WithJsonSchema({"type": "array", "items": {"type": "integer"}})
]
Content = Annotated[
    str,
    PlainValidator(parse_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]
Stop = Annotated[
    tuple[str, ...],
    PlainValidator(parse_stop),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}
    ),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(parse_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
