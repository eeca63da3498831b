"""The HTTP interface: its answers are those of `Recommender`, and every failure has a status and a message."""

import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gflowtrl import Recommender, __version__
from gflowtrl.request import STRATEGIES
from tests.trainer.world import ITEMS

from .world import HISTORY, assert_refused, make_recommender


pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("httpx2", reason="FastAPI's test client needs httpx2, of the extra `test`")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from gflowtrl.serving import Limits, create_app  # noqa: E402
from gflowtrl.serving.app import batch_key  # noqa: E402
from gflowtrl.serving.messages import RecommendRequest  # noqa: E402


HISTORIES = [["i010"], ["short", "twin"], ["i222", "i001", "i100"], ["i111"] * 12, ITEMS[:7]]


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return make_recommender()


@pytest.fixture(scope="module")
def oracle() -> Recommender:
    """Another copy of the recommender, because nothing else may use that of a server."""
    return make_recommender()


@pytest.fixture(scope="module")
def client(recommender) -> Iterator[TestClient]:
    with TestClient(create_app(recommender)) as client:
        yield client


def assert_equal(answer, expected: list) -> None:
    """Assert the same items in the same order, and equal probabilities up to the rounding of another batch size."""
    assert answer.status_code == 200, answer.text
    lists = answer.json()["recommendations"]
    assert [[one["item"] for one in found] for found in lists] == [[r.item for r in found] for found in expected]
    assert [[one["title"] for one in found] for found in lists] == [[r.title for r in found] for found in expected]
    for found, wanted in zip(lists, expected, strict=True):
        probabilities = [math.exp(r.log_prob) for r in wanted]
        assert [one["probability"] for one in found] == pytest.approx(probabilities, rel=1e-4)


OPTIONS = [
    {},
    {"k": 3},
    {"k": 24, "exclude_seen": True},
    {"allowed_items": ["twin", "i222", "short"]},
    {"strategy": "sample", "seed": 5, "temperature": 2.5},
    {"strategy": "sample", "k": 4, "seed": 2**70, "exclude_seen": True, "allowed_items": ITEMS[:12]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_answers_are_those_of_the_recommender(client, oracle, options):
    answer = client.post("/recommend", json={"histories": HISTORIES, **options})
    assert_equal(answer, oracle.recommend(HISTORIES, **options))
    assert answer.json()["warnings"] == []


def test_every_strategy_of_the_recommender_is_offered(client):
    for strategy in STRATEGIES:
        assert client.post("/recommend", json={"histories": [HISTORY], "strategy": strategy}).status_code == 200


def test_twenty_concurrent_clients_get_the_answers_that_each_would_get_alone(recommender, oracle):
    """Beam requests with equal settings are batched; sampled requests never are."""
    requests = [
        {"histories": HISTORIES[start % 5 : start % 5 + 2], **OPTIONS[option]}
        for option in (0, 1, 2, 4, 0)
        for start in range(12)
    ]
    barrier = threading.Barrier(20)

    def post(request: dict):
        return client.post("/recommend", json=request)

    with TestClient(create_app(recommender, Limits(max_wait_ms=20.0))) as client, ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: barrier.wait(10), range(20)))
        answers = list(pool.map(post, requests))
        batches, rows = batch_numbers(client)
    for request, answer in zip(requests, answers, strict=True):
        assert_equal(answer, oracle.recommend(**request))
    assert rows == sum(len(request["histories"]) for request in requests)
    assert 12 < batches < len(requests)  # 12 requests are sampled


def test_concurrent_sampled_requests_get_equal_answers(recommender, oracle):
    request = {"histories": [HISTORY], "strategy": "sample", "k": 5, "seed": 3}
    with TestClient(create_app(recommender, Limits(max_wait_ms=20.0))) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/recommend", json=request), range(8)))
        assert batch_numbers(client) == (8, 8)
    for answer in answers:
        assert_equal(answer, oracle.recommend(**request))


