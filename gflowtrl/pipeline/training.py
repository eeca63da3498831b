"""The three training stages: SFT with TRL's own trainer, its control, and the GFlowNet."""

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
from gflowtrl.data import TargetCollator, sft_dataset, text_sft_dataset
from gflowtrl.policy import load_backbone, merge_tied_embeddings
from gflowtrl.policy.modules import innermost
from gflowtrl.recommender import TEACHER_FOLDER, write_recommender_files
from gflowtrl.samplers import build_sampler
from gflowtrl.teachers import TeacherModule, fingerprint
from gflowtrl.trainer import GFlowNetTrainer, RankingEvaluationMixin
from gflowtrl.trainer.adapters import add_adapters
from gflowtrl.trainer.checkpoints import CompleteCheckpointsMixin, last_checkpoint
from gflowtrl.trainer.evaluation import history_lengths
from gflowtrl.trainer.model_card import CardFacts, base_model, card_facts, shown_metrics, write_card
from gflowtrl.trainer.tree_policy_trainer import LengthGroupedEpochSampler

from .materials import Materials, files_fingerprint, measured_users
from .models import build_model, continued_model, save_merged
from .recipe import Recipe, local_folder
from .signals import build_rewards, final_weights, reward_key, teacher_key
from .stage import CHECKPOINTS, Stage, Workshop


