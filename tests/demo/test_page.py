"""The page through Gradio's own client, over HTTP."""

import re
import socket

import pytest

from gflowtrl.cli.demo import main
from gflowtrl.demo.run_reward import read_run_reward
from tests.demo.test_drawing import rows_of
from tests.demo.world import HISTORY, ITEMS, make_recommender, write_stage


pytest.importorskip("gradio", reason="the demo needs the extra `demo`")

import gradio  # noqa: E402
from gradio_client import Client  # noqa: E402

from gflowtrl.demo.page import create_page, launch_page  # noqa: E402


@pytest.fixture(scope="module")
def recommender():
    return make_recommender()


@pytest.fixture(scope="module")
def address(recommender, tmp_path_factory):
    reward = read_run_reward(write_stage(tmp_path_factory.mktemp("run")), recommender)
    page = create_page(recommender, reward, "a lamp shop")
    yield launch_page(page, "127.0.0.1")
    page.close(verbose=False)


@pytest.fixture
def client(address):
    return Client(address, verbose=False, analytics_enabled=False)


def add(client, item: str) -> list:
    """Find an item by its name and add it, and return the labels of the history."""
    found = client.predict(item, api_name="/find")
    history, _ = client.predict(found["choices"][0][1], api_name="/add")
    return [text for text, _ in history["choices"]]


def test_a_history_is_built_and_answered_as_the_recommender_does(client, recommender):
    assert add(client, "i010") == ["1. A lamp [i010]"]
    add(client, "i222")
    assert add(client, "twin") == ["1. A lamp [i010]", "2. Lamp <b>oil</b> [i222]", "3. Oil for a lamp [twin]"]
    listed, chosen, way = client.predict(5, "sample", 0.5, 3, True, api_name="/recommend")
    (expected,) = recommender.recommend([HISTORY], 5, strategy="sample", temperature=0.5, seed=3, exclude_seen=True)
    rows = rows_of(listed)[1:]
    assert [re.search(r"\w+(?=]|$)", row[1])[0] for row in rows] == [one.item for one in expected]
    assert all(row[-1].isdigit() for row in rows) and "target" in listed
    assert [value for _, value in chosen["choices"]] == list(range(5)) and chosen["value"] == 0
    assert way.count("<table>") == 3
    assert client.predict(1, api_name="/show_way") != way


def test_items_are_moved_and_removed(client):
    for item in ("i010", "i222", "twin"):
        add(client, item)

    def labels(name: str, position: int) -> list[str]:
        history = client.predict(position, api_name=name)
        return [re.search(r"\[(\w+)", text)[1] for text, _ in history["choices"]]

    assert labels("/up", 2) == ["i010", "twin", "i222"]
    assert labels("/down", 0) == ["twin", "i010", "i222"]
    assert labels("/remove", 1) == ["twin", "i222"]
    assert client.predict(api_name="/clear")["choices"] == []


def test_visitors_have_their_own_histories(address, client):
    add(client, "i010")
    assert add(Client(address, verbose=False, analytics_enabled=False), "twin") == ["1. Oil for a lamp [twin]"]


def test_an_empty_history_gives_popular_items_without_a_way(client):
    listed, chosen, way = client.predict(2, "beam", 1.0, 0, False, api_name="/recommend")
    assert [row[1] for row in rows_of(listed)[1:]] == [f"Oil for a lamp [{ITEMS[-1]}]", "Chair [short]"]
    assert not chosen["visible"] and way == ""


def test_a_mistake_is_a_warning_and_changes_nothing(client, monkeypatch):
    add(client, "i010")
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    client.predict(None, api_name="/up")
    assert warnings == ["No item of the history is selected. Select one in the list above the buttons."]
    assert add(client, "twin")[0] == "1. A lamp [i010]"


def test_the_page_says_what_is_not_shown(recommender, tmp_path):
    def heading(recommender, reward=None) -> str:
        page = create_page(recommender, reward, "shop")
        return next(str(block.value) for block in page.blocks.values() if isinstance(block, gradio.Markdown))

    assert "no target is shown" in heading(recommender) and "no teacher" not in heading(recommender)
    assert "no teacher's scores are shown" in heading(make_recommender(teacher=None))
    shown = heading(recommender, read_run_reward(write_stage(tmp_path), recommender))
    assert "R is the run's reward (collaborative, uniform)" in shown
    assert "Left out of R: ground_truth (it needs the logged target)" in shown


def test_nothing_is_sent_to_other_machines(recommender, monkeypatch):
    connect, hosts = socket.socket.connect, set()

    def record(self, address):
        hosts.add(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    page = create_page(recommender)
    url = launch_page(page, "127.0.0.1")
    client = Client(url, verbose=False, analytics_enabled=False)
    assert "fonts.googleapis" not in str(client.config)
    add(client, "i010")
    page.close(verbose=False)
    assert hosts <= {"127.0.0.1", "localhost", "::1"} and not page.analytics_enabled and page.share_url is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "error: port is 99999; it must be a number from 1 to 65535."),
        (["--threads", "0"], "error: threads is 0; it must be a whole number of at least 1 or None."),
        (["--host", "300.1.1.1", "--port", "7999"], "error: 300.1.1.1:7999 is not available"),
        ([], "error: /nowhere/at/all is not a folder; give the folder of a saved recommender"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["--model", "/nowhere/at/all", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--model", "/nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "is not available (Address already in use); choose another" in capsys.readouterr().err
