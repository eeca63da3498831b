"""Requests and answers, and what is said of a request that is none."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, StrictStr


Item = StrictInt | StrictStr
ITEM = "a whole number or a text"
COLDEST, HOTTEST = 0.01, 100.0  # beyond, logits divided by the temperature leave what float32 tells apart


class Request(BaseModel):
    """What a client sends; a field's description says what is expected in the sentence about a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendRequest(Request):
    histories: Annotated[
        list[list[Item]],
        Field(min_length=1, description=f"a list of at least one history, each a list of items, {ITEM} each"),
    ]
    k: Annotated[int, Field(ge=1, description="a whole number of at least 1, the length of the lists")] = 10
    strategy: Annotated[Literal["beam", "sample"], Field(description='"beam" or "sample"')] = "beam"
    temperature: Annotated[
        float, Field(ge=COLDEST, le=HOTTEST, allow_inf_nan=False,
                     description=f"a number from {COLDEST} to {HOTTEST}, other than 1 only with strategy \"sample\"")
    ] = 1.0  # fmt: skip
    seed: Annotated[int, Field(description="a whole number")] = 0
    exclude_seen: Annotated[bool, Field(description="true or false")] = False
    allowed_items: Annotated[
        list[Item] | None,
        Field(min_length=1, description=f"a list of at least one item, {ITEM} each, or be left out"),
    ] = None


class ExplainRequest(Request):
    history: Annotated[list[Item], Field(min_length=1, description=f"a list of at least one item, {ITEM} each")]
    item: Annotated[Item, Field(description=f"an item, {ITEM}")]


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)  # made of what the recommender returns


class RecommendedItem(Answer):
    item: Item
    title: str | None
    probability: FiniteFloat


class RecommendAnswer(Answer):
    recommendations: list[list[RecommendedItem]]
    warnings: list[str]


class ExplainedStep(Answer):
    token: str
    probability: FiniteFloat
    rank: int
    choices: int


class ExplainAnswer(RecommendedItem):
    steps: list[ExplainedStep]
    shares_id_with: list[Item]
    teacher_probability: FiniteFloat | None
    teacher_rank: int | None
    warnings: list[str]


class Health(BaseModel):
    ready: bool
    model: str
    items: int
    version: str
    problem: str | None = None  # what is wrong with the model


class Problem(BaseModel):
    """The body of every answer that is an error: one sentence."""

    detail: str


# ------------------------------------------------------------------------------------------------------------ mistakes
def repr_json(value: Any) -> str:
    """A value as it stands in a request, cut where it is long."""
    text = json.dumps(value)  # ASCII: half a surrogate pair could not be sent back
    return text if len(text) <= 60 else f"{text[:60]}..."


def format_error(model: type[Request], error: dict[str, Any]) -> str:
    """What is wrong with a request and what is expected, of the first of pydantic's errors."""
    names = ", ".join(model.model_fields)
    _, *place = error["loc"]  # ("body", field, index, ..., branch of a union)
    if error["type"] == "json_invalid":
        return f"The body cannot be read as JSON, from character {place[0]} on; send a JSON object in UTF-8."
    if not place:
        return f"The body is no JSON object of type application/json; send one with the fields {names}."
    name, *inner = place
    if error["type"] == "extra_forbidden":
        return f"{repr_json(name)} is no field of this request; its fields are {names}."
    expected = model.model_fields[name].description
    if error["type"] == "missing":
        return f"{name} is missing; give {expected}."
    where = "".join(f"[{index}]" for index in inner if isinstance(index, int))
    return f"{name}{where} is {repr_json(error['input'])}; {name} must be {expected}."
