"""`POST /catalog`: new requests get the new catalog, those before keep the old one, and none fails."""

import asyncio
import gc
import json
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.test_catalog_change import NEW, make_item_tokenizer, make_recommender

from .world import assert_refused


pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("httpx2", reason="FastAPI's test client needs httpx2, of the extra `test`")

from fastapi.testclient import TestClient  # noqa: E402

from gflowtrl.recommender import Recommender  # noqa: E402
from gflowtrl.serving import Limits, create_app, serve  # noqa: E402
from gflowtrl.serving import catalog as catalog_module  # noqa: E402
from gflowtrl.serving.batching import Worker  # noqa: E402
from gflowtrl.serving.catalog import LivingCatalog  # noqa: E402
from gflowtrl.serving.messages import CatalogRequest  # noqa: E402


TOKEN = "0123456789abcdef-secret"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
BODY = {"add": [{"item": item, **row} for item, row in NEW.items()], "retire": [3, 39]}


def start(recommender: Recommender | None = None, limits: Limits | None = None) -> TestClient:
    recommender = make_recommender() if recommender is None else recommender
    return TestClient(create_app(recommender, limits, TOKEN))


def change(client: TestClient, body: dict | None = None):
    text = json.dumps(BODY if body is None else body)  # in ASCII, so that half characters arrive
    return client.post("/catalog", content=text, headers={**AUTHORIZED, "Content-Type": "application/json"})


def probabilities_of(client: TestClient, history: list) -> dict:
    answer = client.post("/recommend", json={"histories": [history], "k": 60})
    assert answer.status_code == 200, answer.text
    return {one["item"]: one["probability"] for one in answer.json()["recommendations"][0]}


@pytest.mark.parametrize("collisions", ["reassign", "level"])
def test_answers_are_those_of_the_changed_recommender(collisions):
    def make():
        return make_recommender(make_item_tokenizer(collisions))

    features = NEW | {200 + n: {"title": "red ink"} for n in range(15)}  # with "level", more collisions than before
    body = {"add": [{"item": item, **row} for item, row in features.items()], "retire": [3, 39]}
    oracle = make()
    oracle = oracle.with_change(oracle.plan_change(features, [3, 39]))
    with start(make()) as client:
        before = client.get("/health").json()
        answer = change(client, body)
        assert answer.status_code == 200, answer.text
        report = answer.json()
        assert report.pop("seconds") > 0
        if collisions == "level":  # "reassign" needs new tokens only where an id takes a code that no item had
            assert report["new_tokens"] > 0
        assert report == oracle.plan_change(retire=[0]).report.as_dict() | {
            "added": 18, "retired": 2, "items": 56, "leaves": 56, "version": 2,
            "new_tokens": len(oracle.tokenizer) - len(make().tokenizer),
        }  # fmt: skip
        for history in ([7, 11], [3, 100]):  # a retired item and a new one
            expected = {one.item: math.exp(one.log_prob) for one in oracle.recommend([history], k=60)[0]}
            assert probabilities_of(client, history) == pytest.approx(expected, rel=1e-4)
        after = client.get("/health").json()
        assert (before["items"], before["catalog_version"]) == (40, 1)
        assert (after["items"], after["catalog_version"], after["ready"]) == (56, 2, True)
        text = client.get("/metrics").text
        assert "gflowtrl_catalog_swaps_total 1.0" in text
        assert 'gflowtrl_requests_total{path="/catalog",status="200"} 1.0' in text
        explained = client.post("/explain", json={"history": [3], "item": 100}).json()
        assert explained["title"] == "red ink"
        assert_refused(
            client.post("/explain", json={"history": [7], "item": 3}), 422, "not in the catalog of 56 items"
        )


def test_a_replaced_catalog_needs_no_garbage_collection():
    """The server keeps collections away from the model and the catalog (`gc.freeze`)."""
    old = make_recommender(make_item_tokenizer("reassign"))
    parts = [weakref.ref(part) for part in (old, old.catalog, old.catalog.tree, old.encoder, old.policy)]
    gc.disable()
    try:
        new = old.with_change(old.plan_change(NEW, [3]))
        assert new.recommend([[7]], k=3)
        del old
        assert [part() for part in parts] == [None] * 5
    finally:
        gc.enable()


