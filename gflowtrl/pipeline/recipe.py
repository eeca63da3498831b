"""Recipes: the settings of a run, from YAML and the command line, checked before any work begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import CONFIG_MAPPING, Seq2SeqTrainingArguments
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, SFTConfig

from gflowtrl.checks import COUNT, SEED, SHARE_BELOW_ONE, check_choice, check_number, check_storable, short_repr
from gflowtrl.configuration import check_names, check_types, field_names, locate_errors, read_recipe
from gflowtrl.data import PromptFormat, SyntheticShop
from gflowtrl.losses import get_loss
from gflowtrl.policy.loading import load_config
from gflowtrl.samplers import Sampler, build_sampler
from gflowtrl.trainer import GFlowNetConfig
from gflowtrl.trainer.arguments import check_training_arguments
from gflowtrl.trainer.best_metric import more_is_better, resolve_metric
from gflowtrl.trainer.processes import A_DAY, launched_with
from gflowtrl.trainer.tree_policy_config import computes_in_bf16
from gflowtrl.trainer.weighting import source_table

from .continuing import EarlierRun
from .fields import check_derived, check_evaluated, check_model_fields
from .sections import DataSection, EvaluationSection, StoppingSection, setting
from .specs import LEARNED, REWARDS, TEACHERS, check_reward, check_teacher, needs_of


#: Stages that a recipe may choose from, in order. Data, test and report always run.
STAGES = ("teacher", "sft", "control", "gflownet")
MOST_BYTES_OF_A_NAME = 200
#: What the GFlowNet and its control start from: the SFT model, or the model before any training.
STARTS = ("sft", "untrained")
#: How long a stage trains.
LENGTH = ("num_train_epochs", "max_steps")
#: Fields that decide a stage's number of steps and rows per step. The control copies them from `gflownet`.
SCHEDULE = (*LENGTH, "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last")
#: Fields of every training section that are not training arguments.
STOPPING = tuple(field_names(StoppingSection))
#: Learned reward weights assume these values of `gflownet`.
FITTED_FOR = {"reward_transform": "power", "reward_beta": 1}
#: Fields of `model` from `trl.ModelConfig` that quantize the weights under adapters.
QUANTIZATION = tuple(name for name in field_names(ModelConfig) if "bit" in name or "bnb" in name)


def is_part_of_a_path(name: str) -> bool:
    """Whether a folder's name can have this part: no separator, nothing invisible, room for the rest."""
    return name.isprintable() and not {"/", "\\"} & {*name} and len(name.encode()) <= MOST_BYTES_OF_A_NAME


