"""The README.md of a saved model: what it is, how it was trained, on what, and what it reaches."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from gflowtrl.files import write_text
from gflowtrl.policy.modules import innermost


if TYPE_CHECKING:
    from .evaluation import RankingEvaluationMixin


LIBRARY = "gflowtrl"
SHOWN = ("recall", "ndcg", "coverage")  # of all metrics, what a card has room for
LICENSE_FIELDS = ("license", "license_name", "license_link")
#: By kind of method: a tag, and the paper.
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
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots")  # where the Hub's cache keeps a model
_TEMPLATE = Path(__file__).with_name("model_card.jinja")


@dataclass
class BaseModel:
    """What training began from.

    Attributes:
        name: what it is called: on the Hub, or its folder.
        on_hub: whether that is a name on the Hub.
        license: the fields of its card's front matter that tell the license; empty where it has none.
    """

    name: str
    on_hub: bool
    license: dict[str, str] = field(default_factory=dict)


@dataclass
class CardFacts:
    """All that a model card says, as JSON-able values.

    Attributes:
        name: of this model.
        architecture, auto_class: its class, and the one of transformers that loads it.
        trainer: the trainer's class.
        items, depth, example: of the catalog: how many, tokens of the longest id, an item.
        beams: width of the beam search.
        methods: keys of `PAPERS`.
        settings: of the training, in words.
        results: each `{"split": ..., "metrics": {...}}` with `"step"` or `"users"`.
        data: `name`, `users`, `items`, `interactions`, `synthetic`, `license`, `source`; None where nobody said.
        base: the fields of a `BaseModel`, or None for a model that began at random.
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


def write_model_card(trainer: RankingEvaluationMixin, directory: str | os.PathLike) -> None:
    """Write what this model is, how it was trained and its last evaluation into `directory/README.md`."""
    write_card(card_facts(trainer), directory)


def write_card(facts: CardFacts, directory: str | os.PathLike) -> None:
    """Write `directory/README.md`, whole or not at all."""
    directory = Path(directory)
    card = ModelCard.from_template(
        _front_matter(facts),
        str(_TEMPLATE),
        **vars(facts) | {"example": repr(facts.example)},
        alone=not (directory / "adapter_config.json").is_file(),  # adapters are loaded onto what they were trained on
        papers=[PAPERS[method][1] for method in facts.methods],
        metric_names=list(dict.fromkeys(name for result in facts.results for name in result["metrics"])),
    )
    write_text(directory / "README.md", str(card))


def card_facts(trainer: RankingEvaluationMixin) -> CardFacts:
    """What a trainer with `set_up_ranking` knows about its model."""
    args, state = trainer.args, trainer.state
    step = state.global_step
    if args.load_best_model_at_end and state.best_global_step and not trainer.is_in_train:
        step = state.best_global_step  # training has ended, and these are the weights that were loaded back
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
        architecture=type(model).__name__.removeprefix("FSDP"),  # which FSDP2 puts before it
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
    """Of all metrics, those that a card shows, under their own names."""
    return {name: float(value) for name, value in metrics.items() if name.partition("@")[0] in SHOWN and "@" in name}


def base_model(name: str | None) -> BaseModel | None:
    """The model behind a name or folder, as far as this machine knows it; nothing is downloaded.

    A folder that gflowtrl has written is no base: what it began from is.
    """
    if not name:
        return None
    folder = Path(name)
    local = folder.is_dir()
    own = _read_front_matter(folder / "README.md" if local else try_to_load_from_cache(name, "README.md"))
    license = {key: own[key] for key in LICENSE_FIELDS if own.get(key)}
    if own.get("library_name") == LIBRARY:
        return BaseModel(own["base_model"], True, license) if own.get("base_model") else None
    if found := _SNAPSHOT.search(str(folder)):
        return BaseModel(found[1].replace("--", "/"), True, license)
    return BaseModel(folder.resolve().name if local else name, not local, license)


def _read_front_matter(file: Any) -> dict[str, Any]:
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    try:
        return ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, UnicodeDecodeError):  # a README that is no model card
        return {}


def _front_matter(facts: CardFacts) -> ModelCardData:
    base = BaseModel(**facts.base) if facts.base else None
    tags = ["recommendation", "generative-recommendation", *(PAPERS[m][0] for m in facts.methods), "trl"]
    data_name = facts.data["name"] if facts.data else "rows given to the trainer"
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
        base_model=base.name if base and base.on_hub else None,
        model_name=facts.name,
        eval_results=results or None,
        **license,
    )