def test_a_server_frees_replaced_catalogs_without_a_garbage_collection(tmp_path, monkeypatch):
    """What `serve` freezes is never collected, so a cycle that leads to an old catalog would keep it for ever."""
    uvicorn, httpx2 = pytest.importorskip("uvicorn"), pytest.importorskip("httpx2")
    make_recommender().save_pretrained(tmp_path)
    servers, old = [], []
    run, with_change = uvicorn.Server.run, Recommender.with_change

    def run_and_record(server, sockets):
        servers.append(server)
        run(server, sockets=sockets)

    def change_and_record(recommender, planned):
        parts = (recommender, recommender.catalog, recommender.catalog.tree, recommender.policy)
        old.extend(weakref.ref(part) for part in parts)
        return with_change(recommender, planned)

    monkeypatch.setattr(uvicorn.Server, "run", run_and_record)
    monkeypatch.setattr(Recommender, "with_change", change_and_record)
    serving = threading.Thread(target=serve, args=(tmp_path,), kwargs={"port": 0, "catalog_token": TOKEN})
    serving.start()
    wait_for(lambda: servers and servers[0].started)
    port = servers[0].servers[0].sockets[0].getsockname()[1]
    gc.disable()
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            for body in (BODY, {"retire": [7]}, {"retire": [8]}):
                assert change(client, body).status_code == 200
                assert probabilities_of(client, [11])  # the model's thread keeps its last job until the next one
        assert len(old) == 12 and [part() for part in old] == [None] * 12
    finally:
        gc.enable()
        servers[0].should_exit = True
        serving.join(10)


def test_items_come_back(client):
    old = probabilities_of(client, [7, 11])
    assert change(client).status_code == 200
    back = {"add": [{"item": 3}, {"item": 39}], "retire": [100, 101, 102]}
    answer = change(client, back).json()
    assert (answer["restored"], answer["added"], answer["retired"], answer["version"]) == (2, 0, 3, 3)
    assert probabilities_of(client, [7, 11]) == pytest.approx(old, rel=1e-4)


@pytest.fixture
def client():
    with start() as client:
        yield client


def test_it_is_off_without_a_token():
    with TestClient(create_app(make_recommender())) as client:
        answer = client.post("/catalog", json=BODY, headers=AUTHORIZED)
        assert_refused(answer, 404, "nothing at this path")
        assert 'path="other",status="404"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": "Bearer"}, 403),
        ({"Authorization": "Bearer "}, 403),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 403),
        ({"Authorization": f"Bearer {TOKEN}x"}, 403),
        ({"Authorization": "Bearer \xe9"}, 403),
        ({"Authorization": f"bearer {TOKEN}"}, 200),
    ],
)  # fmt: skip
def test_only_the_token_opens_it(client, headers, status):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = client.post("/catalog", json={"retire": [3]}, headers=headers)
    assert answer.status_code == status, answer.text
    assert client.get("/health").json()["catalog_version"] == (2 if status == 200 else 1)
    if status != 200:
        assert_refused(answer, status, "token")
        assert_refused(client.post("/catalog", json={"retire": "x"}, headers=headers), status, "token")  # says no more
        assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "The change is empty"),
        ([], 422, "not a JSON object"),
        ({"add": [{"item": 3, "title": "x"}]}, 409, "Item 3 is in the catalog already"),
        ({"retire": [99]}, 409, "Item 99 cannot be retired, because it is not in the catalog"),
        ({"retire": list(range(40))}, 409, "Every item would be retired"),
        ({"add": [{"item": 100}]}, 422, "Item 100 has no text"),
        ({"add": [{"title": "x"}]}, 422, r"add\[0\] is .*; add must be a list of objects, each with \"item\""),
        ({"add": [{"item": 1.5, "title": "x"}]}, 422, r"add\[0\] is 1.5; add must be"),
        ({"add": [{"item": 100, "title": 7}]}, 422, r"add\[0\] is 7; add must be"),
        ({"add": [{"item": 100, "title": "x"}] * 2}, 422, "add has the item 100 twice"),
        ({"add": [{"item": "B1", "title": "x"}]}, 422, "Item 'B1' is of type str"),
        ({"add": [{"item": 2**64, "title": "x"}]}, 422, "64 bits"),
        ({"add": [{"item": 100, "title": "\ud800"}]}, 422, "half a character"),
        ({"retire": [[3]]}, 422, r"retire\[0\] is \[3\]; retire must be a list of items"),
        ({"remove": [3]}, 422, '"remove" is not a field of this request; its fields are add, retire'),
        ({"retire": list(range(100, 111))}, 413, "has 11 items, but this server allows at most 10"),
    ],
)  # fmt: skip
def test_wrong_changes_are_refused_and_change_nothing(body, status, message):
    limits = Limits(max_catalog_items=10) if status == 413 else Limits()
    recommender = REFUSING
    with start(recommender, limits) as client:
        assert_refused(change(client, body), status, message)
        health = client.get("/health").json()
        assert (health["items"], health["catalog_version"], health["ready"]) == (40, 1, True)
        assert "gflowtrl_catalog_swaps_total 0.0" in client.get("/metrics").text


