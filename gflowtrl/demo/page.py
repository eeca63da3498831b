"""The page of the demo, made with Gradio, and a server for it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from html import escape
from typing import Any

import torch

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, check_number, one_line
from gflowtrl.compat import quiet_libraries
from gflowtrl.finite import NonFiniteError
from gflowtrl.hub import local_copy
from gflowtrl.recommender import Recommender

from .answers import Answer, recommend, way_to
from .drawing import CSS, draw_answer, draw_way
from .history import ItemSearch, label, moved, without
from .run_reward import RunReward, read_run_reward
from .space import model_name


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr  # noqa: E402


MOST_K = 100
HINT = '<div class="demo"><p>Build a history, then press Recommend.</p></div>'
MODEL = {"concurrency_limit": 1, "concurrency_id": "model"}  # one thread at a time uses the model
STYLE = f"""{CSS}
.demo-lines .wrap {{ flex-direction: column; align-items: stretch; flex-wrap: nowrap; }}
.demo-lines .wrap {{ max-height: 22em; overflow-y: auto; }}
"""


def create_page(recommender: Recommender, reward: RunReward | None = None, name: str = "") -> gr.Blocks:
    """Return the page of a recommender, for `launch_page`.

    Args:
        recommender: the recommender. Nothing else may use it at the same time.
        reward: the reward of the run that trained it, which is shown next to its probabilities.
        name: the model's name in the heading.
    """
    return _Page(recommender, reward, name).blocks


def launch_page(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Serve a page in threads, and return its address. `page.close()` ends it.

    Nothing is sent to other machines: no public link, no analytics, and no fonts from elsewhere.

    Args:
        page: the page.
        host: address to listen on. None: Gradio's variable GRADIO_SERVER_NAME, or this machine only.
        port: None: GRADIO_SERVER_PORT, or the first free one from 7860 on.
    """
    theme = gr.themes.Default(
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
    )
    _, url, _ = page.queue(max_size=64).launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True,
        theme=theme, css=STYLE, footer_links=["settings"],
    )  # fmt: skip
    return url.rstrip("/")


def run_demo(
    model_dir: str | os.PathLike,
    host: str | None = None,
    port: int | None = None,
    threads: int | None = None,
    title: str | None = None,
) -> None:
    """Serve the page of a recommender until Ctrl-C. The model is on the GPU if there is one.

    Args:
        model_dir: the folder of a recommender, or its name on the Hugging Face Hub. If it is the folder `model` of a
            GFlowNet stage, the stage's reward is shown, too.
        host, port: as in `launch_page`.
        threads: number of torch's threads; by default torch chooses.
        title: heading of the page; by default the name of the model.

    Raises:
        ValueError: `port` or `threads` is out of range, or a file of the folder is damaged.
        FileNotFoundError: the folder or one of its files is missing.
        OSError: the address is not available, for example because another process uses it.
    """
    check_number("threads", threads, COUNT, optional=True)
    check_address(host, port)
    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    folder = local_copy(model_dir)
    recommender = Recommender.from_pretrained(folder, device_map="cuda" if torch.cuda.is_available() else "cpu")
    recommender.check()
    page = create_page(recommender, read_run_reward(folder, recommender), title or model_name(model_dir))
    url = launch_page(page, host, port)
    print(f"The demo of {len(recommender.catalog)} items of {model_dir} is on {url} (Ctrl-C to stop)", flush=True)
    with suppress(KeyboardInterrupt):  # the normal way to stop it
        threading.Event().wait()
    page.close(verbose=False)


def check_address(host: str | None, port: int | None) -> None:
    """Check that an address is available, before a model is loaded.

    Raises:
        ValueError: the port is out of range.
        OSError: the address is not available.
    """
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be a number from 1 to 65535.")
    host = host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            text = f"{host}:{port} is not available ({error.strerror}); choose another --host or --port."
            raise OSError(text) from error


