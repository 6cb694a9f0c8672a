"""The messages between client and server, version 1: JSON with PNG pictures, and how a wrong one is explained."""

import base64
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, ValidationError, field_validator, model_validator

VERSION: Literal[1] = 1
JSON_TYPE = "application/json"
MAX_PROMPT = 20_000  # characters
MAX_METADATA = 65_536  # characters of a picture's metadata as JSON; the parser allows 200 levels of nesting

Base64 = Annotated[bytes, PlainSerializer(lambda data: base64.b64encode(data).decode(), when_used="json")]


class Message(BaseModel):
    """Nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, val_json_bytes="base64", hide_input_in_errors=True
    )


class Item(Message):
    """One picture to score."""

    image: Base64  # a PNG file
    prompt: str = Field(max_length=MAX_PROMPT)
    metadata: dict[str, JsonValue] = {}

    @field_validator("metadata")
    @classmethod
    def _small_and_finite(cls, metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if len(json.dumps(metadata, allow_nan=False)) > MAX_METADATA:
            raise ValueError(f"longer than {MAX_METADATA} characters of JSON")
        return metadata


class ScoreRequest(Message):
    """Pictures to score with one reward. A request that is sent again keeps its id and is not scored twice."""

    version: Literal[1]
    request_id: str = Field(pattern="^[0-9a-f]{32}$")
    items: list[Item] = Field(min_length=1)


class Result(Message):
    """Of one picture: a finite score, or why there is none."""

    status: Literal["ok", "no_score", "bad_picture"]  # no_score: the reward gave none; bad_picture: not a whole PNG
    score: float | None

    @model_validator(mode="after")
    def _scored_if_ok(self) -> "Result":
        if (self.status == "ok") != (self.score is not None):
            raise ValueError(f"status {self.status} does not go with score {self.score}")
        return self


class ScoreAnswer(Message):
    """Scores in the order of the request's items, and what gave them."""

    version: Literal[1]
    request_id: str = Field(max_length=200)
    model: str = Field(max_length=200)  # the reward's name on the server
    config_hash: str = Field(max_length=200)  # of the reward's name, options and code version
    results: list[Result]


def explain(error: ValidationError) -> str:
    """The first few problems with their places, without the values found there."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    places = [".".join(visible(str(part), 80) for part in p["loc"]) or "message" for p in problems[:3]]
    lines = [f"{place}: {p['msg']}" for place, p in zip(places, problems, strict=False)]
    return visible("; ".join(lines), 500) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def visible(text: str, most: int) -> str:
    """A stranger's text in one line of at most about ``most`` characters, with escapes for those that do not print."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return shown if len(shown) <= most else shown[:most] + "..."
