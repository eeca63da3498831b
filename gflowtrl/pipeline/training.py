"""The three training stages: SFT with TRL's own trainer, the control, and the GFlowNet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProgressCallback, Seq2SeqTrainer, Trainer, TrainerCallback, set_seed
from trl import SFTTrainer

from gflowtrl.compat import TrainableTokensWrapper
from gflowtrl.data import (
    LengthGroupedEpochSampler,
    TargetCollator,
    history_lengths,
    sft_dataset,
    text_sft_dataset,
)
from gflowtrl.policy import load_backbone, merge_tied_embeddings
from gflowtrl.policy.modules import innermost
from gflowtrl.recommender import TEACHER_FOLDER, write_recommender_files
from gflowtrl.samplers import build_sampler
from gflowtrl.teachers import TeacherModule, fingerprint
from gflowtrl.trainer import GFlowNetConfig, GFlowNetTrainer, RankingEvaluationMixin
from gflowtrl.trainer.adapters import add_adapters
from gflowtrl.trainer.checkpoints import CompleteCheckpointsMixin
from gflowtrl.trainer.evaluation import rows_per_step
from gflowtrl.trainer.finite import FiniteMixin
from gflowtrl.trainer.model_card import CardFacts, base_model, card_facts, shown_metrics, write_card
from gflowtrl.trainer.resume import last_checkpoint
from gflowtrl.trainer.saved import check_saved

from .materials import Materials, files_fingerprint
from .models import build_model, quantization, save_merged
from .signals import build_rewards, final_weights, reward_key, teacher_key
from .stage import CHECKPOINTS, Record, Stage, Work, Workshop, if_set


#: Fields of training arguments that change what is shown or how fast it is, never the result.
COSMETIC = {
    *("disable_tqdm", "log_completions", "log_level", "logging_steps", "logging_strategy", "report_to", "run_name"),
    *("dataloader_num_workers", "dataloader_pin_memory", "save_total_limit"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
}
CURVES = "runs"  # where transformers has TensorBoard write, beside the checkpoints


class _Stage(CompleteCheckpointsMixin, FiniteMixin, RankingEvaluationMixin):
    """Evaluated by constrained beam search; the order of rows is a function of (seed, epoch), so that a resumed run
    repeats an undisturbed one.

    Attributes:
        row_lengths: `(rows,)` of the training rows; rows of like length are put together.
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
    """TRL's SFTTrainer. Nothing is sent anywhere."""

    def _send_telemetry(self) -> None:
        """Nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if isinstance(innermost(model).get_output_embeddings(), TrainableTokensWrapper):
            # TRL multiplies by the head's weight outside the head, where rows that are trained apart are not known.
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Seq2SeqSFTStage(_Stage, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer on one row a target."""


class ShortProgress(ProgressCallback):
    """The Trainer's bars, and below them one short line a log entry instead of all that was logged."""

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


def train_sft(workshop: Workshop, materials: Materials) -> Stage:
    """Supervised fine-tuning on the whole vocabulary; every item is predicted once from the items before it.

    Causal models read one row a user (TRL's SFTTrainer), encoder-decoders one row a target (Seq2SeqTrainer).
    """
    inputs = {**_untrained_inputs(materials), "sft": essential(materials.recipe.sft)}

    def work(folder: Path) -> Record:
        trainer = _sft_trainer(materials, folder, workshop.callbacks)
        return train(trainer, materials, folder, partial(build_model, materials, quantised=False))

    return _run_stage(workshop, materials, "sft", inputs, "supervised fine-tuning", work)


