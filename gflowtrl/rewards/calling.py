"""Call plain reward functions as TRL's GRPOTrainer does: lists in, one list out, sync or async."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import short_repr
from gflowtrl.data import Step, check_column_names
from gflowtrl.trunks import separate_prompts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reward_keywords(
    step: Step, leaves: Tensor, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list]:
    """Return the keyword arguments of a reward function: lists of length B * K, row by row.

    `prompts` are the texts that the model sees, without padding; `completions` are the tokens of the semantic ids,
    joined by spaces; `completion_ids` are their token ids; `items` are the items at each leaf. Every dataset column is
    passed on too, with each value repeated K times.
    """
    check_column_names(step.columns)
    repeats = leaves.shape[1]

    def repeat(values: Sequence) -> list:
        return [value for value in values for _ in range(repeats)]

    prompts = separate_prompts(step.prompts)
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    texts = [
        tokenizer.decode(row[keep], clean_up_tokenization_spaces=False) for row, keep in zip(ids, mask, strict=True)
    ]
    drawn = leaves.flatten().tolist()
    paths = catalog.tree.paths[leaves.flatten().to(catalog.device)].tolist()
    at_leaf = {leaf: (catalog.leaf_text(leaf), catalog.items_of(leaf)) for leaf in set(drawn)}
    columns = {name: repeat(values) for name, values in step.columns.items()}
    return columns | {
        "prompts": repeat(texts),
        "completions": [at_leaf[leaf][0] for leaf in drawn],
        "completion_ids": [[token for token in path if token >= 0] for path in paths],
        "items": [at_leaf[leaf][1] for leaf in drawn],
    }


class RewardLog:
    """Collects what reward functions report with `log_extra(column, values)` and `log_metric(name, value)`."""

    def __init__(self) -> None:
        self.extra: dict[str, list] = {}
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)

    def log_extra(self, column: str, values: Sequence) -> None:
        """Add a column to the table of logged completions, with one value per completion."""
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(
                f"log_extra of {column!r} got {short_repr(values)}; give one value per completion in a list."
            )
        self.extra[str(column)] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to the training metrics. Values with the same name are averaged."""
        try:
            self._metrics[str(name)].append(float(value))
        except (TypeError, ValueError):
            raise TypeError(f"log_metric of {name!r} got {short_repr(value)}; give a number.") from None

    @property
    def metrics(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}


def call_rewards(functions: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Call all functions. Awaitables run concurrently. An exception gets a note that names the reward."""
    results, pending = {}, {}
    for name, function in functions.items():
        _check_takes(name, function, keywords)
        with _note_reward(name):
            result = function(**keywords)
        (pending if inspect.isawaitable(result) else results)[name] = result
    if pending:
        gathered = asyncio.run_coroutine_threadsafe(_gather(pending), _event_loop()).result()
        results.update(zip(pending, gathered, strict=True))
    return results


def _check_takes(name: str, function: Callable, keywords: Mapping[str, Any]) -> None:
    """Raise a TypeError if a function cannot be called with these keyword arguments."""
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError as error:
        raise TypeError(
            f"Reward {name!r} cannot be called with the columns of the dataset and what every reward gets ({error}). "
            f"Name the arguments that it uses, which must exist, and take the others as **kwargs."
        ) from None
    except ValueError:  # functions that are written in C may have no signature
        return


@contextmanager
def _note_reward(name: str) -> Iterator[None]:
    """Add the reward's name to an exception."""
    try:
        yield
    except Exception as error:
        error.add_note(f"It was raised by reward {name!r}.")
        raise


async def _gather(pending: Mapping[str, Any]) -> list[Any]:
    async def result_of(name: str, awaitable: Any) -> Any:
        with _note_reward(name):
            return await awaitable

    return await asyncio.gather(*(result_of(name, awaitable) for name, awaitable in pending.items()))


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of the run, which has its own thread.

    A separate thread also works inside notebooks. A single loop keeps the open connections of a reward, which belong
    to a loop, alive from step to step.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="gflowtrl-rewards", daemon=True).start()
    return loop


def checked_values(name: str, values: Any, count: int, describe: Callable[[int], str]) -> list[float]:
    """Return the result of a reward function as `count` floats, with NaN for None.

    Args:
        name: name of the reward, for errors.
        values: what the function returned.
        count: expected number of values.
        describe: describes completion i in an error message.

    Raises:
        TypeError: `values` is not a list, or a value is not a number.
        ValueError: the number of values is wrong, or a value is not finite.
    """
    if isinstance(values, Tensor) and not values.is_meta:
        values = values.tolist()
    # A dictionary, a set and a text can be iterated, but not over one value per completion.
    if isinstance(values, Tensor | str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise TypeError(
            f"Reward {name!r} returned {type(values).__name__}; it must return a list of {count} numbers or None."
        )
    values = list(values)
    if len(values) != count:
        raise ValueError(
            f"Reward {name!r} returned {len(values)} values for {count} completions; return one per completion, None "
            f"where the reward does not apply."
        )
    numbers = []
    for i, value in enumerate(values):
        try:
            number = math.nan if value is None else float(value)
            if isinstance(value, str | bytes):
                raise TypeError
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError):
            raise TypeError(
                f"Reward {name!r} returned {short_repr(value)} for {describe(i)}; return a number or None."
            ) from None
        if value is not None and not math.isfinite(number):
            raise ValueError(
                f"Reward {name!r} returned {number} for {describe(i)}; return a finite number, or None where the "
                f"reward does not apply."
            )
        numbers.append(number)
    return numbers
