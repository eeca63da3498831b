"""Malformed requests are answered with a 4xx status and a sentence that names the field, never with a 500."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .world import HISTORY, assert_refused, make_recommender


pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("httpx2", reason="FastAPI's test client needs httpx2, of the extra `test`")

from fastapi.testclient import TestClient  # noqa: E402

from gflowtrl.serving import Limits, create_app  # noqa: E402
from gflowtrl.serving.messages import RecommendRequest  # noqa: E402


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    limits = Limits(max_k=30, max_histories=6, max_history_items=40, max_body_bytes=10_000)
    with TestClient(create_app(make_recommender(), limits)) as client:
        yield client


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histories": ...}, "histories is missing; it must be a list of at least one history"),
        ({"histories": []}, r"histories is \[\]; histories must be a list of at least one history"),
        ({"histories": "i010"}, 'histories is "i010"; histories must be a list'),
        ({"histories": ["i010"]}, r'histories\[0\] is "i010"; histories must be a list'),
        ({"histories": [["i010"], [None]]}, r"histories\[1\]\[0\] is null; .* a whole number or a string"),
        ({"histories": [[1.5]]}, r"histories\[0\]\[0\] is 1.5; "),
        ({"histories": [[True]]}, r"histories\[0\]\[0\] is true; "),
        ({"histories": [["i010"]] * 7}, "histories holds 7, but this server allows at most 6"),
        ({"histories": [["i010"], ["i010"] * 41]}, r"histories\[1\] holds 41, .* at most 40 items; send the latest"),
        ({"k": 0}, "k is 0; k must be a whole number of at least 1"),
        ({"k": -3}, "k is -3; k must be a whole number of at least 1"),
        ({"k": 31}, "k is 31, but this server allows at most 30"),
        ({"k": "10"}, 'k is "10"; k must be a whole number'),
        ({"k": 2.0}, "k is 2.0; k must be a whole number"),
        ({"k": None}, "k is null; k must be a whole number"),
        ({"strategy": "greedy"}, 'strategy is "greedy"; strategy must be "beam" or "sample"'),
        ({"temperature": 2.0}, 'temperature is 2.0, but strategy "beam" does not sample'),
        ({"temperature": "warm", "strategy": "sample"}, 'temperature is "warm"; temperature must be a number'),
        ({"temperature": 0, "strategy": "sample"}, "temperature is 0; temperature must be a number from 0.01 to 100"),
        ({"temperature": -1.0, "strategy": "sample"}, "temperature is -1.0; "),
        ({"seed": 0.5}, "seed is 0.5; seed must be a whole number"),
        ({"exclude_seen": 1}, "exclude_seen is 1; exclude_seen must be true or false"),
        ({"allowed_items": []}, r"allowed_items is \[\]; allowed_items must be a list of at least one item"),
        ({"allowed_items": "i010"}, 'allowed_items is "i010"; allowed_items must be a list'),
        ({"allowed_items": ["i010", "?"]}, r'allowed_items\[1\] is "\?", which is not in the catalog of 24 items'),
        ({"num_beams": 5}, '"num_beams" is not a field of this request; its fields are histories, k, strategy'),
        ({"k": [1] * 200}, r"k is \[1, 1.*\.\.\.; k must be"),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused_with_a_sentence(client, change, message):
    request = {name: value for name, value in ({"histories": [HISTORY]} | change).items() if value is not ...}
    assert_refused(client.post("/recommend", json=request), 422, message)


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"nonsense", JSON, 400, r"The body cannot be read as JSON \(error at character 0\)"),
        (b'{"histories": [["i010"]', JSON, 400, r"The body cannot be read as JSON \(error at character 23\)"),
        (b"\xff\xfe{", JSON, 400, "The body cannot be read as JSON; send a JSON object in UTF-8"),
        (b"[" * 9_999, JSON, 400, "The body cannot be read as JSON"),
        (b'{"k": ' + b"9" * 5_000 + b"}", JSON, 400, "The body cannot be read as JSON"),
        (b"", JSON, 422, "The body is not a JSON object of type application/json; send one with the fields histories"),
        (b"[1]", JSON, 422, "The body is not a JSON object"),
        (b'{"histories": [["i010"]]}', {"content-type": "text/plain"}, 422, "object of type application/json"),
        (b'{"histories": [["i010"]], "temperature": NaN, "strategy": "sample"}', JSON, 422, "temperature is NaN;"),
        (b'{"histories": [["i010"]], "temperature": 1e999}', JSON, 422, "temperature is Infinity;"),
        (b'{"histories": [["i010"]], "\\ud800": 1}', JSON, 422, "The body is not a JSON object"),
        (b'{"histories": [["i010"]], "k": "\\ud800"}', JSON, 422, "k must be a whole number"),
        (b" " * 10_001, JSON, 413, "The body has more than 10000 bytes"),
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused_with_a_sentence(client, content, headers, status, message):
    assert_refused(client.post("/recommend", content=content, headers=headers), status, message)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"item": "twin"}, "history is missing; it must be a list of at least one item"),
        ({"history": [], "item": "twin"}, r"history is \[\]; history must be"),
        ({"history": ["i010"] * 41, "item": "twin"}, "history holds 41, but this server allows at most 40 items"),
        ({"history": ["?"], "item": "twin"}, r'history is \["\?"\], but none of its items is in the catalog'),
        ({"history": HISTORY}, "item is missing; it must be an item, a whole number or a string"),
        ({"history": HISTORY, "item": [1]}, r"item is \[1\]; item must be an item"),
        ({"history": HISTORY, "item": 3}, "item is 3, which is not in the catalog of 24 items"),
        (
            {"history": HISTORY, "item": "twin", "k": 1},
            '"k" is not a field of this request; its fields are history, item',
        ),
    ],
)
def test_malformed_explanations_are_refused_with_a_sentence(client, request_, message):
    assert_refused(client.post("/explain", json=request_), 422, message)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["i010", "sample", "", "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from([*RecommendRequest.model_fields, "item", "history"]), ANYTHING))
def test_no_json_value_causes_a_server_error(client, change):
    for path, request in (
        ("/recommend", {"histories": [HISTORY]}),
        ("/explain", {"history": HISTORY, "item": "twin"}),
    ):
        answer = client.post(path, content=json.dumps(request | change), headers=JSON)
        if answer.status_code != 200:
            assert_refused(answer, 422, "")


def test_the_size_of_chunked_bodies_is_limited_too(client):
    assert_refused(
        client.post("/recommend", content=iter([b" " * 4_000] * 30), headers=JSON), 413, "more than 10000 bytes"
    )


def test_errors_for_other_paths_and_methods_name_the_valid_ones(client):
    assert_refused(client.get("/items/3"), 404, "use POST /recommend, /explain or GET /health, /metrics")
    assert_refused(client.get("/recommend"), 405, "does not support GET; use POST")
