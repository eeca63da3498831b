"""Recipes: what a run does, from YAML and the command line, checked before any work begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig

from gflowtrl.data import PromptFormat, SyntheticShop
from gflowtrl.rewards import (
    CollaborativeReward,
    GroundTruthReward,
    InteractionReward,
    LikelihoodReward,
    RankPenaltyReward,
    TitleLikelihoodReward,
    TokenSimilarityReward,
)
from gflowtrl.rewards.title_likelihood import check_title_options
from gflowtrl.samplers import build_sampler
from gflowtrl.teachers import EASE, MixtureTeacher, Popularity, SASRec

from .checks import check_evaluation, check_gflownet
from .configuration import check_names, check_types, find_recipe, merged, parse_options, read_yaml, set_option


#: Stages that a recipe may choose among, in the order in which they run; data, test and report always run.
STAGES = ("teacher", "sft", "control", "gflownet")
#: Fields that decide how many steps a stage takes, and on what: the control copies them from `gflownet`.
SCHEDULE = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "dataloader_drop_last",
)
TEACHERS = {"sasrec": SASRec, "ease": EASE, "popularity": Popularity, "mixture": MixtureTeacher}
REWARDS = {
    "ground_truth": GroundTruthReward,
    "interaction": InteractionReward,
    "token_similarity": TokenSimilarityReward,
    "collaborative": CollaborativeReward,
    "likelihood": LikelihoodReward,
    "rank_penalty": RankPenaltyReward,
    "title_likelihood": TitleLikelihoodReward,
}
#: The weight that validation rows decide, and the rewards they can judge: those that do not read the target.
LEARNED = "learned"
WEIGHABLE = ("collaborative", "likelihood", "title_likelihood")
FITTED_FOR = {"reward_transform": "power", "reward_beta": 1}
#: Fields of `model` that are those of `trl.ModelConfig`: the weights that adapters stand on are held in few bits.
QUANTISATION = (
    *("load_in_4bit", "load_in_8bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
#: Fields of training arguments that the pipeline fills in, and from what.
OWNERS = {
    "output_dir": "output_dir", "seed": "seed", "reward_weights": "the weight of each entry of rewards",
    "max_history_items": "data.max_history_items", "model_init_kwargs": "model",
    "eval_num_beams": "evaluation.num_beams", "eval_ks": "evaluation.ks",
}  # fmt: skip
#: Fields of `trl.SFTConfig` for what is done already when the trainer gets the rows, and by whom.
OURS = {
    "packing": "a row holds one user's history", "max_length": "data.max_history_items cuts the rows",
    "dataset_kwargs": "rows are tokenised already",
}  # fmt: skip
#: Options of a reward whose values are names: the first is the default.
REWARD_CHOICES = {"popularity": ("interactions", "impressions"), "of": ("sft", "policy")}


def setting(default: Any, help: str) -> Any:
    return field(default_factory=lambda: default, metadata={"help": help})


@dataclass
class DataSection:
    k_core: int | None = setting(None, "drop users and items with fewer interactions; null: take the data as it is")
    max_history_items: int = setting(20, "items of a history that models see, the last ones")
    shop: dict = setting({}, "fields of gflowtrl.data.SyntheticShop, used where data_dir is null")


@dataclass
class EvaluationSection:
    num_beams: int = setting(20, "width of the constrained beam search")
    ks: list[int] = setting([5, 10, 20], "cut-offs of the metrics")
    batch_size: int = setting(256, "prompts decoded together")
    users: int | None = setting(None, "how many users are measured, chosen at random, the same in all runs; null: all")
    bootstrap_samples: int = setting(10_000, "resamples of users for the interval of GFlowNet minus control")
    calibration_rows: int | None = setting(
        None, "training and test rows on which policies are compared with R/Z; null: 64 where that is quick; 0: none"
    )

    @property
    def primary_k(self) -> int:
        """The cut-off that chooses checkpoints and fills the table: 10, or the largest where 10 is not measured."""
        return 10 if 10 in self.ks else max(self.ks)


@dataclass
class Recipe:
    """All settings of one run. docs/pipeline.md describes them.

    Raises:
        ValueError, TypeError: on construction, for an unknown field (with the closest known name), a value of the
            wrong kind, or values that contradict each other.
    """

    output_dir: str = setting("outputs", "where stages and results are kept; recipes with one output_dir share stages")
    data_dir: str | None = setting(None, "folder with interactions (docs/data.md); null: the SYNTHETIC shop")
    name: str = setting("recipe", "what the report calls this run; the file's name if not given")
    seed: int = setting(42, "of initialisation, order and trajectories")
    stages: list[str] = setting(list(STAGES), f"which of {', '.join(STAGES)} to run")
    data: DataSection = setting({}, "what is read")
    model: dict = setting(
        {}, "model_name_or_path of a causal or encoder-decoder model, or model_type and fields of its configuration"
    )
    prompt: dict = setting({}, "fields of gflowtrl.data.PromptFormat: prompts in words; none: the ids alone")
    peft: dict = setting(
        {}, "fields of peft.LoraConfig: adapters are trained, and merged when a stage ends; none: all"
    )
    teacher: dict = setting({"type": "sasrec"}, f"type ({', '.join(TEACHERS)}) and its options")
    sft: dict = setting({}, "fields of trl.SFTConfig, or of Seq2SeqTrainingArguments for an encoder-decoder")
    control: dict = setting({}, f"fields of GFlowNetConfig; {', '.join(SCHEDULE)} are those of gflownet")
    gflownet: dict = setting({}, "fields of gflowtrl.GFlowNetConfig; an option without a section goes here")
    rewards: list[dict] = setting(
        [], f"each a type ({', '.join(REWARDS)}) or function (file.py:name), weight, options"
    )
    sampler: str | dict | None = setting(None, "where trajectories come from: a name, or {name: weight}")
    evaluation: EvaluationSection = setting({}, "how validation and test are measured")
    folder: str = field(default=".", metadata={"internal": True})  # files named in the recipe are looked up here too

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            values = getattr(self, name)
            if isinstance(values, Mapping):
                check_names(values, [entry.name for entry in fields(section)], name)
                setattr(self, name, section(**check_types(section, values, name)))
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SECTIONS}
        for name, value in check_types(Recipe, plain).items():
            setattr(self, name, value)
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise TypeError(f"{name} must be fields with values, but it is {getattr(self, name)!r}.")
        check_names(self.stages, STAGES, "stages")
        if not self.stages:
            raise ValueError(f"stages is empty; choose among {', '.join(STAGES)}.")
        check_evaluation(self.evaluation)
        if self.data_dir is None:
            check_names(self.data.shop, inspect.signature(SyntheticShop).parameters, "data.shop")
            if self.data.k_core:
                raise ValueError("data.k_core is set, but data_dir is null: the synthetic shop is taken as it is.")
        self._check_model()
        self._check_adapters()
        check_teacher(self.teacher, "teacher")
        for number, reward in enumerate(self.rewards):
            check_reward(reward, f"rewards.{number}")
        self._check_learned_weights()
        if self.sampler is not None:
            build_sampler(self.sampler, teacher=lambda histories: None)
        self._check_schedule()
        for stage in STAGES[1:]:
            if stage in self.stages or (stage == "sft" and self.stages != ["teacher"]):  # SFT comes before both others
                self.training_arguments(stage, Path(self.output_dir) / stage)
        if "gflownet" in self.stages:
            check_gflownet(self)

    def as_dict(self) -> dict[str, Any]:
        """All settings, without later ones that are not in use: results that were kept before still match."""
        unused = {"folder", *(name for name in ("prompt", "peft") if not getattr(self, name))}
        settings = {name: value for name, value in asdict(self).items() if name not in unused}
        for name in ("users", "calibration_rows"):
            if settings["evaluation"][name] is None:
                del settings["evaluation"][name]
        return settings

    @property
    def control_fields(self) -> dict[str, Any]:
        """The control's section, with the schedule of `gflownet` and the loss that makes it SFT continued."""
        return {**self.control, **{n: self.gflownet[n] for n in SCHEDULE if n in self.gflownet}, "loss_type": ["sft"]}

    @property
    def pretrained(self) -> dict[str, Any]:
        """What `from_pretrained` needs in order to find the language model, its configuration or its tokenizer."""
        where = {key: self.model[key] for key in ("gguf_file", "revision") if key in self.model}
        name = local_folder(self.folder, self.model["model_name_or_path"])
        return {"pretrained_model_name_or_path": name, **where}

    @cached_property
    def encoder_decoder(self) -> bool:
        """Whether the model is one (T5, say), and not a causal language model."""
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.model.get("model_name_or_path"):
            return AutoConfig.from_pretrained(**self.pretrained).is_encoder_decoder
        return CONFIG_MAPPING[self.model.get("model_type", "llama")]().is_encoder_decoder

    @property
    def reward_weights(self) -> list[float]:
        """One weight a reward, 1 for those that are still to be learned (`signals.final_weights`)."""
        given = [reward.get("weight", 1.0) for reward in self.rewards]
        return [1.0 if weight == LEARNED else float(weight) for weight in given]

    def training_arguments(self, stage: str, output_dir: str | Path) -> Any:
        """The `SFTConfig` (`Seq2SeqTrainingArguments` for encoder-decoders) or `GFlowNetConfig` of a stage: the
        recipe's fields over the pipeline's own.

        A stage is measured and saved once an epoch, and ends with its checkpoint of the highest validation NDCG.
        """
        from gflowtrl.trainer import GFlowNetConfig
        from gflowtrl.trainer.tree_policy_config import computes_in_bf16

        values = {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_ndcg@{self.evaluation.primary_k}",
            "greater_is_better": True,
            "logging_steps": 0.1,
            "report_to": "none",
            "run_name": f"{self.name}-{stage}",
            "per_device_eval_batch_size": self.evaluation.batch_size,
            "train_sampling_strategy": "group_by_length",
        }
        if stage == "sft":
            from transformers import Seq2SeqTrainingArguments
            from trl import SFTConfig

            kind, section = SFTConfig, self.sft
            bf16 = not section.get("fp16") and computes_in_bf16(section.get("use_cpu", False))
            values |= {"dataloader_pin_memory": torch.cuda.is_available(), "bf16": bf16}
            if self.encoder_decoder:
                kind = Seq2SeqTrainingArguments
            else:
                values |= {"gradient_checkpointing": None, "max_length": None}
        else:
            kind, section = GFlowNetConfig, self.control_fields if stage == "control" else self.gflownet
            values |= {
                "max_history_items": self.data.max_history_items,
                "eval_num_beams": self.evaluation.num_beams,
                "eval_ks": self.evaluation.ks,
            }
            if stage == "gflownet":
                values["reward_weights"] = self.reward_weights or None
        check_names(section, [entry.name for entry in fields(kind) if entry.init], stage)
        for name in OWNERS.keys() & section.keys():
            raise ValueError(f"{stage}.{name} is not free: the pipeline sets it from {OWNERS[name]}.")
        if stage == "sft":
            for name in OURS.keys() & section.keys():
                raise ValueError(f"sft.{name} would have no effect: {OURS[name]}.")
        return kind(output_dir=str(output_dir), seed=self.seed, **{**values, **check_types(kind, section, stage)})

    def _check_model(self) -> None:
        from transformers import CONFIG_MAPPING

        if "model_name_or_path" in self.model:
            if self.model.get("new_tokens", "random") not in ("random", "titles"):
                raise ValueError(f"model.new_tokens is {self.model['new_tokens']!r}; choose 'random' or 'titles'.")
            self._check_quantisation()
            return
        kind = self.model.get("model_type", "llama")
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                f"model.model_type is {kind!r}, which transformers does not know; 'llama' is a fair start."
            )
        ours = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}  # the tokenizer decides them
        check_names(self.model, {"model_type", *inspect.signature(CONFIG_MAPPING[kind]).parameters} - ours, "model")

    def _check_quantisation(self) -> None:
        given = {name: value for name, value in self.model.items() if name in QUANTISATION}
        check_types(ModelConfig, given, "model")
        if not given.get("load_in_4bit") and not given.get("load_in_8bit"):
            if given:
                raise ValueError(f"model.{next(iter(given))} is set, but neither load_in_4bit nor load_in_8bit is.")
            return
        ModelConfig(**given)  # it refuses both at once
        which = "load_in_4bit" if given.get("load_in_4bit") else "load_in_8bit"
        if not self.peft:
            raise ValueError(f"model.{which} is set, but quantised weights cannot be trained: add a section peft.")
        if not is_bitsandbytes_available():
            raise ValueError(f"model.{which} needs bitsandbytes: pip install 'gflowtrl[quantization]'.")

    def _check_adapters(self) -> None:
        if self.prompt and "model_name_or_path" not in self.model:
            raise ValueError(
                "prompt is set, but a model from scratch knows no words: name a language model as "
                "model.model_name_or_path, or leave prompt out."
            )
        for name, kind in (("prompt", PromptFormat), ("peft", LoraConfig)):
            section = getattr(self, name)
            check_names(section, [entry.name for entry in fields(kind) if entry.init], name)
        self.prompt_format, self.peft_config  # noqa: B018  (they check their values)

    @property
    def prompt_format(self) -> PromptFormat | None:
        return PromptFormat(**self.prompt) if self.prompt else None

    @property
    def peft_config(self) -> LoraConfig | None:
        if not self.peft:
            return None
        return LoraConfig(**{"task_type": "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM", **self.peft})

    def _check_learned_weights(self) -> None:
        changed = {name: self.gflownet.get(name, value) for name, value in FITTED_FOR.items()}
        if any(reward.get("weight") == LEARNED for reward in self.rewards) and changed != FITTED_FOR:
            wrong = ", ".join(
                f"gflownet.{name}: {value}" for name, value in changed.items() if value != FITTED_FOR[name]
            )
            raise ValueError(f"weight: {LEARNED} is fitted for reward_transform power and reward_beta 1, not {wrong}.")

    def _check_schedule(self) -> None:
        for name in SCHEDULE:
            own, copied = self.control.get(name), self.gflownet.get(name)
            if name in self.control and own != copied:
                raise ValueError(
                    f"control.{name} is {own!r} and gflownet.{name} is {copied!r}, but the control takes exactly the "
                    f"GFlowNet's steps. Leave control.{name} out."
                )
        if "loss_type" in self.control:
            raise ValueError("The control is SFT continued on the same rows: leave control.loss_type out.")


