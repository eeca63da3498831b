"""Checks of fields in the training sections and in `model`: those that cannot be set or cannot work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, TrainingArguments

from gflowtrl.checks import COUNT, SHARE_BELOW_ONE, check_number


_RUN = "the command, which runs the stages and resumes by itself"
_ROWS = "the rows, which are already tokenized and cut"
_SEARCH = "evaluation: policies are measured by beam search on the tree"
_NO_DRAWS = "nothing: the control is cross entropy on the observed targets only, and the field would have no effect"
#: Fields of training arguments that the pipeline sets or ignores, and what they follow from.
DERIVED_FIELDS = {
    "output_dir": "output_dir", "seed": "seed", "reward_weights": "the weight of each entry of rewards",
    "max_history_items": "data.max_history_items", "model_init_kwargs": "model",
    "eval_num_beams": "evaluation.num_beams", "eval_ks": "evaluation.ks",
    "do_train": _RUN, "do_eval": _RUN, "do_predict": _RUN, "resume_from_checkpoint": _RUN,
}  # fmt: skip
#: The same for `trl.SFTConfig` and `Seq2SeqTrainingArguments`.
DERIVED_SFT_FIELDS = DERIVED_FIELDS | {
    "packing": "the rows, one per user", "max_length": "data.max_history_items, which cuts the rows",
    "dataset_kwargs": _ROWS, "dataset_text_field": _ROWS, "dataset_num_proc": _ROWS, "truncation_mode": _ROWS,
    "shuffle_dataset": "train_sampling_strategy", "packing_strategy": _ROWS, "eval_packing": _ROWS,
    "trust_remote_code": "model", "predict_with_generate": _SEARCH, "generation_max_length": _SEARCH,
    "generation_num_beams": _SEARCH, "generation_config": _SEARCH, "sortish_sampler": "train_sampling_strategy",
}  # fmt: skip
#: The same for the control: fields that draw, reward and weight trajectories.
DERIVED_CONTROL_FIELDS = DERIVED_FIELDS | dict.fromkeys(
    (
        *("num_generations", "temperature", "epsilon", "log_z_learning_rate", "loss_reduction", "source_weights"),
        *("trajectory_weighting", "reward_transform", "reward_beta", "reward_floor", "leaf_reduction"),
        *("max_exact_elements", "exact_top_items", "ref_weight"),
    ),
    _NO_DRAWS,
)
#: Sizes in the configurations of transformers' models; a class's `attribute_map` adds its own names.
_SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers"),
    *("num_heads", "n_positions", "n_embd", "n_layer", "n_head"),
}


def check_derived(stage: str, section: Mapping[str, Any]) -> None:
    """Check that a stage's section sets no field that follows from others.

    Raises:
        ValueError: names the field and what it follows from.
    """
    owners = {"sft": DERIVED_SFT_FIELDS, "control": DERIVED_CONTROL_FIELDS}.get(stage, DERIVED_FIELDS)
    for name in owners.keys() & section.keys():
        raise ValueError(f"{stage}.{name} cannot be set: it follows from {owners[name]}.")


def check_evaluated(args: TrainingArguments, patience: int | None) -> None:
    """Check that a stage is evaluated at all, and after each epoch if it may stop early.

    Whether `eval_delay` is too long in the units of the other length (epochs of `max_steps`, steps of
    `num_train_epochs`) depends on the number of rows: see `dry_run`.

    Args:
        args: of the stage.
        patience: its `early_stopping_patience`.

    Raises:
        ValueError: names the field.
    """
    strategy = str(args.eval_strategy.value)
    if patience is not None and strategy != "epoch":
        raise ValueError(
            f"early_stopping_patience counts epochs, but eval_strategy is {strategy!r}. Leave eval_strategy out."
        )
    known = {"epoch": args.num_train_epochs if args.max_steps <= 0 else None, "steps": max(args.max_steps, 0) or None}
    check_delay(args, known.get(strategy))


def check_delay(args: TrainingArguments, length: float | None) -> None:
    """Check that the first evaluation is not after the end.

    Args:
        args: of the stage.
        length: of the training, in the units of `eval_strategy`: epochs or steps; None: unknown.

    Raises:
        ValueError: names the field.
    """
    if length is not None and args.eval_delay > length:
        unit = "epochs" if args.eval_strategy == "epoch" else "steps"
        raise ValueError(
            f"eval_delay is {args.eval_delay:g}, but the training takes {length:g} {unit}, so it would never be "
            f"evaluated and no best checkpoint chosen. Lower eval_delay."
        )


def check_model_fields(kind: str, model: Mapping[str, Any]) -> None:
    """Check that a new model can be made and run with these sizes and rates.

    Args:
        kind: a `model_type` of transformers.
        model: the section.

    Raises:
        ValueError: names the field.
    """
    given = {name: value for name, value in model.items() if value is not None}
    mapped = CONFIG_MAPPING[kind].attribute_map
    sizes = _SIZES | {own for general, own in mapped.items() if general in _SIZES}
    for name, value in given.items():
        if name in sizes:
            check_number(f"model.{name}", value, COUNT)
        elif re.search(r"dropout|pdrop", name) and not isinstance(value, str):
            check_number(f"model.{name}", value, SHARE_BELOW_ONE)
    usual = CONFIG_MAPPING[kind]()
    hidden, heads = (
        given.get(name, given.get(mapped.get(name, name), getattr(usual, name, None)))
        for name in ("hidden_size", "num_attention_heads")
    )
    named = {name: f"model.{mapped.get(name, name)}" for name in ("hidden_size", "num_attention_heads")}
    free = "head_dim" in given or hasattr(usual, "d_kv")  # the size of a head is set separately
    if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads and not free:
        raise ValueError(
            f"{named['hidden_size']} is {hidden}, not a multiple of {named['num_attention_heads']}, which is {heads}: "
            f"all heads have the same size."
        )
    try:
        config = CONFIG_MAPPING[kind](**{name: value for name, value in model.items() if name != "model_type"})
    except Exception as error:  # each class raises its own types of errors
        raise ValueError(f"The section model does not describe a {kind}: {' '.join(str(error).split())}") from error
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(
            f"model.num_key_value_heads is {groups}, which does not divide {named['num_attention_heads']}, which is "
            f"{heads}: each key-value head serves the same number of heads."
        )