def _sft_trainer(materials: Materials, folder: Path, callbacks: Sequence[TrainerCallback]) -> Trainer:
    recipe, model, rows = materials.recipe, build_model(materials), materials.splits.train
    if recipe.peft_config is None:
        merge_tied_embeddings(model)
    else:
        model = add_adapters(model, recipe.peft_config, materials.catalog)
    args, longest = recipe.training_arguments("sft", folder / CHECKPOINTS), recipe.data.max_history_items
    kind, collator, lengths = SFTStage, None, None
    if recipe.encoder_decoder:
        kind, collator = Seq2SeqSFTStage, TargetCollator(materials.encoder)
        lengths = history_lengths(rows).clamp(max=longest)
    elif recipe.prompt:
        rows = text_sft_dataset(rows["history"], rows["target"], materials.encoder)
    else:
        rows = sft_dataset(materials.splits.train_sequences, materials.catalog, materials.tokenizer, longest)
    if kind is SFTStage:
        args.dataset_kwargs = {"skip_prepare_dataset": True}  # rows are tokenised and cut already
        lengths = torch.tensor([len(tokens) for tokens in rows["input_ids"]])
    trainer = kind(
        model,
        args=args,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=materials.validation,
        processing_class=materials.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.row_lengths = lengths
    if recipe.encoder_decoder:
        # The models take the number of tokens of the whole step and make nothing of it: their loss is a mean of the
        # micro-batch, which the Trainer would multiply by the number of processes and not divide by the accumulation.
        trainer.model_accepts_loss_kwargs = False
    measure, counts = recipe.evaluation, materials.item_counts
    trainer.set_up_ranking(materials.catalog, materials.encoder, counts, measure.num_beams, measure.ks)
    return trainer


def train_control(workshop: Workshop, materials: Materials, start: Stage | None) -> Stage:
    """Cross entropy on single targets, from the same model as the GFlowNet: what any gain has to be compared with.

    Args:
        start: the stage whose model it begins from (SFT is continued then); None: untrained.
    """
    recipe = materials.recipe
    inputs = {**_start_inputs(materials, start), "control": essential(recipe.control_fields)}

    def work(folder: Path) -> Record:
        args = recipe.training_arguments("control", folder / CHECKPOINTS)
        trainer = _flow_trainer(workshop, materials, args, start)
        return train(trainer, materials, folder, partial(_start_model, materials, start, quantised=False))

    about = "cross entropy from the untrained model" if start is None else "SFT continued"
    return _run_stage(workshop, materials, "control", inputs, f"{about} (the control)", work)


def train_gflownet(
    workshop: Workshop, materials: Materials, start: Stage | None, teacher: TeacherModule | None
) -> Stage:
    """GFlowNet training with the recipe's rewards and sampler.

    Args:
        start: the stage whose model it begins from; None: untrained.
        teacher: of rewards and samplers that use the recipe's own.
    """
    recipe = materials.recipe
    inputs = {
        **_start_inputs(materials, start),
        "gflownet": essential(recipe.gflownet),
        "rewards": reward_key(recipe, materials),
        "sampler": recipe.sampler,
        "teacher": teacher_key(recipe, materials, recipe.teacher) if teacher is not None else None,
    }

    def work(folder: Path) -> Record:
        trainer = gflownet_trainer(workshop, materials, start, teacher, folder)
        record = train(trainer, materials, folder, partial(_start_model, materials, start, quantised=False))
        if teacher is not None and workshop.is_main:
            teacher.save_pretrained(folder / "model" / TEACHER_FOLDER)  # the recommender explains itself by it
        return {**record, "reward_weights": trainer.rewards.weights if trainer.rewards else []}

    about = "GFlowNet training from the untrained model" if start is None else "GFlowNet fine-tuning"
    return _run_stage(workshop, materials, "gflownet", inputs, about, work)


def gflownet_trainer(
    workshop: Workshop, materials: Materials, start: Stage | None, teacher: TeacherModule | None, folder: Path
) -> GFlowNetTrainer:
    """The trainer of the recipe's GFlowNet stage in `folder`, which continues what the stage `start` has left; None:
    it begins untrained."""
    recipe = materials.recipe
    args = recipe.training_arguments("gflownet", folder / CHECKPOINTS)
    sft_model = None if start is None else start.folder / "model"
    rewards, sampler = build_rewards(workshop, materials, teacher, sft_model), None
    args.reward_weights = final_weights(workshop, materials, rewards) or None
    if recipe.sampler is not None:
        sampler = build_sampler(recipe.sampler, teacher, args.temperature, args.epsilon)
    return _flow_trainer(workshop, materials, args, start, reward_funcs=rewards, sampler=sampler)


def _flow_trainer(
    workshop: Workshop, materials: Materials, args: GFlowNetConfig, start: Stage | None, **options: Any
) -> GFlowNetTrainer:
    set_seed(materials.recipe.seed)
    return GFlowNetTrainer(
        _start_model(materials, start),
        args=args,
        train_dataset=materials.splits.train,
        eval_dataset=materials.validation,
        processing_class=materials.tokenizer,
        catalog=materials.catalog,
        item_counts=materials.item_counts,
        item_titles=materials.titles,
        prompt_encoder=materials.encoder,
        peft_config=materials.recipe.peft_config,
        callbacks=workshop.callbacks,
        **options,
    )


def _start_model(materials: Materials, start: Stage | None, quantised: bool = True) -> PreTrainedModel:
    """What control and GFlowNet begin from: the model of the stage `start`, or, None, the one before any training."""
    if start is None:
        return build_model(materials, quantised)
    return load_backbone(start.folder / "model", **(quantization(materials.recipe) if quantised else {}))


def _start_inputs(materials: Materials, start: Stage | None) -> Record:
    """What that model depends on besides the seed."""
    windows = not materials.recipe.encoder_decoder and not materials.encoder.tail  # what prompts hold follows from it
    begins = {"start": _untrained_inputs(materials)} if start is None else {"sft": start.fingerprint}
    return begins | ({"windows": True} if windows else {})


def _untrained_inputs(materials: Materials) -> Record:
    """What a model before any training depends on besides the seed, and the prompts that it reads."""
    recipe = materials.recipe
    begins = recipe.model.get("model_name_or_path")
    files = files_fingerprint(recipe.local(begins)) if begins else None
    return {
        "data": materials.fingerprint, "model": recipe.model, **_worded(materials), **if_set(model_files=files)
    }  # fmt: skip


def _run_stage(workshop: Workshop, materials: Materials, name: str, inputs: Record, about: str, work: Work) -> Stage:
    recipe = materials.recipe
    # What of the evaluation decides which checkpoint is kept.
    selection = {"num_beams": recipe.evaluation.num_beams, "k": recipe.evaluation.primary_k}
    selection |= if_set(users=recipe.evaluation.users)
    inputs = {**inputs, "seed": recipe.seed, "evaluation": selection, **if_set(peft=recipe.peft)}
    stage = workshop.stage(name, inputs)
    stage.run(f"{about} on {materials.kind}", work)
    return stage


def train(trainer: Trainer, materials: Materials, folder: Path, base: Callable[[], PreTrainedModel]) -> Record:
    """Trains, from the last checkpoint where there is one, and keeps the best model as `folder/model`.

    Adapters are kept as `folder/adapters` and merged into what `base` gives, the model as it was before.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint and trainer.is_world_process_zero():
        print(f"Continuing from {checkpoint}.", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    adapted = bool(materials.recipe.peft)
    trainer.save_model(str(folder / ("adapters" if adapted else "model")))
    state, args = trainer.state, trainer.args
    trainer.accelerator.wait_for_everyone()  # the others may still be reading the best checkpoint
    if trainer.is_world_process_zero():
        if adapted:
            save_merged(base, folder / "adapters", folder / "model")
            materials.tokenizer.save_pretrained(folder / "model")
        write_recommender_files(folder / "model", materials.encoder, materials.item_counts, materials.titles)
        if (curves := folder / CHECKPOINTS / CURVES).is_dir():  # the folder of checkpoints is given up
            shutil.copytree(curves, folder / CURVES, dirs_exist_ok=True)
    if adapted or not isinstance(trainer, GFlowNetTrainer):  # which has compared what it saved itself
        trusted = {key: value for key, value in materials.recipe.model.items() if key == "trust_remote_code"}
        check_saved(trainer, folder / "model", materials.catalog, materials.encoder, **trusted)
    facts = _card(trainer, materials, folder)
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


def update_model_folder(trained: Stage, materials: Materials, metrics: Mapping[str, float], users: int) -> None:
    """Writes what a stage's model reaches on the test split into its model card, and the items' titles, which may have
    changed since it was trained, beside it.

    Args:
        metrics, users: of the test, and how many users it has.
    """
    write_recommender_files(trained.folder / "model", materials.encoder, materials.item_counts, materials.titles)
    facts = CardFacts(**trained.record["card"])
    facts.results.append({"split": "test", "users": users, "metrics": shown_metrics(metrics)})
    write_card(facts, trained.folder / "model")


def _card(trainer: Trainer, materials: Materials, folder: Path) -> CardFacts:
    """What the trainer knows, and what the recipe and the data do."""
    recipe, data = materials.recipe, materials.data
    begins = recipe.model.get("model_name_or_path")
    base = base_model(recipe.local(begins)) if begins else None
    about = {name: getattr(data, name) for name in ("name", "synthetic", "license", "source")}
    about |= {"users": len(data.users), "items": len(data.items), "interactions": data.num_interactions}
    name = f"{recipe.name}-{folder.name.rpartition('-')[0]}"
    return replace(card_facts(trainer), name=name, data=about, base=asdict(base) if base else None)


def _worded(materials: Materials) -> Record:
    """What the training of a language model depends on beside its data: the words."""
    recipe = materials.recipe
    if not recipe.prompt and recipe.model.get("new_tokens") != "titles":
        return {}
    return {"prompt": recipe.prompt, "titles": fingerprint(sorted(materials.titles.items()))}


def essential(section: Mapping[str, Any]) -> Record:
    """The fields of a training section that its result depends on."""
    return {name: value for name, value in section.items() if name not in COSMETIC}
