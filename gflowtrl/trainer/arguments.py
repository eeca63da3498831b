"""What training arguments may be. transformers takes a negative rate or no epoch, and finds out while training."""

from __future__ import annotations

from transformers import TrainingArguments

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_ONE, Bound, at_least, check_number


#: Fields of `TrainingArguments`, where they are not None.
BOUNDS: dict[str, Bound] = {
    "seed": SEED,
    "data_seed": SEED,
    "learning_rate": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_ONE,
    "adam_beta2": SHARE_BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "label_smoothing_factor": SHARE_BELOW_ONE,
    "neftune_noise_alpha": POSITIVE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": COUNT,
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
    if args.max_steps != -1:
        check_number("max_steps", args.max_steps, Bound(f"{COUNT.meaning}, or -1 for num_train_epochs", COUNT.holds))
