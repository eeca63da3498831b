"""Protocol and base class of teachers: item lookup, saving, loading, memoized scoring."""

import inspect
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gflowtrl.catalog import Item
from gflowtrl.catalog.items import ItemIndex, as_items
from gflowtrl.checks import COUNT, Bound, check_number, check_type, short_repr
from gflowtrl.data.step import Step
from gflowtrl.data.windows import Windows
from gflowtrl.files import read_object, read_tensors, reading, write_atomically, write_text
from gflowtrl.finite import NonFiniteError, check_tensors


History = Sequence[Item]

CONFIG_FILE = "teacher.json"
TENSOR_FILE = "teacher.safetensors"
BATCH = 512  # histories per batch
#: Parameters of a teacher and its `fit` that the run provides and a recipe cannot set.
PROVIDED = {"items", "validation", "device", "progress", "vectors", "full_history", "config", "start"}


@runtime_checkable
class Teacher(Protocol):
    """A model that scores the whole catalog for a history.

    `items` defines the order of the score columns. `score(histories)` returns a float tensor `(B, len(items))`; higher
    is better. Built-in teachers return *logits*: `softmax(score)` is their distribution over the next item.
    """

    items: list[Item]

    def score(self, histories: Sequence[History]) -> Tensor: ...


class TeacherModule(nn.Module):
    """Base class of the built-in teachers: a module whose state is its parameters and buffers.

    A subclass takes `items` as the first argument and the entries of `config` as keyword arguments, and implements
    `score`. Saving and loading need nothing else.

    Args:
        items: the catalog, without duplicates, in the order of the score columns.
        **config: JSON-serializable keyword arguments that rebuild the (untrained) teacher.
    """

    classes: ClassVar[dict[str, type["TeacherModule"]]] = {}
    bounds: ClassVar[dict[str, Bound]] = {}  # bounds of the options of the class and its `fit`
    needs: ClassVar[frozenset[str]] = frozenset()  # what a fit needs besides sequences and items: "texts" of all items

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TeacherModule.classes[cls.__name__] = cls

    def __init__(self, items: Sequence[Item], **config: Any) -> None:
        super().__init__()
        self.items = as_items(items)
        if not self.items:
            raise ValueError("items is empty; a teacher needs at least one item.")
        self.config = config
        self._index = ItemIndex(self.items)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check options of the class or its `fit` before a fit.

        Raises:
            ValueError: an option is out of bounds. The error names the option, its value and the bounds.
        """
        for name, value in options.items():
            if name in cls.bounds:
                check_number(name, value, cls.bounds[name])

    def score(self, histories: Sequence[History]) -> Tensor:
        """Score all items for `B` histories, each with the oldest item first: a float tensor `(B, len(items))`."""
        raise NotImplementedError

    def score_windows(self, windows: Windows) -> Tensor:
        """Score all items for the prompts of a batch: `(B, len(items))`, equal to `score(windows.histories)`.

        A subclass can override this to read the shared part of the prompts once.
        """
        return self.score(windows.histories)

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def encode(self, histories: Iterable[History]) -> list[list[int]]:
        """Map the items of histories to column indices. The error for an unknown item names it."""
        try:
            return [[self._index[item] for item in history] for history in histories]
        except TypeError:
            raise TypeError("A history is not a list of items; give a list of integers or strings per user.") from None

    def validation_rows(self, validation: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
        """Return the rows of a validation split, none for None; check that each has a history and a target.

        Raises:
            TypeError: these are not rows, or a history is not a list of items.
            ValueError: a column is missing, or an item is unknown. The error names the row or the item.
        """
        check_type("validation", validation, Iterable, "rows with history and target", optional=True)
        rows = [] if validation is None else list(validation)
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or not {"history", "target"} <= row.keys():
                raise ValueError(f"Row {number} of validation is {short_repr(row)}; it needs a history and a target.")
        self.encode([*row["history"], row["target"]] for row in rows)
        return rows

    def scored(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Score rows (`"history"`, `"target"`) in batches: scores `(B, len(items))` and target columns `(B,)`."""
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            targets = torch.tensor(self.encode([[row["target"]] for row in batch]), device=self.device).flatten()
            yield self.score([row["history"] for row in batch]), targets

    def description(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "config": self.config}

    @classmethod
    def from_config(cls, items: Sequence[Item], config: Mapping[str, Any]) -> "TeacherModule":
        """Build an untrained teacher from the `"config"` entry of a `description`."""
        return cls(items, **config)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `teacher.safetensors` and then `teacher.json`, each one atomically.

        Raises:
            NonFiniteError: a tensor contains NaN or infinity.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        check_tensors(tensors, f"The {type(self).__name__} teacher")
        description = json.dumps({**self.description(), "items": self.items}, ensure_ascii=False)
        write_atomically(Path(directory, TENSOR_FILE), lambda path: save_file(tensors, path))
        write_text(Path(directory, CONFIG_FILE), description)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "TeacherModule":
        """Load a teacher from the folder that `save_pretrained` wrote. The base class loads any kind of teacher."""
        path = Path(directory) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"There is no saved teacher in {directory}: {CONFIG_FILE} is missing.")
        description = read_object(path)
        with reading(path, "the description of a teacher"):
            teacher = build_teacher(description, description["items"])
        if not isinstance(teacher, cls):
            raise TypeError(f"{directory} contains a {type(teacher).__name__} teacher, not a {cls.__name__}.")
        tensor_file = path.with_name(TENSOR_FILE)
        tensors = read_tensors(tensor_file)
        check_tensors(tensors, tensor_file)
        with reading(tensor_file, f"the tensors of the {type(teacher).__name__} teacher that {CONFIG_FILE} describes"):
            teacher.load_state_dict(tensors)
        return teacher.eval()

    @classmethod
    def fit(cls, train_sequences: Iterable[History], items: Sequence[Item], **options: Any) -> "TeacherModule":
        """Train a teacher. A subclass for recipes must implement this method.

        Args:
            train_sequences: items of each user, oldest first.
            items: the catalog, in the order of the score columns.
            **options: options of the subclass. The run provides those that `from_spec` names.
        """
        raise NotImplementedError(f"{cls.__name__} must define fit(train_sequences, items, ...).")

    @classmethod
    def _fit_parameters(cls) -> set[str]:
        """Return the parameters of `fit` after the first two, and of the constructor if `fit` has `**config`."""
        names = [*inspect.signature(cls.fit).parameters][2:]
        return {*names, *inspect.signature(cls).parameters} if "config" in names else {*names}

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names of the options that a recipe can set."""
        return cls._fit_parameters() - PROVIDED

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> "TeacherModule":
        """Fit the teacher of a recipe.

        Args:
            spec: the options of the recipe, without type and weight.
            context: what the run provides: `train_sequences`, `items`, and, if `fit` has such parameters, `validation`
                (rows), `device`, `progress` (whether to show progress bars) and `max_history_items` (unless the recipe
                sets it).
        """
        names = cls._fit_parameters() & {*PROVIDED, "max_history_items"} & context.keys() - {"items"} - spec.keys()
        provided = {name: context[name] for name in names}
        return cls.fit(context["train_sequences"], context["items"], **provided, **spec)


def build_teacher(description: Mapping[str, Any], items: Sequence[Item]) -> TeacherModule:
    """Build an untrained teacher from a `description()`."""
    name = description["class"]
    if name not in TeacherModule.classes:
        known = ", ".join(sorted(TeacherModule.classes))
        raise ValueError(f"Unknown teacher class {name!r}; choose from {known}, or import the module that defines it.")
    return TeacherModule.classes[name].from_config(items, description["config"])


def load_teacher(directory: str | Path) -> TeacherModule:
    """Load a teacher of any kind from the folder that `save_pretrained` wrote."""
    return TeacherModule.from_pretrained(directory)


class CallableTeacher:
    """A teacher from a function `histories -> (B, len(items))` that returns a tensor, an array or nested lists."""

    def __init__(self, function: Callable[[list[list[Item]]], Any], items: Sequence[Item]) -> None:
        self.items = list(items)
        self.function = function

    def score(self, histories: Sequence[History]) -> Tensor:
        scores = torch.as_tensor(self.function([list(history) for history in histories]), dtype=torch.float32)
        expected = (len(histories), len(self.items))
        if tuple(scores.shape) != expected:
            raise ValueError(
                f"The teacher function returned shape {tuple(scores.shape)}; it must return (histories, items), "
                f"{expected}."
            )
        return scores


class ReorderedTeacher:
    """A teacher with its columns in the order of other `items`, all of which it must know."""

    def __init__(self, teacher: Teacher, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.teacher = teacher
        index = {item: column for column, item in enumerate(teacher.items)}
        missing = [item for item in self.items if item not in index]
        if missing:
            raise ValueError(
                f"The teacher does not know {len(missing)} items, for example {missing[0]!r}; fit it with all items."
            )
        self.columns = torch.tensor([index[item] for item in self.items])

    def score(self, histories: Sequence[History]) -> Tensor:
        return self.combine(lambda teacher: teacher.score(histories))

    def combine(self, score: Callable[[Teacher], Tensor]) -> Tensor:
        scores = score(self.teacher)
        return scores[:, self.columns.to(scores.device)]


def as_teacher(teacher: Teacher | Callable[[list[list[Item]]], Any], items: Sequence[Item]) -> Teacher:
    """Return a teacher over exactly `items` (usually `catalog.items`), in this order.

    A teacher with these items is returned unchanged. A teacher with another order or additional items is wrapped, and
    so is a plain callable `histories -> (B, len(items))`.

    Raises:
        ValueError: the teacher does not know an item.
        TypeError: `teacher` is neither a teacher nor a callable.
    """
    if isinstance(teacher, Teacher):
        return teacher if teacher.items == list(items) else ReorderedTeacher(teacher, items)
    if callable(teacher):
        return CallableTeacher(teacher, items)
    raise TypeError(
        f"A teacher needs `items` and `score(histories)`, or must be a callable; {type(teacher).__name__} is neither."
    )


def teacher_scores(teacher: Teacher, step: Step, owner: str) -> Tensor:
    """Return a teacher's scores for the prompts of a step, computed once per step: `(B, len(teacher.items))` float32.

    Rewards and samplers that share a teacher share its scores, even if the teacher is reordered or part of a mixture.
    The teacher sees the items in the prompts, like the policy (`Step.histories`), unless it has an own
    `max_history_items` (`full_history`): it then sees the last items of the column `history`.

    Args:
        teacher: the teacher.
        step: the step with the histories.
        owner: name of the reward or sampler with this teacher, for errors.

    Raises:
        ValueError: the column `history` is missing, or the scores have a wrong shape.
        NonFiniteError: the best score of a row is not finite.
    """
    histories = step.histories(owner)
    scores, shape = _scores_once(step, histories, teacher).float(), (len(step), len(teacher.items))
    if scores.shape != shape:
        raise ValueError(
            f"{owner}: its teacher returned scores of shape {tuple(scores.shape)}; it must return {shape}: one row "
            f"per history, one column per item."
        )
    return scores


# Module functions, because closures that refer to each other would keep each step alive until garbage collection.
def _scores_once(step: Step, histories: Sequence[History], part: Teacher) -> Tensor:
    return step.once(part, "scores", partial(_scores, step, histories, part))


def _scores(step: Step, histories: Sequence[History], part: Teacher) -> Tensor:
    if hasattr(part, "combine_rows"):
        return part.combine_rows(step, partial(_scores_once, step, histories))
    if hasattr(part, "combine"):
        return part.combine(partial(_scores_once, step, histories))
    with torch.no_grad():
        if _reads_full_history(part):
            return _checked_scores(part, part.score(step.column("history", f"The teacher {type(part).__name__}")))
        if step.windows is not None and _reads_windows(part):
            return _checked_scores(part, part.score_windows(step.windows))
        return _checked_scores(part, part.score(histories))


def _reads_full_history(teacher: Teacher) -> bool:
    return getattr(teacher, "full_history", False)


def _reads_windows(teacher: Teacher) -> bool:
    """Whether `score_windows` matches the teacher's `score`.

    It does not if a subclass overrides `score` only, or if a wrapper forwards `score_windows` of another teacher.
    """
    for cls in type(teacher).__mro__:
        if vars(cls).keys() & {"score", "score_windows"}:
            return "score_windows" in vars(cls) and "score" not in vars(teacher)
    return False


def _checked_scores(teacher: Teacher, scores: Tensor) -> Tensor:
    """Return the scores if the best score of each row is finite. A score of -inf excludes an item."""
    best = torch.as_tensor(scores).amax(-1)
    if not bool(torch.isfinite(best).all()):
        row = int((~torch.isfinite(best)).nonzero()[0, 0])
        raise NonFiniteError(
            f"The teacher {type(teacher).__name__} has {best[row].item()} as its best score for history {row} of "
            f"{len(best)}; a score must be finite, or -inf to exclude an item. Fit the teacher again, for example "
            f"with a lower learning rate."
        )
    return scores


def score_histories(teacher: Teacher, histories: Sequence[History], max_history_items: int | None) -> Tensor:
    """Score all items for whole histories: `(B, len(teacher.items))`.

    Each history is cut to its last `max_history_items` (None: not at all), also for the parts of a mixture. A teacher
    with an own `max_history_items` (`full_history`) gets it whole and cuts it itself.

    Raises:
        TypeError: the teacher is not one, or a history is not a list.
        ValueError: `max_history_items` is below 1, or an item is unknown.
    """
    if not callable(getattr(teacher, "score", None)):
        raise TypeError(f"teacher is of type {type(teacher).__name__}; it must be a teacher of gflowtrl.teachers.")
    check_number("max_history_items", max_history_items, COUNT, optional=True)
    check_type("histories", histories, Iterable, "a list of lists of items")
    if hasattr(teacher, "combine"):
        return teacher.combine(lambda part: score_histories(part, histories, max_history_items))
    if max_history_items is not None and not _reads_full_history(teacher):
        histories = [history[-max_history_items:] for history in histories]
    return _checked_scores(teacher, teacher.score(histories))


def rank_items(
    teacher: Teacher, history: History, items: Sequence[Item], among: Container[Item], max_history_items: int | None
) -> list[tuple[float, int] | tuple[None, None]]:
    """Return the probability of each item, by a softmax over the items `among` these, and its rank (1 = best).

    Items of the history that the teacher does not know are skipped. Without a known one, or for an unknown item, both
    are None.
    """
    columns = [column for column, item in enumerate(teacher.items) if item in among]
    places = {teacher.items[column]: place for place, column in enumerate(columns)}
    known = set(teacher.items)
    history = [item for item in history if item in known]
    if not history or not columns:
        return [(None, None)] * len(items)
    probs = score_histories(teacher, [history], max_history_items)[0][columns].softmax(-1)
    found = [probs[places[item]] if item in places else None for item in items]
    return [(None, None) if prob is None else (float(prob), 1 + int((probs > prob).sum())) for prob in found]


@torch.no_grad()
def top_items(
    teacher: Teacher,
    histories: Sequence[History],
    k: int,
    *,
    max_history_items: int | None = 20,
    batch_size: int = BATCH,
) -> Tensor:
    """Return the `k` best items of each history: item *indices* (teacher columns), LongTensor `(U, k)`, best first.

    Histories are truncated to their last `max_history_items` (`score_histories`). Items of the history are candidates
    too.

    Raises:
        ValueError: `k`, `batch_size` or `max_history_items` is below 1, or an item is unknown.
    """
    check_number("k", k, COUNT)
    check_number("batch_size", batch_size, COUNT)
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f"teacher is of type {type(teacher).__name__}; wrap a function with as_teacher(function, items)."
        )
    check_type("histories", histories, Iterable, "a list of lists of items")
    k, whole = min(k, len(teacher.items)), [list(history) for history in histories]
    parts = (whole[start : start + batch_size] for start in range(0, len(whole), batch_size))
    lists = [score_histories(teacher, part, max_history_items).topk(k).indices.cpu() for part in parts]
    return torch.cat(lists) if lists else torch.empty(0, k, dtype=torch.long)
