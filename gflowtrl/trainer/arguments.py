"""What training arguments may be. transformers takes a negative rate or no epoch, and finds out while training."""

from __future__ import annotations

from transformers import TrainingArguments

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_ONE, Bound, at_least, check_number


#: Fields of `TrainingArguments`, where they are not None.
BOUNDS: dict[str, Bound] = {
    "seed": SEED,
    "data_seed": SEED,
    "learning_rate": NOT_NEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_ONE,
    "adam_beta2": SHARE_BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE_BELOW_ONE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "dataloader_num_workers": at_least(0),
    "dataloader_prefetch_factor": COUNT,
    "ddp_timeout": COUNT,
}


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse numbers with which a training would fail, or do nothing, after it has begun.

    Raises:
        ValueError: names the option, its value and what it may be.
    """
    for name, bound in BOUNDS.items():
        if getattr(args, name, None) is not None:
            check_number(name, getattr(args, name), bound)
    for what in ("logging", "eval", "save"):
        steps = getattr(args, f"{what}_steps")
        if getattr(args, f"{what}_strategy") == "steps" and not (what == "eval" and not steps):
            check_number(f"{what}_steps", steps, POSITIVE)
    if args.max_steps < -1:
        raise ValueError(f"max_steps is {args.max_steps}; it must be {COUNT.meaning}, or -1 for num_train_epochs.")
    if args.max_steps <= 0:
        check_number("num_train_epochs", args.num_train_epochs, POSITIVE)