REFUSING = make_recommender()


def test_only_clients_with_the_token_may_send_long_bodies():
    body = {"add": [{"item": 100, "title": "red ink", "description": "long " * 1000}]}
    with start(limits=Limits(max_body_bytes=1000, max_catalog_bytes=20_000)) as client:
        assert_refused(client.post("/catalog", json=body), 413, "more than 1000 bytes")
        assert_refused(
            change(client, {"add": [body["add"][0] | {"text": "x" * 20_000}]}), 413, "more than 20000 bytes"
        )
        assert change(client, body).status_code == 200


def test_requests_in_flight_keep_the_old_catalog_and_none_fails():
    """While clients ask all the time, items come and go; each answer is that of one of the versions."""
    oracles = {1: make_recommender()}
    oracles[2] = oracles[1].with_change(oracles[1].plan_change(NEW, [3, 39]))
    expected = {
        version: {one.item: math.exp(one.log_prob) for one in oracle.recommend([[7, 11]], k=60)[0]}
        for version, oracle in oracles.items()
    }
    failures, seen, stop = [], set(), threading.Event()

    def ask(client: TestClient) -> None:
        while not stop.is_set():
            answer = client.post("/recommend", json={"histories": [[7, 11]], "k": 60})
            if answer.status_code != 200:
                failures.append(answer.text)
                return
            found = {one["item"]: one["probability"] for one in answer.json()["recommendations"][0]}
            right = [v for v, wanted in expected.items() if found == pytest.approx(wanted, rel=1e-3)]
            if not right:
                failures.append(found)
            seen.update(right)

    back = {"add": [{"item": 3}, {"item": 39}], "retire": list(NEW)}
    with start() as client, ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, client) for _ in range(6)]
        try:
            for number in range(6):
                answer = change(
                    client, [BODY, back][number % 2] if number != 2 else {**BODY, "add": [{"item": i} for i in NEW]}
                )
                assert answer.status_code == 200, answer.text
                time.sleep(0.1)
        finally:
            stop.set()
        for future in asking:
            future.result()
    assert not failures and seen == {1, 2}


def test_requests_before_the_swap_are_not_batched_with_those_after_it(monkeypatch):
    """The model's thread is busy; the requests that wait before and after the change have equal settings."""
    recommend, busy, may_go = Recommender.recommend, threading.Event(), threading.Event()

    def slow(self, histories, **options):
        if options.get("k") == 1 and not may_go.is_set():
            busy.set()
            assert may_go.wait(20)
        return recommend(self, histories, **options)

    with start(limits=Limits(max_wait_ms=50.0)) as client, ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(Recommender, "recommend", slow)
        first = pool.submit(client.post, "/recommend", json={"histories": [[7]], "k": 1})
        assert busy.wait(20)
        before = pool.submit(probabilities_of, client, [7, 11])
        wait_for(lambda: queue_length(client) == 1)
        changing = pool.submit(change, client)
        wait_for(lambda: queue_length(client) == 2)
        assert client.get("/health").json()["catalog_version"] == 1
        may_go.set()
        assert changing.result().status_code == 200 and first.result().status_code == 200
        assert 3 in before.result() and 100 not in before.result()
        assert 100 in probabilities_of(client, [7, 11])