def test_requests_are_batched_only_if_their_settings_are_equal():
    def key(histories: list, **options):
        return batch_key(RecommendRequest(histories=histories, **options))

    assert key([["i010"]]) == key([["i111", "i010"], ["i010"]]) != key([["i010"]], k=9)
    assert key([["i010"]], exclude_seen=True) == key([["i001"], ["i001", "i222"]], exclude_seen=True)
    assert key([["i010"]], exclude_seen=True) != key([["i010"]])
    assert key([["i010"]], strategy="sample") is key([["i010"]], allowed_items=["i010"]) is None


def batch_numbers(client: TestClient) -> tuple[int, int]:
    """Number of batches that were decoded, and of histories in them."""
    numbers = metrics_of(client)
    return int(numbers["gflowtrl_batch_histories_count"]), int(numbers["gflowtrl_batch_histories_sum"])


def metrics_of(client: TestClient, path: str = "/metrics") -> dict[str, float]:
    lines = client.get(path).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


# ------------------------------------------------------------------------------------------- unknown items and users
def test_unknown_items_are_named_in_the_answer(client, oracle):
    answer = client.post("/recommend", json={"histories": [["i010"], ["nonsense", "i010", 7]]})
    assert_equal(answer, oracle.recommend([["i010"], ["i010"]]))
    (warning,) = answer.json()["warnings"]
    assert warning == (
        'histories[1]: items that are not in the catalog of 24 items (for example "i001") were left out: '
        '"nonsense", 7.'
    )


def test_users_without_known_items_get_popular_items_and_a_warning(client, oracle):
    answer = client.post("/recommend", json={"histories": [[], ["i010"], ["?"]], "k": 4})
    assert_equal(answer, oracle.recommend([[], ["i010"], []], k=4))
    empty, left_out, unknown = answer.json()["warnings"]
    assert empty.startswith("histories[0] is empty; its list has the most popular items")
    assert left_out.startswith("histories[2]: items") and unknown.startswith("histories[2] holds no known item;")


@pytest.mark.parametrize("history", [[], ["?"]])
def test_without_counts_such_users_are_refused(history):
    with TestClient(create_app(make_recommender(counts=None))) as client:
        answer = client.post("/recommend", json={"histories": [["i010"], history]})
    assert answer.status_code == 422 and "histories[1]" in answer.json()["detail"]
    assert "no counts of training interactions" in answer.json()["detail"]


def test_explanations_are_those_of_the_recommender(client, oracle):
    answer = client.post("/explain", json={"history": ["?", *HISTORY], "item": "twin"}).json()
    expected = oracle.explain(HISTORY, "twin")
    assert answer["probability"] == pytest.approx(math.exp(expected.log_prob))
    assert [step["token"] for step in answer["steps"]] == [step.token for step in expected.steps]
    assert [step["rank"] for step in answer["steps"]] == [step.rank for step in expected.steps]
    assert answer["shares_id_with"] == ["i001"] and answer["teacher_rank"] is None
    assert answer["warnings"] == [
        'history: items that are not in the catalog of 24 items (for example "i001") were left out: "?".'
    ]


# ------------------------------------------------------------------------------------------------------------ failures
class BlockedRecommender:
    """Makes the calls of a recommender wait until `released` is set, and fail if `fails` is."""

    def __init__(self, recommender: Recommender, monkeypatch):
        self.entered, self.released, self.fails = threading.Event(), threading.Event(), False
        original = recommender.recommend

        def recommend(*args, **options):
            self.entered.set()
            assert self.released.wait(10)
            if self.fails:
                raise TypeError("broken weights")
            return original(*args, **options)

        monkeypatch.setattr(recommender, "recommend", recommend)