SECTIONS = {"data": DataSection, "evaluation": EvaluationSection}


def local_folder(recipe_folder: str, name: str) -> str:
    """A model's folder named in the recipe, looked up from here and from the recipe's; else a name on the Hub."""
    beside = Path(recipe_folder, name)
    return str(beside) if not Path(name).is_dir() and beside.is_dir() else name


def check_teacher(spec: Any, where: str) -> None:
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    if kind not in TEACHERS:
        raise ValueError(f"{where}.type is {kind!r}; choose from {', '.join(TEACHERS)}.")
    if kind != "mixture":
        check_names(spec, {"type", "weight", *teacher_options(kind)}, where)
        return
    check_names(spec, {"type", "parts", "normalization"}, where)
    if not isinstance(spec.get("parts"), list) or not spec["parts"]:
        raise ValueError(f"{where}.parts must list the mixture's teachers, each with type, weight and options.")
    for number, part in enumerate(spec["parts"]):
        check_teacher(part, f"{where}.parts.{number}")


def teacher_options(kind: str) -> set[str]:
    """What a recipe may say of a teacher: the arguments of its `fit` that are no data."""
    names = {*inspect.signature(TEACHERS[kind].fit).parameters}
    if "config" in names:  # **config is handed on to the constructor
        names |= {*inspect.signature(TEACHERS[kind]).parameters}
    return names - {"train_sequences", "items", "validation", "device", "progress", "config", "max_history_items"}