def _warned(handler: Callable) -> Callable:
    """Show an error about the input as one line on the page, and leave the page as it is."""

    @wraps(handler)
    def guarded(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except (ValueError, NonFiniteError) as error:
            gr.Warning(escape(one_line(str(error))))
            return gr.skip()

    return guarded


class _Page:
    """The components of a page and the functions that its events call."""

    def __init__(self, recommender: Recommender, reward: RunReward | None, name: str):
        self.recommender, self.reward = recommender, reward
        self.search = ItemSearch(recommender)
        with gr.Blocks(title="gflowtrl", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.Markdown(self._heading(name))
            self.history, self.answer = gr.State([]), gr.State(None)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._add_history()
                    self._add_options()
                with gr.Column(scale=5, min_width=480):
                    self._add_answer()
            self._connect()

    def _label(self, item: Item) -> str:
        return label(item, self.recommender.titles.get(item))

    def _heading(self, name: str) -> str:
        """Return the page's first lines: what is shown, and what is not and why."""
        catalog, reward = self.recommender.catalog, self.reward
        facts = [f"{len(catalog):,} items with ids of up to {catalog.tree.max_depth} tokens."]
        if reward is None:
            facts.append("The model's folder belongs to no run whose reward can be computed here: no target is shown.")
        else:
            parts = ", ".join(reward.names)
            facts.append(f"Orange: the policy. Gray: its target R / Z, where R is the run's reward ({parts}).")
            facts += [f"Left out of R: {'; '.join(reward.left_out)}."] if reward.left_out else []
        if self.recommender.teacher is None:
            facts.append("The folder has no teacher, so no teacher's scores are shown.")
        return f"## {name or 'A generative recommender'}\n{' '.join(facts)}"

    # ------------------------------------------------------------------------------------------------- components
    def _add_history(self) -> None:
        self.query = gr.Textbox(label="Find items", placeholder="words of a title", max_length=200)
        self.found = gr.Radio(**self._items(""), elem_classes="demo-lines")
        self.places = gr.Radio([], label="History, oldest first", elem_classes="demo-lines")
        with gr.Row():
            self.up, self.down = (gr.Button(text, size="sm", min_width=60) for text in ("Up", "Down"))
            self.remove, self.clear = (gr.Button(text, size="sm", min_width=60) for text in ("Remove", "Clear"))

    def _add_options(self) -> None:
        self.strategy = gr.Radio(["beam", "sample"], value="beam", label="Strategy")
        self.temperature = gr.Slider(
            0.1, 3, value=1, step=0.1, label="Temperature of samples", interactive=False, buttons=[]
        )
        with gr.Row():
            self.k = gr.Number(10, label="Length of the list", minimum=1, maximum=MOST_K, precision=0, min_width=100)
            self.seed = gr.Number(0, label="Seed of samples", minimum=0, precision=0, min_width=100)
        self.unseen = gr.Checkbox(label="Leave out items of the history")
        self.go = gr.Button("Recommend", variant="primary")

    def _add_answer(self) -> None:
        self.list = gr.HTML(HINT)
        self.chosen = gr.Dropdown([], label="The way through the tree to", visible=False)
        self.way = gr.HTML()

    def _connect(self) -> None:
        state, places = self.history, [self.history, self.places]
        # Not `input`, which the Textbox does not send for text that is pasted.
        self.query.change(
            self._find, self.query, self.found, api_name="find", show_progress="hidden", trigger_mode="always_last"
        )
        self.found.input(
            self._add,
            [state, self.found],
            [*places, self.found],
            api_name="add",
            show_progress="hidden",
            trigger_mode="multiple",
        )
        changes = {"up": (self.up, partial(self._move, -1)), "down": (self.down, partial(self._move, 1))}
        for name, (button, change) in (changes | {"remove": (self.remove, self._remove)}).items():
            button.click(change, places, places, show_progress="hidden", api_name=name)
        self.clear.click(lambda: self._edited([]), None, places, show_progress="hidden", api_name="clear")
        self.strategy.input(
            lambda strategy: gr.update(interactive=strategy == "sample"), self.strategy, self.temperature,
            show_progress="hidden", api_name="strategy",
        )  # fmt: skip
        options = [self.k, self.strategy, self.temperature, self.seed, self.unseen]
        shown = [self.answer, self.list, self.chosen, self.way]
        self.go.click(self._recommend, [state, *options], shown, api_name="recommend", **MODEL)
        self.chosen.input(self._show_way, [self.answer, self.chosen], self.way, api_name="show_way", **MODEL)

    # ----------------------------------------------------------------------------------------------------- events
    def _items(self, query: str) -> Any:
        """Return the list of found items. The value of each is its position in the catalog."""
        found = self.search.find(query)
        positions = self.recommender.catalog.index_of(found.items).tolist()
        choices = [(self._label(item), position) for item, position in zip(found.items, positions, strict=True)]
        more = f" ({len(choices)} of {found.total:,})" if found.total > len(choices) else ""
        more = more if choices else ": nothing found"
        return {"choices": choices, "value": None, "label": f"Add to the history{more}"}

    def _find(self, query: str) -> Any:
        return gr.update(**self._items(query))

    def _edited(self, history: list[Item], selected: int | None = None) -> tuple[list[Item], Any]:
        """Return the new history, and the list of it in which a position, counted from 0, is selected."""
        choices = [(f"{number}. {self._label(item)}", number - 1) for number, item in enumerate(history, 1)]
        return history, gr.update(choices=choices, value=selected)

    @_warned
    def _add(self, history: list[Item], position: int) -> Any:
        return *self._edited([*history, self.recommender.catalog.items[position]]), None

    @_warned
    def _move(self, by: int, history: list[Item], position: int | None) -> Any:
        changed = moved(history, _selected(position), by)
        return self._edited(changed, min(max(0, _selected(position) + by), len(history) - 1))

    @_warned
    def _remove(self, history: list[Item], position: int | None) -> Any:
        changed = without(history, _selected(position))
        return self._edited(changed, min(_selected(position), len(changed) - 1) if changed else None)

    @_warned
    def _recommend(
        self, history: list[Item], k: int, strategy: str, temperature: float, seed: int, unseen: bool
    ) -> Any:
        check_number("The length of the list", k, COUNT)
        answer = recommend(
            self.recommender, history, min(k, MOST_K), strategy, temperature, seed or 0, unseen, self.reward
        )
        choices = [(f"{row.rank}. {label(row.item, row.title)}", row.rank - 1) for row in answer.rows]
        has_ways = bool(answer.rows and answer.history)
        chosen = gr.update(choices=choices, value=0 if has_ways else None, visible=has_ways)
        return answer, draw_answer(answer), chosen, self._draw(answer, 0) if has_ways else ""

    def _draw(self, answer: Answer, index: int) -> str:
        levels = way_to(self.recommender, answer, answer.rows[index].item, reward=self.reward)
        return draw_way(levels, self.recommender.titles)

    @_warned
    def _show_way(self, answer: Answer | None, index: int | None) -> Any:
        return gr.skip() if answer is None or index is None else self._draw(answer, index)


def _selected(position: int | None) -> int:
    if position is None:
        raise ValueError("No item of the history is selected. Select one in the list above the buttons.")
    return position