def queue_length(client: TestClient) -> float:
    return next(float(line.split()[1]) for line in client.get("/metrics").text.splitlines()
                if line.startswith("gflowtrl_queue_length "))  # fmt: skip


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_change_at_a_time(monkeypatch):
    plan, planning, may_go = catalog_module._plan, threading.Event(), threading.Event()

    def slow(*arguments):
        planning.set()
        assert may_go.wait(20)
        return plan(*arguments)

    monkeypatch.setattr(catalog_module, "_plan", slow)
    with start() as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(change, client)
        assert planning.wait(20)
        answer = change(client, {"retire": [5]})
        assert_refused(answer, 409, "Another change of the catalog is being made")
        assert answer.headers["retry-after"]
        assert probabilities_of(client, [7])  # answered meanwhile
        may_go.set()
        assert first.result().json()["version"] == 2
        assert change(client, {"retire": [5]}).json()["version"] == 3


def test_a_change_is_completed_if_the_client_hangs_up():
    async def hang_up() -> tuple[bool, LivingCatalog]:
        worker = Worker(Limits(), lambda rows: None)
        worker.start()
        served = LivingCatalog(make_recommender(), worker, lambda: None)
        request = asyncio.ensure_future(served.change(CatalogRequest(retire=[3]), Limits()))
        await asyncio.sleep(0)
        request.cancel()
        (result,) = await asyncio.gather(request, return_exceptions=True)
        await served._changing
        worker.stop()
        return isinstance(result, asyncio.CancelledError), served

    was_canceled, served = asyncio.run(hang_up())
    assert was_canceled and 3 not in served.recommender.catalog and served.recommender.catalog.version == 2


def test_the_memory_of_earlier_catalogs_is_freed():
    recommender = make_recommender()
    first = weakref.ref(recommender.catalog)
    with start(recommender) as client:
        del recommender
        assert first() is not None and change(client).status_code == 200
        assert probabilities_of(client, [7])  # the model's thread keeps its last job until the next one
        gc.collect()
        assert first() is None


def test_a_change_whose_decoding_fails_is_not_used(client, monkeypatch):
    recommend = Recommender.recommend

    def fail(self, *arguments, **options):
        if self.catalog.version > 1:
            raise RuntimeError("out of memory")
        return recommend(self, *arguments, **options)

    monkeypatch.setattr(Recommender, "recommend", fail)
    assert_refused(change(client), 500, "error in the server")
    assert client.get("/health").json()["catalog_version"] == 1 and probabilities_of(client, [7])


def test_a_failed_change_with_new_tokens_can_be_made_again(monkeypatch):
    features = NEW | {200 + n: {"title": "red ink"} for n in range(15)}
    body = {"add": [{"item": item, **row} for item, row in features.items()]}
    oracle = make_recommender(make_item_tokenizer("level")).add_items(features)
    recommend, failures = Recommender.recommend, []

    def fail_once(self, *arguments, **options):
        if self.catalog.version > 1 and not failures:
            failures.append(1)
            raise RuntimeError("out of memory")
        return recommend(self, *arguments, **options)

    monkeypatch.setattr(Recommender, "recommend", fail_once)
    with start(make_recommender(make_item_tokenizer("level"))) as client:
        assert_refused(change(client, body), 500, "error in the server")
        answer = change(client, body)
        assert answer.status_code == 200 and answer.json()["new_tokens"] > 0
        expected = {one.item: math.exp(one.log_prob) for one in oracle.recommend([[7, 100]], k=60)[0]}
        assert probabilities_of(client, [7, 100]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("token", ["short", "with a space in the middle", "with\nnewline-0123456789", "é" * 20])
def test_weak_tokens_are_refused(token, tmp_path):
    with pytest.raises(ValueError, match="at least 16 printable ASCII characters"):
        create_app(REFUSING, catalog_token=token)
    with pytest.raises(ValueError, match="at least 16 printable ASCII characters"):
        serve(tmp_path, catalog_token=token)  # before the folder is read


def test_the_command_takes_the_token_from_the_environment(monkeypatch):
    from gflowtrl.cli.serve import TOKEN_VARIABLE, main

    calls = []
    monkeypatch.setattr("gflowtrl.serving.server.serve", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert main(["--model", "x"]) == 0 and calls[-1][-1] == TOKEN
    assert main(["--model", "x", "--catalog_token", "another-token-123456"]) == 0
    assert calls[-1][-1] == "another-token-123456"
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    assert main(["--model", "x"]) == 0 and calls[-1][-1] is None
