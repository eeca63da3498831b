"""Value checks for training arguments that transformers accepts, but that fail or do nothing during training."""

from __future__ import annotations

from transformers import TrainingArguments

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_ONE, Bound, at_least, check_number


#: Bounds of the fields of `TrainingArguments`; None is always valid.
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
    """Raise an error for numbers with which training would fail, or do nothing, after it has started.

    Raises:
        ValueError: names the option, its value and the valid values.
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