def check_reward(reward: Any, where: str) -> None:
    if not isinstance(reward, Mapping) or ("type" in reward) == ("function" in reward):
        raise ValueError(f"{where} needs either a type ({', '.join(REWARDS)}) or a function (file.py:name).")
    _check_weight(reward, where)
    if "function" in reward:
        check_names(reward, ["function", "weight"], where)
        return
    if reward["type"] not in REWARDS:
        raise ValueError(f"{where}.type is {reward['type']!r}; choose from {', '.join(REWARDS)}, or give a function.")
    check_names(reward, {"type", "weight", *reward_options(reward["type"])}, where)
    for name, choices in REWARD_CHOICES.items():
        if name in reward and reward[name] not in choices:
            raise ValueError(f"{where}.{name} is {reward[name]!r}; choose {' or '.join(choices)}.")
    if reward["type"] == "title_likelihood" and not isinstance(reward.get("model"), str):
        raise ValueError(f"{where}.model must name the language model that reads the titles: a folder, say.")
    if "teacher" in reward:
        check_teacher(reward["teacher"], f"{where}.teacher")
    try:
        _check_reward_values(reward)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def _check_weight(reward: Mapping[str, Any], where: str) -> None:
    weight = reward.get("weight", 1.0)
    if weight != LEARNED and not isinstance(weight, int | float):
        raise TypeError(f"{where}.weight must be a number or {LEARNED!r}, but it is {weight!r}.")
    if weight == LEARNED and (reward.get("type") not in WEIGHABLE or reward.get("of") == "policy"):
        raise ValueError(
            f"{where}.weight is {LEARNED!r}, which validation rows decide before the training. That is possible for "
            f"{', '.join(WEIGHABLE)}, of models that are fixed and do not read the target; give a number here."
        )