#: Fields of training arguments that change what is shown or how fast it is, never the result.
COSMETIC = {
    *("disable_tqdm", "log_completions", "log_level", "logging_steps", "logging_strategy", "report_to", "run_name"),
    *("dataloader_num_workers", "dataloader_pin_memory", "save_total_limit"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
}
CURVES = "runs"  # where transformers has TensorBoard write, beside the checkpoints


class _EpochOrder:
    """Order of rows as a function of (seed, epoch), so that a resumed run repeats an undisturbed one."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = self._row_lengths(self.train_dataset if train_dataset is None else train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroupedEpochSampler(lengths, batch, args.seed if args.data_seed is None else args.data_seed)


class SFTStage(_EpochOrder, CompleteCheckpointsMixin, RankingEvaluationMixin, SFTTrainer):
    """TRL's SFTTrainer, evaluated by constrained beam search. Nothing is sent anywhere."""

    def _send_telemetry(self) -> None:
        """Nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if isinstance(innermost(model).get_output_embeddings(), TrainableTokensWrapper):
            # TRL multiplies by the head's weight outside the head, where rows that are trained apart are not known.
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _row_lengths(self, rows: Dataset) -> Tensor:
        return torch.tensor([len(tokens) for tokens in rows["input_ids"]])


class Seq2SeqSFTStage(_EpochOrder, CompleteCheckpointsMixin, RankingEvaluationMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer on one row a target, evaluated by constrained beam search."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The models take the number of tokens of the whole step and make nothing of it: their loss is a mean of the
        # micro-batch, which the Trainer would multiply by the number of processes and not divide by the accumulation.
        self.model_accepts_loss_kwargs = False

    def _row_lengths(self, rows: Dataset) -> Tensor:
        return history_lengths(rows).clamp(max=self.data_collator.encoder.max_history_items)


class ShortProgress(ProgressCallback):
    """The Trainer's bars, and below them one short line a log entry instead of all that was logged."""

    SHOWN = ("loss", "eval_recall", "eval_ndcg", "eval_coverage", "residual", "policy_entropy")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        k = args.metric_for_best_model.partition("@")[2]
        shown = {
            n: v
            for n, v in logs.items()
            if n in self.SHOWN or n.partition("@")[0] in self.SHOWN and n.endswith(f"@{k}")
        }
        if shown:
            values = ", ".join(f"{name} {float(value):.4f}" for name, value in shown.items())
            self.training_bar.write(f"  epoch {state.epoch:.2f} of {state.num_train_epochs}: {values}")


def train_sft(workshop: Workshop, materials: Materials, callbacks: Sequence[TrainerCallback] = ()) -> Stage:
    """Supervised fine-tuning on the whole vocabulary; every item is predicted once from the items before it.

    Causal models read one row a user (TRL's SFTTrainer), encoder-decoders one row a target (Seq2SeqTrainer).
    """
    recipe = materials.recipe
    stage = workshop.stage(
        "sft",
        {"data": materials.fingerprint, "seed": recipe.seed, "model": recipe.model, "sft": _essential(recipe.sft),
         "evaluation": _selection(recipe), **_adapted(recipe), **_worded(materials), **_begun(recipe)},
    )  # fmt: skip

    def work(folder: Path) -> dict[str, Any]:
        trainer = _sft_trainer(materials, folder, callbacks)
        trainer.set_up_ranking(
            materials.catalog,
            materials.encoder,
            materials.item_counts,
            recipe.evaluation.num_beams,
            recipe.evaluation.ks,
        )
        return train(trainer, materials, folder, partial(build_model, materials, quantised=False))

    stage.run(f"supervised fine-tuning on {materials.kind}", work)
    return stage


def _sft_trainer(materials: Materials, folder: Path, callbacks: Sequence[TrainerCallback]) -> Trainer:
    recipe, model = materials.recipe, build_model(materials)
    if recipe.peft_config is None:
        merge_tied_embeddings(model)
    else:
        model = add_adapters(model, recipe.peft_config, materials.catalog)
    options = {
        "args": recipe.training_arguments("sft", folder / CHECKPOINTS),
        "eval_dataset": materials.validation,
        "processing_class": materials.tokenizer,
        "callbacks": list(callbacks),
    }
    if recipe.encoder_decoder:
        collator = TargetCollator(materials.encoder)
        return Seq2SeqSFTStage(model, train_dataset=materials.splits.train, data_collator=collator, **options)
    options["args"].dataset_kwargs = {"skip_prepare_dataset": True}  # rows are tokenised and cut already
    if recipe.prompt:
        train = materials.splits.train
        rows = text_sft_dataset(train["history"], train["target"], materials.encoder)
        return SFTStage(model, train_dataset=rows, **options)
    rows = sft_dataset(
        materials.splits.train_sequences, materials.catalog, materials.tokenizer, recipe.data.max_history_items
    )
    return SFTStage(model, train_dataset=rows, **options)


def train_control(
    workshop: Workshop, materials: Materials, sft: Stage, callbacks: Sequence[TrainerCallback] = ()
) -> Stage:
    """SFT continued on single targets, for the GFlowNet's number of steps: what any gain has to be compared with."""
    recipe = materials.recipe
    inputs = {"sft": sft.fingerprint, "seed": recipe.seed, "control": _essential(recipe.control_fields)}
    inputs |= _adapted(recipe)
    stage = workshop.stage("control", inputs | {"evaluation": _selection(recipe)})

    def work(folder: Path) -> dict[str, Any]:
        trainer = _flow_trainer(workshop, materials, "control", sft, folder, callbacks)
        return train(trainer, materials, folder, partial(load_backbone, sft.folder / "model"))

    stage.run(f"SFT continued (the control) on {materials.kind}", work)
    return stage


def train_gflownet(
    workshop: Workshop,
    materials: Materials,
    sft: Stage,
    teacher: TeacherModule | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Stage:
    """GFlowNet fine-tuning of the SFT model with the recipe's rewards and sampler."""
    recipe = materials.recipe
    inputs = {
        "sft": sft.fingerprint,
        "seed": recipe.seed,
        "gflownet": _essential(recipe.gflownet),
        "rewards": reward_key(recipe, materials),
        "sampler": recipe.sampler,
        "teacher": teacher_key(recipe, materials, recipe.teacher) if teacher is not None else None,
        "evaluation": _selection(recipe),
        **_adapted(recipe),
    }
    stage = workshop.stage("gflownet", inputs)

    def work(folder: Path) -> dict[str, Any]:
        trainer = gflownet_trainer(workshop, materials, sft, teacher, folder, callbacks)
        record = train(trainer, materials, folder, partial(load_backbone, sft.folder / "model"))
        if teacher is not None and workshop.is_main:
            teacher.save_pretrained(folder / "model" / TEACHER_FOLDER)  # the recommender explains itself by it
        return {**record, "reward_weights": trainer.rewards.weights if trainer.rewards else []}

    stage.run(f"GFlowNet fine-tuning on {materials.kind}", work)
    return stage


def gflownet_trainer(
    workshop: Workshop,
    materials: Materials,
    sft: Stage,
    teacher: TeacherModule | None,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> GFlowNetTrainer:
    """The trainer of the recipe's GFlowNet stage, which continues what the stage `sft` has left, in `folder`."""
    recipe = materials.recipe
    rewards = build_rewards(workshop, materials, teacher, sft.folder / "model")
    options = {"reward_funcs": rewards, "reward_weights": final_weights(workshop, materials, rewards)}
    if recipe.sampler is not None:
        args = recipe.training_arguments("gflownet", folder)
        options["sampler"] = build_sampler(recipe.sampler, teacher, args.temperature, args.epsilon)
    return _flow_trainer(workshop, materials, "gflownet", sft, folder, callbacks, **options)


def train(trainer: Trainer, materials: Materials, folder: Path, base: Callable[[], PreTrainedModel]) -> dict[str, Any]:
    """Trains, from the last checkpoint where there is one, and keeps the best model as `folder/model`.

    Adapters are kept as `folder/adapters` and merged into what `base` gives, the model as it was before.
    """
    if any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
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
        _keep_curves(folder / CHECKPOINTS / CURVES, folder / CURVES)
    facts = _card(trainer, materials, folder)
    if trainer.is_world_process_zero():
        write_card(facts, folder / "model")
    return {
        "card": asdict(facts),
        "steps": state.global_step,
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "best_step": state.best_global_step,
        "best_metric": {args.metric_for_best_model: state.best_metric},
        "log": state.log_history,
    }


def _keep_curves(written: Path, kept: Path) -> None:
    """Moves TensorBoard's files out of the folder of checkpoints, which is given up."""
    for file in sorted(written.rglob("*")):
        if file.is_file():
            place = kept / file.relative_to(written)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, place)


def add_test_results(trained: Stage, metrics: Mapping[str, float], users: int) -> None:
    """Writes what a stage's model reaches on the test split into its model card.

    Args:
        metrics, users: of the test, and how many users it has.
    """
    if "card" not in trained.record:  # from before there were cards: nothing says what belongs there
        return
    facts = CardFacts(**trained.record["card"])
    facts.results.append({"split": "test", "users": users, "metrics": shown_metrics(metrics)})
    write_card(facts, trained.folder / "model")


def refresh_details(trained: Stage, materials: Materials) -> None:
    """Writes the items' titles beside a stage's model anew: they may have changed since it was trained."""
    write_recommender_files(trained.folder / "model", materials.encoder, materials.item_counts, materials.titles)


def _card(trainer: Trainer, materials: Materials, folder: Path) -> CardFacts:
    """What the trainer knows, and what the recipe and the data do."""
    recipe, data = materials.recipe, materials.data
    begins = recipe.model.get("model_name_or_path")
    base = base_model(local_folder(recipe.folder, begins)) if begins else None
    about = {name: getattr(data, name) for name in ("name", "synthetic", "license", "source")}
    about |= {"users": len(data.users), "items": len(data.items), "interactions": data.num_interactions}
    name = f"{recipe.name}-{folder.name.rpartition('-')[0]}"
    return replace(card_facts(trainer), name=name, data=about, base=asdict(base) if base else None)


def _flow_trainer(
    workshop, materials: Materials, name: str, sft: Stage, folder: Path, callbacks, reward_weights=None, **options
):
    set_seed(materials.recipe.seed)
    args = materials.recipe.training_arguments(name, folder / CHECKPOINTS)
    args.reward_weights = reward_weights or None
    return GFlowNetTrainer(
        continued_model(materials.recipe, sft.folder / "model"),
        args=args,
        train_dataset=materials.splits.train,
        eval_dataset=materials.validation,
        processing_class=materials.tokenizer,
        catalog=materials.catalog,
        item_counts=materials.item_counts,
        item_titles=materials.titles,
        prompt_encoder=materials.encoder,
        peft_config=materials.recipe.peft_config,
        callbacks=list(callbacks),
        **options,
    )


def _adapted(recipe: Recipe) -> dict[str, Any]:
    """What a stage with adapters depends on beside what one without does."""
    return {"peft": recipe.peft} if recipe.peft else {}


def _begun(recipe: Recipe) -> dict[str, Any]:
    """What SFT depends on beside the model's name where that is a local folder: its files."""
    begins = recipe.model.get("model_name_or_path")
    found = files_fingerprint(local_folder(recipe.folder, begins)) if begins else None
    return {"model_files": found} if found else {}


def _worded(materials: Materials) -> dict[str, Any]:
    """What the SFT of a language model depends on beside its data: the words."""
    recipe = materials.recipe
    if not recipe.prompt and recipe.model.get("new_tokens") != "titles":
        return {}
    return {"prompt": recipe.prompt, "titles": fingerprint(sorted(materials.titles.items()))}


def _essential(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in COSMETIC}


def _selection(recipe: Recipe) -> dict[str, Any]:
    """What of the evaluation decides which checkpoint is kept."""
    return {"num_beams": recipe.evaluation.num_beams, "k": recipe.evaluation.primary_k, **measured_users(recipe)}