def test_a_full_queue_is_503_and_a_long_wait_504(recommender, monkeypatch):
    blocked = BlockedRecommender(recommender, monkeypatch)
    request = {"histories": [HISTORY], "strategy": "sample"}
    limits = Limits(max_queue=1, timeout_s=1.5)
    with TestClient(create_app(recommender, limits)) as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, "/recommend", json=request)]
        assert blocked.entered.wait(5)
        waiting.append(pool.submit(client.post, "/recommend", json=request))
        while metrics_of(client)["gflowtrl_queue_length"] < 1:
            pass
        full = client.post("/recommend", json=request)
        assert_refused(full, 503, r"The queue is full \(1 requests are waiting\). Try again later")
        assert full.headers["retry-after"] == "1"
        for future in waiting:
            assert_refused(future.result(10), 504, "was not answered within 1.5 seconds")
        blocked.released.set()
        assert client.post("/recommend", json=request).status_code == 200
        assert batch_numbers(client)[0] == 2  # the request that timed out in the queue was not decoded


def test_an_exception_of_the_model_is_500_and_the_server_continues(recommender, monkeypatch, caplog):
    blocked = BlockedRecommender(recommender, monkeypatch)
    blocked.released.set()
    blocked.fails = True
    with TestClient(create_app(recommender)) as client:
        assert_refused(
            client.post("/recommend", json={"histories": [HISTORY]}), 500, r"an error in the server \(TypeError\)"
        )
        assert "broken weights" in caplog.text
        blocked.fails = False
        assert client.post("/recommend", json={"histories": [HISTORY]}).status_code == 200


def test_an_exception_of_the_server_is_500_too(recommender, monkeypatch, caplog):
    with TestClient(create_app(recommender)) as client:
        monkeypatch.setattr(recommender, "catalog", None)
        assert_refused(
            client.post("/recommend", json={"histories": [HISTORY]}),
            500,
            r"an error in the server \(AttributeError\); see its log",
        )
        assert "POST /recommend could not be answered" in caplog.text


def test_metrics_count_what_happened(recommender):
    with TestClient(create_app(recommender)) as client:
        for k in (3, 3, -1):
            client.post("/recommend", json={"histories": [HISTORY, HISTORY], "k": k})
        client.post("/explain", json={"history": HISTORY, "item": "twin"})
        client.get("/items/1"), client.get("/items/2")
        numbers = metrics_of(client)
    assert numbers['gflowtrl_requests_total{path="/recommend",status="200"}'] == 2
    assert numbers['gflowtrl_requests_total{path="/recommend",status="422"}'] == 1
    assert numbers['gflowtrl_requests_total{path="/explain",status="200"}'] == 1
    assert numbers['gflowtrl_requests_total{path="other",status="404"}'] == 2
    assert numbers['gflowtrl_request_seconds_count{path="/recommend"}'] == 3
    assert 0 < numbers['gflowtrl_request_seconds_sum{path="/recommend"}'] < 10
    assert numbers["gflowtrl_batch_histories_count"] == 3 and numbers["gflowtrl_batch_histories_sum"] == 5
    assert numbers['gflowtrl_batch_histories_bucket{le="1.0"}'] == 1 and numbers["gflowtrl_queue_length"] == 0


@pytest.mark.parametrize("mounted", [False, True])
def test_a_path_prefix_changes_nothing(recommender, oracle, mounted):
    """The prefix of a proxy, or of another application that mounts this one and starts its worker."""
    app = outer = create_app(recommender)
    if mounted:
        outer = FastAPI(lifespan=lambda _: app.router.lifespan_context(app))
        outer.mount("/api", app)
    with TestClient(outer, root_path="" if mounted else "/api", raise_server_exceptions=False) as client:
        assert_equal(client.post("/api/recommend", json={"histories": HISTORIES}), oracle.recommend(HISTORIES))
        assert_refused(client.post("/api/recommend", json={"histories": [HISTORY], "k": 0}), 422, "k is 0; k must be")
        assert_refused(client.post("/api/explain", json={"history": HISTORY}), 422, "item is missing")
        broken = client.post("/api/recommend", content="{", headers={"content-type": "application/json"})
        assert_refused(broken, 400, "cannot be read as JSON")
        assert client.get("/api/recommend").status_code == 405 and client.get("/api/items/1").status_code == 404
        numbers = metrics_of(client, "/api/metrics")
    counted = {name: value for name, value in numbers.items() if name.startswith("gflowtrl_requests_total")}
    assert counted == {
        f'gflowtrl_requests_total{{path="{path}",status="{status}"}}': 1
        for path, status in (
            *(("/recommend", status) for status in (200, 400, 405, 422)), ("/explain", 422), ("other", 404)
        )
    }  # fmt: skip