def reward_options(kind: str) -> set[str]:
    """What a recipe may say of a reward: the arguments of its class that the pipeline does not fill in."""
    if kind == "likelihood":
        return {"of"}
    names = {*inspect.signature(REWARDS[kind]).parameters} - {"item_counts", "tokenizer", "titles"}
    return names | {"popularity"} if kind == "collaborative" else names


def _check_reward_values(reward: Mapping[str, Any]) -> None:
    """Make the reward, without what takes time, for the errors of its class."""
    named = {"type", "weight", "teacher", "model", *REWARD_CHOICES}
    kind, options = reward["type"], {name: value for name, value in reward.items() if name not in named}
    if kind == "title_likelihood":
        parameters = {n: p.default for n, p in inspect.signature(TitleLikelihoodReward).parameters.items()} | options
        check_title_options(*(parameters[name] for name in inspect.signature(check_title_options).parameters))
    elif kind == "collaborative":
        CollaborativeReward(None, item_counts=(), **options)
    else:
        REWARDS[kind](**options)


def load_recipe(path: str | Path, arguments: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and sets what a command line changes.

    Args:
        path: the YAML file. Its field `base` may name another one, seen from its folder, or one that comes with the
            library, of which it tells the differences.
        arguments: `--section.field value`, `--rewards.0.weight .5`, `--data_dir DIR`. Options of `gflownet` may leave
            out the section: `--learning_rate 1e-3`, `--loss_kwargs.vargrad.huber_delta 1`. Values are YAML.
    """
    path = Path(path)
    content = _on_its_base(path)
    content = {"name": path.stem, **content, "folder": str(path.resolve().parent)}
    known = [entry.name for entry in fields(Recipe) if entry.name != "folder"]
    check_names(content.keys() - {"folder"}, known)
    for name, value in parse_options(arguments).items():
        first = name.split(".")[0]
        if first in known:
            set_option(content, name, value)
        elif first in (gflownet := _gflownet_fields()):
            set_option(content, f"gflownet.{name}", value)
        else:
            check_names([first], known if "." in name else {*known, *gflownet})
    return Recipe(**content)


def _on_its_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a recipe with that of its base, and of its base's base."""
    if path.resolve() in above:
        raise ValueError(f"{path} is among its own bases: {' <- '.join(str(file) for file in above)}.")
    content = read_yaml(path)
    if "base" not in content:
        return content
    base = find_recipe(content.pop("base"), path)
    return merged(_on_its_base(base, (*above, path.resolve())), content)


def _gflownet_fields() -> list[str]:
    from gflowtrl.trainer import GFlowNetConfig

    return [entry.name for entry in fields(GFlowNetConfig) if entry.init]


def describe() -> str:
    """All fields of a recipe, for `--help`."""
    lines = []
    for entry in fields(Recipe):
        if "help" in entry.metadata:
            lines.append(f"  --{entry.name:<18} {entry.metadata['help']}")
            section = SECTIONS.get(entry.name)
            if is_dataclass(section):
                lines += [
                    f"  --{entry.name}.{f.name:<{18 - len(entry.name)}} {f.metadata['help']}" for f in fields(section)
                ]
    return "\n".join(lines)