@dataclass
class Recipe:
    """All settings of one run. docs/pipeline.md describes them.

    Raises:
        ValueError, TypeError: on construction, for an unknown field (with the closest known name), a value of the
            wrong type, or values that contradict each other.
    """

    output_dir: str = setting("outputs", "folder of stages and results; recipes with the same output_dir share stages")
    data_dir: str | None = setting(None, "folder with interactions (docs/data.md); null: the SYNTHETIC shop")
    continue_from: str | None = setting(
        None, "output_dir of an earlier run: its policy and teacher are trained further, with new users and items"
    )
    name: str = setting("recipe", "name of the run in the report; default: the file's name")
    seed: int = setting(42, "seed of initialization, order and trajectories")
    start: str = setting(
        "sft", "what control and gflownet start from: sft (its model) or untrained (the model before any training)"
    )
    stages: list[str] = setting(
        None, f"which of {', '.join(STAGES)} to run; null: all (under start: untrained all but sft)"
    )
    data: DataSection = setting({}, "how the data are read")
    model: dict = setting(
        {}, "model_name_or_path of a causal or encoder-decoder model, or model_type and fields of its configuration"
    )
    prompt: dict = setting({}, "fields of gflowtrl.data.PromptFormat for prompts in words; empty: only ids")
    peft: dict = setting(
        {},
        "fields of peft.LoraConfig: adapters are trained, then merged when a stage ends; empty: train all weights",
    )
    teacher: dict = setting({"type": "sasrec"}, f"type ({', '.join(TEACHERS)}) and its options")
    sft: dict = setting(
        {},
        "fields of trl.SFTConfig, or of Seq2SeqTrainingArguments for an encoder-decoder, and early_stopping_patience, "
        "as control and gflownet",
    )
    control: dict = setting(
        {},
        f"fields of GFlowNetConfig; {', '.join(SCHEDULE)} are copied from gflownet, but under start: untrained the "
        f"control may have its own length",
    )
    gflownet: dict = setting({}, "fields of gflowtrl.GFlowNetConfig; an option without a section belongs here")
    rewards: list[dict] = setting(
        [], f"list of rewards: type ({', '.join(REWARDS)}) or function (file.py:name), weight, options"
    )
    sampler: str | dict | None = setting(None, "where trajectories come from: a name, or {name: weight}")
    evaluation: EvaluationSection = setting({}, "how validation and test are measured")
    folder: str = field(default=".", metadata={"internal": True})  # files that the recipe names may be relative to it

    def __post_init__(self) -> None:
        check_choice("start", self.start, STARTS)
        if self.stages is None:
            self.stages = [stage for stage in STAGES if stage != "sft" or self.start == "sft"]
        for name, value in check_types(Recipe, vars(self)).items():
            setattr(self, name, value)
        check_storable(self)
        if not is_part_of_a_path(self.name):
            raise ValueError(
                f"name is {short_repr(self.name)}; it is part of the name of the report's folder, so give at most "
                f"{MOST_BYTES_OF_A_NAME} bytes of printable characters without / and \\."
            )
        if self.continue_from is not None:
            self._continue()
        check_names(self.stages, STAGES, what="stage")
        if not self.stages:
            raise ValueError(f"stages is empty; choose among {', '.join(STAGES)}.")
        check_number("seed", self.seed, SEED)
        if self.data_dir is None:
            check_types(SyntheticShop, self.data.shop, "data.shop")
            with locate_errors("data.shop", field_names(SyntheticShop)):
                SyntheticShop(**self.data.shop)
            if self.data.k_core:
                raise ValueError("data.k_core is set, but data_dir is null: the synthetic shop is taken as it is.")
        self._check_model()
        self._check_adapters()
        check_teacher(self.teacher, "teacher")
        for number, reward in enumerate(self.rewards):
            check_reward(reward, f"rewards.{number}")
        self._check_learned_weights()
        self._check_signs()
        sampler = None if self.sampler is None else build_sampler(self.sampler, teacher=lambda histories: None)
        self._check_schedule()
        # The control copies the schedule of gflownet, whose errors therefore come first.
        stages = sorted(self.trained_stages, key="control".__eq__)
        if "control" in stages and "gflownet" not in stages:
            stages.insert(-1, "gflownet")
        args = {stage: self.training_arguments(stage, Path(self.output_dir) / stage) for stage in stages}
        if "gflownet" in self.stages:
            self._check_gflownet(args["gflownet"], sampler)
            self._check_start(args["gflownet"])

    def as_dict(self) -> dict[str, Any]:
        """All settings as a dictionary."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @property
    def trained_stages(self) -> list[str]:
        """The stages that train a policy, in order: those requested, and SFT if others start from its model."""
        needed = {*self.stages, *(["sft"] if self.start == "sft" and {*self.stages} - {"teacher"} else [])}
        return [stage for stage in STAGES[1:] if stage in needed]

    @property
    def control_fields(self) -> dict[str, Any]:
        """The control's section with the schedule of `gflownet` and cross entropy as its loss."""
        return control_section(self.start, self.control, self.gflownet) | {"loss_type": ["sft"]}

    @property
    def pretrained(self) -> dict[str, Any]:
        """Arguments of `load_config` and `load_tokenizer`: the language model, and whether its code may run."""
        where = {key: self.model[key] for key in ("gguf_file", "revision", "trust_remote_code") if key in self.model}
        return {"name": self.local(self.model["model_name_or_path"]), **where}

    def local(self, name: str) -> str:
        """Resolve a model's name: a folder, relative to here or to the recipe, else a name on the Hub."""
        relative = Path(self.folder, name)
        return str(relative) if not Path(name).is_dir() and relative.is_dir() else name

    def local_file(self, path: str | None) -> str | None:
        """Resolve the path of a file, relative to here or to the recipe."""
        relative = Path(self.folder, path or "")
        return str(relative) if path and not Path(path).is_file() and relative.is_file() else path

    @cached_property
    def encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder (such as T5), not a causal language model."""
        if self.model.get("model_name_or_path"):
            return load_config(**self.pretrained).is_encoder_decoder
        return CONFIG_MAPPING[self.model.get("model_type", "llama")]().is_encoder_decoder

    @property
    def reward_weights(self) -> list[float]:
        """One weight per reward; 1 for weights still to be learned (`build.final_weights`)."""
        given = [reward.get("weight", 1.0) for reward in self.rewards]
        return [1.0 if weight == LEARNED else float(weight) for weight in given]

    def stopping(self, stage: str) -> StoppingSection:
        """The fields of a stage's section that say when it stops early."""
        given = {name: value for name, value in getattr(self, stage).items() if name in STOPPING}
        with locate_errors(stage, STOPPING):
            return StoppingSection(**check_types(StoppingSection, given))

    def training_arguments(self, stage: str, output_dir: str | Path) -> Any:
        """The `SFTConfig` (`Seq2SeqTrainingArguments` for encoder-decoders) or `GFlowNetConfig` of a stage.

        The recipe's fields override the pipeline's defaults: a stage is measured and saved once per epoch, and ends
        with its checkpoint of the highest validation NDCG.
        """
        values = {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_ndcg@{self.evaluation.primary_k}",
            "greater_is_better": None,
            "logging_nan_inf_filter": False,
            "logging_steps": 0.1,
            "report_to": "none",
            "run_name": f"{self.name}-{stage}",
            "per_device_eval_batch_size": self.evaluation.batch_size,
            "train_sampling_strategy": "group_by_length",
            "ddp_timeout": int(A_DAY.total_seconds()),  # the others wait while the first process fits a teacher
        }
        if launched_with("DEEPSPEED") and not torch.accelerator.is_available():
            values["ddp_backend"] = "gloo"
        if stage == "sft":
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
        section = {name: value for name, value in section.items() if name not in STOPPING}
        values |= check_types(kind, section, stage)
        check_derived(stage, section if stage != "control" else self.control)
        with locate_errors(stage, [*field_names(kind), *STOPPING]):
            if values["greater_is_better"] is None:
                values["greater_is_better"] = more_is_better(str(values["metric_for_best_model"])) is not False
            args = kind(output_dir=str(output_dir), seed=self.seed, **values)
            check_training_arguments(args)
            resolve_metric(args, self.evaluation.ks)
            check_evaluated(args, self.stopping(stage).early_stopping_patience)
        return args

    @cached_property
    def earlier(self) -> EarlierRun | None:
        """The run that this one continues."""
        return None if self.continue_from is None else EarlierRun.read(self.local(self.continue_from))

    def _continue(self) -> None:
        """Start from the policy of the earlier run, without SFT."""
        if Path(self.output_dir).resolve() == self.earlier.folder.resolve():
            raise ValueError(f"output_dir is that of the run to continue, {self.output_dir}. Choose another folder.")
        # What says how a model is loaded applies to the earlier one too; the shape of a new one does not.
        loading = self.model if "model_name_or_path" in self.model else {}
        self.model, self.start = {**loading, "model_name_or_path": str(self.earlier.model)}, "untrained"
        self.stages = [stage for stage in self.stages if stage != "sft"]

    def _check_model(self) -> None:
        if "model_name_or_path" in self.model:
            if self.model.get("new_tokens", "random") not in ("random", "titles"):
                raise ValueError(f"model.new_tokens is {self.model['new_tokens']!r}; choose 'random' or 'titles'.")
            self._check_quantization()
            return
        kind = self.model.get("model_type", "llama")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ValueError(f"model.model_type {kind!r} is unknown to transformers; start with 'llama', for example.")
        ours = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}  # the tokenizer decides them
        check_names(self.model, {"model_type", *inspect.signature(CONFIG_MAPPING[kind]).parameters} - ours, "model")

    def _check_quantization(self) -> None:
        given = {name: value for name, value in self.model.items() if name in QUANTIZATION}
        check_types(ModelConfig, given, "model")
        which = next((name for name in QUANTIZATION if name.startswith("load") and given.get(name)), None)
        if which is None and given:
            raise ValueError(f"model.{next(iter(given))} is set, but neither load_in_4bit nor load_in_8bit is.")
        if which is None:
            return
        ModelConfig(**given)  # it refuses both at once
        if not self.peft:
            raise ValueError(f"model.{which} is set, but quantized weights cannot be trained: add a section peft.")
        if not is_bitsandbytes_available():
            raise ValueError(f"model.{which} needs bitsandbytes: pip install 'gflowtrl[quantization]'.")

    def _check_adapters(self) -> None:
        if self.prompt and "model_name_or_path" not in self.model:
            raise ValueError("prompt is set, but a new model knows no words: set model.model_name_or_path.")
        for name, kind in (("prompt", PromptFormat), ("peft", LoraConfig)):
            check_names(getattr(self, name), field_names(kind), name)
        check_number("peft.lora_dropout", self.peft.get("lora_dropout", 0.0), SHARE_BELOW_ONE)
        check_number("peft.r", self.peft.get("r", 8), COUNT)
        self.prompt_format, self.peft_config  # noqa: B018  (they check their values)
        if "model_name_or_path" not in self.model:
            check_model_fields(self.model.get("model_type", "llama"), self.model)

    @property
    def prompt_format(self) -> PromptFormat | None:
        return PromptFormat(**self.prompt) if self.prompt else None

    @property
    def peft_config(self) -> LoraConfig | None:
        if not self.peft:
            return None
        return LoraConfig(**{"task_type": "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM", **self.peft})

    def _check_learned_weights(self) -> None:
        if not any(reward.get("weight") == LEARNED for reward in self.rewards):
            return
        for name, value in FITTED_FOR.items():
            if (other := self.gflownet.get(name, value)) != value:
                raise ValueError(f"weight: {LEARNED} is fitted for {name} {value}, not gflownet.{name}: {other}.")

    def _check_signs(self) -> None:
        """Refuse rewards with negative values under "power" now, not in the first step after the other stages."""
        if "gflownet" not in self.stages or self.gflownet.get("reward_transform", "power") != "power":
            return
        for number, spec in enumerate(self.rewards):
            if "type" in spec and spec.get("weight", 1.0) != 0 and REWARDS[spec["type"]].may_be_negative(spec):
                raise ValueError(
                    f"rewards.{number} has negative values, but gflownet.reward_transform is power, for rewards of at "
                    f"least 0. Set it to exp."
                )

    def _check_schedule(self) -> None:
        for name in SCHEDULE:
            own, copied = (section.get(name) for section in (self.control, self.gflownet))
            if name in self.control and own != copied and not (self.start == "untrained" and name in LENGTH):
                exactly = "steps" if self.start == "sft" else "rows in a step"
                raise ValueError(
                    f"control.{name} is {own!r} and gflownet.{name} is {copied!r}, but the control takes exactly the "
                    f"GFlowNet's {exactly}. Leave control.{name} out."
                )
        if "loss_type" in self.control:
            raise ValueError("The loss of the control is always cross entropy: leave control.loss_type out.")

    def _check_gflownet(self, args: GFlowNetConfig, sampler: Sampler | None) -> None:
        """Checks of the trainer, done before teacher, SFT and control are trained."""
        if not self.rewards and any(get_loss(name).needs_rewards for name in args.loss_type):
            raise ValueError(
                f"gflownet.loss_type {args.loss_type} needs rewards, but the recipe's section rewards is empty. Add "
                f"one, for example {{type: ground_truth}} (docs/rewards.md)."
            )
        if sampler is not None:
            source_table(args.source_weights or {}, sampler.source_names)

    def _check_start(self, args: GFlowNetConfig) -> None:
        """Check that an untrained start uses nothing of the SFT model."""
        if self.start == "sft":
            return
        for number, reward in enumerate(self.rewards):
            if "sft_model" in needs_of(reward):
                under, remedy = "start: untrained", "set start: sft, or "
                if self.earlier is not None:
                    under, remedy = "continue_from", "set "
                raise ValueError(
                    f"rewards.{number} is the likelihood of the SFT model, which does not exist under {under}: "
                    f"{remedy}rewards.{number}.of: policy."
                )
        if self.earlier is not None:
            return  # the reference is the earlier policy
        needy = next((name for name in args.loss_type if get_loss(name).needs_reference), None)
        if args.ref_weight or needy:
            what, remedy = f"loss_type {needy!r} has a reference", "choose another loss"
            if args.ref_weight:
                what, remedy = f"ref_weight is {args.ref_weight:g}", "leave gflownet.ref_weight out"
            raise ValueError(
                f"gflownet.{what}, but under start: untrained the reference model would be untrained too, with "
                f"meaningless probabilities: set start: sft, or {remedy}."
            )


def control_section(start: str, control: Mapping[str, Any], gflownet: Mapping[str, Any]) -> dict[str, Any]:
    """The control's section with the GFlowNet's schedule; under start: untrained it may have its own length.

    Args:
        start, control, gflownet: fields of a recipe.
    """
    own = LENGTH if start == "untrained" and control.keys() & {*LENGTH} else ()
    return {**control, **{name: gflownet[name] for name in SCHEDULE if name in gflownet and name not in own}}


def load_recipe(path: str | Path, arguments: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, and set what a command line changes.

    Args:
        path: the YAML file (`configuration.read_recipe`).
        arguments: `--section.field value`, `--rewards.0.weight .5`, `--data_dir DIR`. Options of `gflownet` may leave
            out the section: `--learning_rate 1e-3`, `--loss_kwargs.vargrad.huber_delta 1`. Values are YAML.
    """
    known = {*field_names(Recipe)} - {"folder"}
    content = read_recipe(path, arguments, known, [*field_names(GFlowNetConfig), *STOPPING])
    return Recipe(**content, folder=str(Path(path).resolve().parent))
