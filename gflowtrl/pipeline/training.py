"""The three training stages: SFT with TRL's trainer, the control, and the GFlowNet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    ProgressCallback,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTTrainer

from gflowtrl.checks import at_least, check_number
from gflowtrl.compat import TRAINER_STATE_NAME, TrainableTokensWrapper
from gflowtrl.data import (
    LengthGroupedEpochSampler,
    TargetCollator,
    history_lengths,
    sft_dataset,
    text_sft_dataset,
)
from gflowtrl.data.recommender_files import write_recommender_files
from gflowtrl.data.windows import list_lengths
from gflowtrl.files import reading
from gflowtrl.policy import load_backbone, merge_tied_embeddings
from gflowtrl.policy.modules import innermost
from gflowtrl.recommender import ITEM_TOKENIZER_FOLDER, TEACHER_FOLDER
from gflowtrl.samplers import build_sampler
from gflowtrl.teachers import TeacherModule, fingerprint
from gflowtrl.trainer import GFlowNetConfig, GFlowNetTrainer, RankingEvaluationMixin
from gflowtrl.trainer.adapters import add_adapters
from gflowtrl.trainer.checkpoints import CompleteCheckpointsMixin
from gflowtrl.trainer.evaluation import rows_per_step
from gflowtrl.trainer.finite_steps import FiniteMixin
from gflowtrl.trainer.model_card import CardFacts, base_model, card_facts, shown_metrics, write_card
from gflowtrl.trainer.resume import last_checkpoint, read_state
from gflowtrl.trainer.saved import check_saved

from .build import build_rewards, final_weights, reward_key, teacher_key
from .models import build_model, quantization, save_merged
from .run_data import RunData, files_fingerprint
from .stage import CHECKPOINTS, Record, RunContext, Stage, Work, if_set


#: Fields of training arguments that change what is shown or how fast training is, but not its result.
NON_RESULT_FIELDS = {
    *("disable_tqdm", "log_completions", "log_level", "logging_steps", "logging_strategy", "report_to", "run_name"),
    *("dataloader_num_workers", "dataloader_pin_memory", "save_total_limit"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
}
CURVES = "runs"  # TensorBoard's folder, next to the checkpoints


class _Stage(CompleteCheckpointsMixin, FiniteMixin, RankingEvaluationMixin):
    """Trainer of a stage. It evaluates by constrained beam search, and orders rows by (seed, epoch), so that a resumed
    run repeats an uninterrupted one.

    Attributes:
        row_lengths: `(rows,)` lengths of the training rows; rows of similar length form a batch.
    """

    row_lengths: Tensor

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = rows_per_step(args)
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroupedEpochSampler(self.row_lengths, batch, seed)


class SFTStage(_Stage, SFTTrainer):
    """TRL's SFTTrainer without telemetry."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if isinstance(innermost(model).get_output_embeddings(), TrainableTokensWrapper):
            # TRL multiplies by the head's weight outside the head, which misses rows that are trained separately.
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Seq2SeqSFTStage(_Stage, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer on one row per target."""


class ShortProgress(ProgressCallback):
    """The Trainer's progress bars, and one short line per log entry instead of the whole entry."""

    SHOWN = ("loss", "eval_recall", "eval_ndcg", "eval_coverage", "residual", "policy_entropy")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        cutoffs = ("", args.metric_for_best_model.partition("@")[2])
        parts = {name: name.partition("@") for name in logs}
        shown = {n: logs[n] for n, (stem, _, k) in parts.items() if stem in self.SHOWN and k in cutoffs}
        if shown:
            values = ", ".join(f"{name} {float(value):.4f}" for name, value in shown.items())
            self.training_bar.write(f"  epoch {state.epoch:.2f} of {state.num_train_epochs}: {values}")


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback for evaluations after each epoch. A resumed training keeps its counter."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = self._epochs_without_gain(vars(state))

    def resume(self, args: TrainingArguments, checkpoint: str) -> None:
        """End a training, in its arguments, at a checkpoint that was written when it had stopped."""
        state = read_state(checkpoint)
        with reading(Path(checkpoint, TRAINER_STATE_NAME), "the state of a training that stops early"):
            count = self._epochs_without_gain(state)
            check_number("early_stopping_patience_counter", count, at_least(0))
        if count >= self.early_stopping_patience:
            args.max_steps = state["global_step"]

    def _epochs_without_gain(self, state: Mapping[str, Any]) -> int:
        return state["stateful_callbacks"][type(self).__name__]["attributes"]["early_stopping_patience_counter"]


def train_sft(run: RunContext, data: RunData) -> Stage:
    """Supervised fine-tuning over the whole vocabulary; every item is predicted once from the items before it.

    Causal models read one row per user (TRL's SFTTrainer), encoder-decoders one row per target (Seq2SeqTrainer).
    """
    inputs = {**_untrained_inputs(data), "sft": result_fields(data.recipe.sft)}

    def work(folder: Path) -> Record:
        trainer = _sft_trainer(data, folder, run.callbacks)
        return train(trainer, data, folder, partial(build_model, data, quantized=False))

    return _run_stage(run, data, "sft", inputs, "supervised fine-tuning", work)


def _sft_trainer(data: RunData, folder: Path, callbacks: Sequence[TrainerCallback]) -> Trainer:
    recipe, model = data.recipe, build_model(data)
    if recipe.peft_config is None:
        merge_tied_embeddings(model)
    else:
        model = add_adapters(model, recipe.peft_config, data.catalog)
    args, longest = recipe.training_arguments("sft", folder / CHECKPOINTS), recipe.data.max_history_items
    kind, collator, lengths = SFTStage, None, None
    if recipe.encoder_decoder:
        kind, collator, rows = Seq2SeqSFTStage, TargetCollator(data.encoder), data.train
        lengths = history_lengths(rows).clamp(max=longest)
    elif recipe.prompt:
        rows = text_sft_dataset(data.train["history"], data.train["target"], data.encoder)
    else:
        rows = sft_dataset(data.train_sequences, data.catalog, data.tokenizer, longest)
    if kind is SFTStage:
        args.dataset_kwargs = {"skip_prepare_dataset": True}  # rows are already tokenized and cut
        lengths = list_lengths(rows, "input_ids")
    trainer = kind(
        model,
        args=args,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.row_lengths = lengths
    if recipe.encoder_decoder:
        # These models accept the number of tokens of the whole step but ignore it. Their loss is a mean over the
        # micro-batch, which the Trainer would multiply by the processes and not divide by the accumulation steps.
        trainer.model_accepts_loss_kwargs = False
    measure, counts = recipe.evaluation, data.item_counts
    trainer.set_up_ranking(data.catalog, data.encoder, counts, measure.num_beams, measure.ks)
    return trainer


def train_control(run: RunContext, data: RunData, start: Stage | None) -> Stage:
    """Cross entropy on single targets, from the same model as the GFlowNet: the baseline for any gain.

    Args:
        start: the stage whose model it starts from (so SFT is continued); None: the untrained model.
    """
    recipe = data.recipe
    inputs = {**_start_inputs(data, start), "control": result_fields(recipe.control_fields)}

    def work(folder: Path) -> Record:
        args = recipe.training_arguments("control", folder / CHECKPOINTS)
        trainer = _flow_trainer(run, data, args, start)
        return train(trainer, data, folder, partial(_start_model, data, start, quantized=False))

    about = f"cross entropy from {_beginning(data)}" if start is None else "SFT continued"
    return _run_stage(run, data, "control", inputs, f"{about} (the control)", work)


def train_gflownet(run: RunContext, data: RunData, start: Stage | None, teacher: TeacherModule | None) -> Stage:
    """GFlowNet training with the recipe's rewards and sampler.

    Args:
        start: the stage whose model it starts from; None: the untrained model.
        teacher: the recipe's own, for rewards and samplers that use it.
    """
    recipe = data.recipe
    inputs = {
        **_start_inputs(data, start),
        "gflownet": result_fields(recipe.gflownet),
        "rewards": reward_key(data),
        "sampler": recipe.sampler,
        "teacher": teacher_key(data, recipe.teacher) if teacher is not None else None,
    }

    def work(folder: Path) -> Record:
        trainer = gflownet_trainer(run, data, start, teacher, folder)
        record = train(trainer, data, folder, partial(_start_model, data, start, quantized=False))
        if teacher is not None and run.is_main:
            teacher.save_pretrained(folder / "model" / TEACHER_FOLDER)  # for the explanations of the recommender
        return {**record, "reward_weights": trainer.rewards.weights if trainer.rewards else []}

    about = f"GFlowNet training from {_beginning(data)}" if start is None else "GFlowNet fine-tuning"
    return _run_stage(run, data, "gflownet", inputs, about, work)


def gflownet_trainer(
    run: RunContext, data: RunData, start: Stage | None, teacher: TeacherModule | None, folder: Path
) -> GFlowNetTrainer:
    """The trainer of the recipe's GFlowNet stage in `folder`, starting from the model of the stage `start`; None: from
    the untrained model."""
    recipe = data.recipe
    args = recipe.training_arguments("gflownet", folder / CHECKPOINTS)
    sft_model = None if start is None else start.folder / "model"
    rewards, sampler = build_rewards(run, data, teacher, sft_model), None
    args.reward_weights = final_weights(run, data, rewards) or None
    if recipe.sampler is not None:
        sampler = build_sampler(recipe.sampler, teacher, args.temperature, args.epsilon)
    return _flow_trainer(run, data, args, start, reward_funcs=rewards, sampler=sampler)


def _flow_trainer(
    run: RunContext, data: RunData, args: GFlowNetConfig, start: Stage | None, **options: Any
) -> GFlowNetTrainer:
    set_seed(data.recipe.seed)
    return GFlowNetTrainer(
        _start_model(data, start),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        catalog=data.catalog,
        item_counts=data.item_counts,
        item_titles=data.titles,
        prompt_encoder=data.encoder,
        peft_config=data.recipe.peft_config,
        callbacks=run.callbacks,
        **options,
    )


def _beginning(data: RunData) -> str:
    return "the untrained model" if data.recipe.earlier is None else "the earlier policy"


def _start_model(data: RunData, start: Stage | None, quantized: bool = True) -> PreTrainedModel:
    """The model that control and GFlowNet start from: that of the stage `start`; None: the untrained model."""
    if start is None:
        return build_model(data, quantized)
    return load_backbone(start.folder / "model", **(quantization(data.recipe) if quantized else {}))


def _start_inputs(data: RunData, start: Stage | None) -> Record:
    """What the start model depends on besides the seed."""
    windows = not data.recipe.encoder_decoder and not data.encoder.tail  # the content of prompts follows from it
    begins = {"start": _untrained_inputs(data)} if start is None else {"sft": start.fingerprint}
    return begins | ({"windows": True} if windows else {})


def _untrained_inputs(data: RunData) -> Record:
    """What an untrained model and its prompts depend on besides the seed."""
    recipe = data.recipe
    begins = recipe.model.get("model_name_or_path")
    files, augmentation = files_fingerprint(recipe.local(begins)) if begins else None, recipe.data.augmentation
    return {
        "data": data.fingerprint, "model": recipe.model, **prompt_fingerprint(data),
        **if_set(model_files=files, augmentation=augmentation and asdict(augmentation)),
    }  # fmt: skip


def _run_stage(run: RunContext, data: RunData, name: str, inputs: Record, about: str, work: Work) -> Stage:
    recipe = data.recipe
    # The parts of the evaluation that decide which checkpoint is kept.
    selection = {"num_beams": recipe.evaluation.num_beams, "k": recipe.evaluation.primary_k}
    selection |= if_set(users=recipe.evaluation.users)
    inputs = {**inputs, "seed": recipe.seed, "evaluation": selection, **if_set(peft=recipe.peft)}
    stage = run.stage(name, inputs)
    stage.run(f"{about} on {data.kind}", work)
    return stage


def train(trainer: Trainer, data: RunData, folder: Path, base: Callable[[], PreTrainedModel]) -> Record:
    """Train, starting from the last checkpoint if there is one, and save the best model as `folder/model`.

    Adapters are saved as `folder/adapters` and merged into `base()`, the model before training.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    patience = data.recipe.stopping(_stage_name(folder)).early_stopping_patience
    if patience is not None:
        trainer.add_callback(stopping := EarlyStopping(patience))
        if checkpoint:
            stopping.resume(trainer.args, checkpoint)
    if checkpoint and trainer.is_world_process_zero():
        print(f"Continuing from {checkpoint}.", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    adapted = bool(data.recipe.peft)
    trainer.save_model(str(folder / ("adapters" if adapted else "model")))
    state, args = trainer.state, trainer.args
    trainer.accelerator.wait_for_everyone()  # the others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        if adapted:
            save_merged(base, folder / "adapters", folder / "model")
            data.tokenizer.save_pretrained(folder / "model")
        write_recommender_files(folder / "model", data.encoder, data.item_counts, data.titles)
        if (curves := folder / CHECKPOINTS / CURVES).is_dir():  # the checkpoints are removed later
            shutil.copytree(curves, folder / CURVES, dirs_exist_ok=True)
    if adapted or not isinstance(trainer, GFlowNetTrainer):  # GFlowNetTrainer checks what it saves
        trusted = {key: value for key, value in data.recipe.model.items() if key == "trust_remote_code"}
        check_saved(trainer, folder / "model", data.catalog, data.encoder, **trusted)
    facts = _card(trainer, data, folder)
    if trainer.is_world_process_zero():
        write_card(facts, folder / "model")
    return {
        "card": asdict(facts),
        "steps": state.global_step,
        "rows_per_step": rows_per_step(args),
        "windows": isinstance(trainer, GFlowNetTrainer) and trainer.uses_windows,
        "best_step": state.best_global_step,
        "best_metric": {args.metric_for_best_model: state.best_metric},
        "log": state.log_history,
    }


def update_model_folder(trained: Stage, data: RunData, metrics: Mapping[str, float], users: int) -> None:
    """Write a stage's test metrics into its model card, and the present titles of items next to it.

    If the run has made semantic ids, the item tokenizer is saved in the model's folder, for new items.

    Args:
        metrics: of the test split.
        users: number of test users.
    """
    write_recommender_files(trained.folder / "model", data.encoder, data.item_counts, data.titles)
    if data.item_tokenizer is not None:
        data.item_tokenizer.save_pretrained(trained.folder / "model" / ITEM_TOKENIZER_FOLDER)
    facts = CardFacts(**trained.record["card"])
    facts.results.append({"split": "test", "users": users, "metrics": shown_metrics(metrics)})
    write_card(facts, trained.folder / "model")


def _card(trainer: Trainer, data: RunData, folder: Path) -> CardFacts:
    """Facts for the model card from the trainer, the recipe and the data."""
    recipe, source = data.recipe, data.interactions
    begins = recipe.model.get("model_name_or_path")
    base = base_model(recipe.local(begins)) if begins else None
    about = {name: getattr(source, name) for name in ("name", "synthetic", "license", "source")}
    about |= {"users": len(source.users), "items": len(source.items), "interactions": source.num_interactions}
    name = f"{recipe.name}-{_stage_name(folder)}"
    return replace(card_facts(trainer), name=name, data=about, base=asdict(base) if base else None)


def _stage_name(folder: Path) -> str:
    """The name of the stage that a folder `<name>-<fingerprint>` belongs to."""
    return folder.name.rpartition("-")[0]


def prompt_fingerprint(data: RunData) -> Record:
    """Inputs of a stage that reads words: the prompt format and the titles; empty if it reads only ids."""
    recipe = data.recipe
    if not recipe.prompt and recipe.model.get("new_tokens") != "titles":
        return {}
    return {"prompt": recipe.prompt, "titles": fingerprint(sorted(data.titles.items()))}


def result_fields(section: Mapping[str, Any]) -> Record:
    """The fields of a training section that affect the result."""
    return {name: value for name, value in section.items() if name not in NON_RESULT_FIELDS}
