"""Schemas of requests and answers, and the error messages of invalid requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, StrictStr

from gflowtrl.catalog_change import ChangeReport
from gflowtrl.recommender import Step


Item = StrictInt | StrictStr
ITEM = "a whole number or a string"
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0  # beyond these, tempered logits lose too much precision in float32
TEMPERATURE = f'a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE} (1 with strategy "beam")'


class Request(BaseModel):
    """Base class of requests. A field's description completes the error message "FIELD must be ..."."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendRequest(Request):
    histories: list[list[Item]] = Field(
        min_length=1, description=f"a list of at least one history, each a list of items, {ITEM} each"
    )
    k: int = Field(10, ge=1, description="a whole number of at least 1, the length of the lists")
    strategy: Literal["beam", "sample"] = Field("beam", description='"beam" or "sample"')
    temperature: float = Field(
        1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, allow_inf_nan=False, description=TEMPERATURE
    )
    seed: int = Field(0, description="a whole number")
    exclude_seen: bool = Field(False, description="true or false")
    allowed_items: list[Item] | None = Field(
        None, min_length=1, description=f"a list of at least one item, {ITEM} each, or be left out"
    )


class ExplainRequest(Request):
    history: list[Item] = Field(min_length=1, description=f"a list of at least one item, {ITEM} each")
    item: Item = Field(description=f"an item, {ITEM}")


class NewItem(BaseModel):
    """An item to add. All other fields are its features."""

    model_config = ConfigDict(extra="allow", strict=True)
    item: Item
    title: StrictStr | None = None
    text: StrictStr | None = None
    semantic_id: list[StrictStr] | None = None


class CatalogRequest(Request):
    add: list[NewItem] = Field(
        default=[], description=f'a list of objects, each with "item" ({ITEM}) and with features such as "title"'
    )
    retire: list[Item] = Field(default=[], description=f"a list of items, {ITEM} each")


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)  # built from the recommender's dataclasses


class RecommendedItem(Answer):
    item: Item
    title: str | None
    probability: FiniteFloat


class RecommendAnswer(Answer):
    recommendations: list[list[RecommendedItem]]
    warnings: list[str]


class ExplainAnswer(RecommendedItem):
    steps: list[Step]
    shares_id_with: list[Item]
    teacher_probability: FiniteFloat | None
    teacher_rank: int | None
    warnings: list[str]


@dataclass(frozen=True)
class CatalogAnswer(ChangeReport):
    """What a change did, and the seconds that it took."""

    seconds: float


class Health(BaseModel):
    ready: bool
    model: str
    items: int
    catalog_version: int
    version: str
    problem: str | None = None  # why the server is not ready


class Problem(BaseModel):
    """The body of every error answer: one sentence."""

    detail: str


# ------------------------------------------------------------------------------------------------------ error messages
def repr_json(value: Any) -> str:
    """Format a value of a request as JSON of at most 60 characters."""
    text = json.dumps(value)  # ASCII, because a lone surrogate cannot be encoded in an answer
    return text if len(text) <= 60 else f"{text[:60]}..."


def format_error(model: type[Request], error: dict[str, Any]) -> str:
    """Return a sentence about one of pydantic's errors: the field, its value and what is expected."""
    names = ", ".join(model.model_fields)
    _, *loc = error["loc"]  # ("body", field, index, ..., branch of a union)
    if error["type"] == "json_invalid":
        return f"The body cannot be read as JSON (error at character {loc[0]}); send a JSON object in UTF-8."
    if not loc:
        return f"The body is not a JSON object of type application/json; send one with the fields {names}."
    name, *inner = loc
    if error["type"] == "extra_forbidden":
        return f"{repr_json(name)} is not a field of this request; its fields are {names}."
    expected = model.model_fields[name].description
    if error["type"] == "missing" and not inner:
        return f"{name} is missing; it must be {expected}."
    index = "".join(f"[{part}]" for part in inner if isinstance(part, int))
    return f"{name}{index} is {repr_json(error['input'])}; {name} must be {expected}."