def assert_unhealthy(client: TestClient, problem: str) -> None:
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.json()["ready"] is False
    assert answer.json()["problem"].startswith(problem)


def test_health_describes_the_model_and_its_readiness(recommender):
    app = create_app(recommender)
    assert_unhealthy(TestClient(app), "The server is starting.")
    assert_refused(TestClient(app).post("/recommend", json={"histories": [HISTORY]}), 503, "The server is starting.")
    with TestClient(app) as client:
        answer = client.get("/health")
        assert answer.status_code == 200 and "connection" not in answer.headers
        about = {"model": "", "items": 24, "catalog_version": 1, "version": __version__}
        assert answer.json() == {"ready": True, **about}
        app.state.stopping = True
        assert_unhealthy(client, "The server is stopping.")
        answer = client.post("/recommend", json={"histories": [HISTORY]})  # accepted before
        assert answer.status_code == 200 and answer.headers["connection"] == "close"
    assert_unhealthy(TestClient(app), "The server is stopping.")
    with TestClient(app) as client:  # an application can be started again
        assert client.get("/health").status_code == 200
        assert client.post("/recommend", json={"histories": [HISTORY]}).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_of_the_models_thread_is_503(recommender, monkeypatch):
    monkeypatch.setattr(recommender, "recommend", lambda histories, **_: [[]] * len(histories))
    monkeypatch.setattr("prometheus_client.Histogram.observe", lambda *_: sys.exit("a bug of the server"))
    app = create_app(recommender, Limits(timeout_s=0.5))
    with TestClient(app) as client:
        monkeypatch.undo()
        assert_refused(
            client.post("/recommend", json={"histories": [HISTORY]}), 504, "not answered within 0.5 seconds"
        )
        assert_unhealthy(client, "The model's thread has ended with an error; restart the server.")
        assert_refused(client.post("/recommend", json={"histories": [HISTORY]}), 503, "restart the server")


# ------------------------------------------------------------------------------------------- a model that computes NaN
def test_nan_in_the_weights_is_503_for_requests_and_health():
    recommender = make_recommender()
    weight = recommender.model.lm_head.weight
    kept = weight.detach().clone()
    with TestClient(create_app(recommender)) as client:
        assert client.get("/health").status_code == 200
        with torch.no_grad():
            weight[:] = float("nan")
        for path, body in (
            ("/recommend", {"histories": [HISTORY]}),
            ("/explain", {"history": HISTORY, "item": "i222"}),
        ):
            assert_refused(client.post(path, json=body), 503, "NaN or infinity in its weight 'lm_head.weight'")
            answer = client.get("/health")
            assert answer.status_code == 503 and answer.json()["ready"] is False
            assert "'lm_head.weight'" in answer.json()["problem"]
        with torch.no_grad():
            weight[:] = kept
        assert client.post("/recommend", json={"histories": [HISTORY]}).status_code == 200
        assert client.get("/health").json().keys() == {"ready", "model", "items", "catalog_version", "version"}


def test_health_is_503_before_the_first_request_to_a_broken_model():
    recommender = make_recommender()
    recommender.model.model.norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with TestClient(create_app(recommender)) as client:
        answer = client.get("/health")
    assert answer.status_code == 503 and "overflow" in answer.json()["problem"]
