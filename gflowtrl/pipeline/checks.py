"""What of a recipe can only fail later, found before any work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gflowtrl.losses import get_loss
from gflowtrl.samplers import build_sampler


if TYPE_CHECKING:
    from .recipe import EvaluationSection, Recipe


def check_evaluation(evaluation: EvaluationSection) -> None:
    """Numbers of the section `evaluation`.

    Raises:
        ValueError: one is out of its range, or the beam is narrower than the lists are long.
    """
    for name, low, otherwise in (
        ("num_beams", 1, ""), ("batch_size", 1, ""), ("bootstrap_samples", 2, ""),
        ("users", 1, ", or null for all users"), ("calibration_rows", 1, ", or 0 for none"),
    ):  # fmt: skip
        value = getattr(evaluation, name)
        if value is not None and value < low and not (name == "calibration_rows" and value == 0):
            raise ValueError(f"evaluation.{name} is {value}; give at least {low}{otherwise}.")
    if not evaluation.ks or min(evaluation.ks) < 1:
        raise ValueError(f"evaluation.ks is {evaluation.ks}; give lengths of lists, each at least 1.")
    if evaluation.num_beams < max(evaluation.ks):
        raise ValueError(
            f"evaluation.num_beams is {evaluation.num_beams}, but a list of {max(evaluation.ks)} (evaluation.ks) "
            f"needs at least as many beams."
        )


def check_gflownet(recipe: Recipe) -> None:
    """What the trainer would refuse after the teacher, SFT and control have been trained.

    Raises:
        ValueError: a loss needs rewards and there are none, a source that the sampler has not has a weight, or an
            encoder-decoder is to share prompts.
    """
    from gflowtrl.trainer.weighting import source_table

    args = recipe.training_arguments("gflownet", recipe.output_dir)
    if not recipe.rewards and any(get_loss(name).needs_rewards for name in args.loss_type):
        raise ValueError(
            f"gflownet.loss_type {args.loss_type} needs rewards, but the recipe's section rewards is empty. Add one, "
            f"{{type: ground_truth}} for example (docs/rewards.md)."
        )
    if recipe.sampler is not None:
        sampler = build_sampler(recipe.sampler, teacher=lambda histories: None)
        source_table(args.source_weights or {}, sampler.source_names)
    if args.max_shared_prompts > 1 and recipe.encoder_decoder:
        raise ValueError(
            f"gflownet.max_shared_prompts is {args.max_shared_prompts}, but the model is an encoder-decoder, whose "
            f"prompts are none the beginning of another. Leave it out."
        )
