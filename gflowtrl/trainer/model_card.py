"""The model card (README.md) of a saved model: architecture, training settings, data and evaluation results."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from gflowtrl.files import write_text
from gflowtrl.policy.modules import innermost


if TYPE_CHECKING:
    from .evaluation import RankingEvaluationMixin


LIBRARY = "gflowtrl"
SHOWN_METRICS = ("recall", "ndcg", "coverage")
LICENSE_FIELDS = ("license", "license_name", "license_link")
#: Tag and paper of each method.
PAPERS = {
    "balance": (
        "gflownet",
        "GFlowGR: Fine-tuning Generative Recommendation Frameworks with Generative Flow Networks, "
        "[arXiv 2506.16114](https://arxiv.org/abs/2506.16114)",
    ),
    "prefix": (
        "apao",
        "APAO: Adaptive Prefix-Aware Optimization for Generative Recommendation, "
        "[arXiv 2603.02730](https://arxiv.org/abs/2603.02730)",
    ),
}
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots")  # a model's folder in the cache of the Hub
_TEMPLATE = Path(__file__).with_name("model_card.jinja")


@dataclass
class BaseModel:
    """The model that training started from.

    Attributes:
        name: its name on the Hub, or the name of its folder.
        on_hub: whether `name` is a name on the Hub.
        license: the license fields of its card's front matter; empty if it has none.
    """

    name: str
    on_hub: bool
    license: dict[str, str] = field(default_factory=dict)


@dataclass
class CardFacts:
    """The contents of a model card, as JSON-serializable values.

    Attributes:
        name: the model's name.
        architecture, auto_class: the model's class, and the auto class of transformers that loads it.
        trainer: the trainer's class.
        items, depth, example: the catalog's number of items, tokens of its longest id, and one of its items.
        beams: width of the beam search.
        methods: keys of `PAPERS`.
        settings: training settings, as a table of names and values.
        results: each `{"split": ..., "metrics": {...}}` with `"step"` or `"users"`.
        data: `name`, `users`, `items`, `interactions`, `synthetic`, `license`, `source`; None if unknown.
        base: the fields of a `BaseModel`, or None for a model trained from random weights.
        dataset: name of the dataset, as a user gives it.
        tags: a user's tags.
    """

    name: str
    architecture: str
    auto_class: str
    trainer: str
    items: int
    depth: int
    example: Any
    beams: int
    methods: list[str]
    settings: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    dataset: str | None = None
    tags: list[str] = field(default_factory=list)


def write_model_card(
    trainer: RankingEvaluationMixin,
    directory: str | os.PathLike,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> None:
    """Write the model card of a trainer's model, with its last evaluation, to `directory/README.md`.

    Args:
        trainer: the trainer.
        directory: the folder of the model.
        model_name: name of the model. Default: that of the output folder.
        dataset_name: name of the training data, for example that on the Hub.
        tags: tags in addition to those of the method.
    """
    facts = card_facts(trainer)
    facts.name = model_name or facts.name
    facts.tags = [tags] if isinstance(tags, str) else list(tags or [])
    facts.dataset = dataset_name
    write_card(facts, directory)


def write_card(facts: CardFacts, directory: str | os.PathLike) -> None:
    """Write `directory/README.md` atomically."""
    directory = Path(directory)
    card = ModelCard.from_template(
        _front_matter(facts),
        str(_TEMPLATE),
        **vars(facts) | {"example": repr(facts.example)},
        alone=not (directory / "adapter_config.json").is_file(),  # adapters need the model they were trained on
        papers=[PAPERS[method][1] for method in facts.methods],
        metric_names=list(dict.fromkeys(name for result in facts.results for name in result["metrics"])),
    )
    write_text(directory / "README.md", str(card))


def card_facts(trainer: RankingEvaluationMixin) -> CardFacts:
    """Collect the facts about a trainer's model; the trainer must have called `set_up_ranking`."""
    args, state = trainer.args, trainer.state
    step = state.global_step
    if args.load_best_model_at_end and state.best_global_step and not trainer.is_in_train:
        step = state.best_global_step  # after training, the best weights have been loaded
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    model: Any = innermost(unwrapped)
    evaluations = [log for log in state.log_history if log["step"] <= step and "eval_runtime" in log]
    results = []
    if evaluations:
        last = {name.removeprefix("eval_"): value for name, value in evaluations[-1].items()}
        results.append({"split": "validation", "step": last["step"], "metrics": shown_metrics(last)})
    base = base_model(model.config.name_or_path)
    return CardFacts(
        name=Path(str(args.output_dir)).name or type(trainer).__name__,
        architecture=type(model).__name__.removeprefix("FSDP"),  # FSDP2 adds this prefix
        auto_class="AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM",
        trainer=type(trainer).__name__,
        items=len(trainer._catalog),
        depth=trainer._catalog.tree.max_depth,
        example=trainer._catalog.items[0],
        beams=trainer._num_beams,
        methods=trainer.card_methods(),
        settings={"step": step, "learning rate": args.learning_rate, **trainer.card_settings()},
        results=results,
        base=vars(base) if base else None,
    )


def shown_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Select the metrics that a card shows."""
    return {k: float(value) for k, value in metrics.items() if "@" in k and k.partition("@")[0] in SHOWN_METRICS}


def base_model(name: str | None) -> BaseModel | None:
    """Return the model with a name or folder, from local files only.

    For a folder written by gflowtrl, this is the model that its training started from.
    """
    if not name:
        return None
    folder = Path(name)
    local = folder.is_dir()
    card = _read_front_matter(folder / "README.md" if local else try_to_load_from_cache(name, "README.md"))
    license = {key: card[key] for key in LICENSE_FIELDS if card.get(key)}
    if card.get("library_name") == LIBRARY:
        return BaseModel(card["base_model"], True, license) if card.get("base_model") else None
    if snapshot := _SNAPSHOT.search(str(folder)):
        return BaseModel(snapshot[1].replace("--", "/"), True, license)
    return BaseModel(folder.resolve().name if local else name, not local, license)


def _read_front_matter(file: Any) -> dict[str, Any]:
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    try:
        return ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # the README is not a model card, or not UTF-8
        return {}


def _front_matter(facts: CardFacts) -> ModelCardData:
    base = BaseModel(**facts.base) if facts.base else None
    tags = ["recommendation", "generative-recommendation", *(PAPERS[m][0] for m in facts.methods), "trl"]
    tags += [tag for tag in facts.tags if tag not in tags]
    data_name = facts.data["name"] if facts.data else facts.dataset or "rows passed to the trainer"
    data_type = re.sub(r"[^\w.-]+", "-", data_name.lower())
    results = [
        EvalResult(
            task_type="recommendation", task_name="next item", dataset_type=data_type,
            dataset_name=data_name, dataset_split=result["split"], metric_type=name.partition("@")[0],
            metric_name=name, metric_value=value,
        )
        for result in facts.results
        for name, value in result["metrics"].items()
    ]  # fmt: skip
    license: dict[str, Any] = base.license if base else {}
    return ModelCardData(
        library_name=LIBRARY,
        tags=tags,
        datasets=[facts.dataset] if facts.dataset else None,
        base_model=base.name if base and base.on_hub else None,
        model_name=facts.name,
        eval_results=results or None,
        **license,
    )
