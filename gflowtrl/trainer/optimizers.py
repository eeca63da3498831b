"""Checks of a user's optimizer and scheduler, and the flow head's parameter group."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from gflowtrl.policy.heads import is_head


def split_head_group(optimizer: Any, model: nn.Module, learning_rate: float) -> None:
    """Move the flow head into separate parameter groups, in place.

    Args:
        optimizer: optimizer over the model's parameters, possibly DeepSpeed's.
        model: model with or without a flow head.
        learning_rate: learning rate of the head.
    """
    head = {id(parameter) for name, parameter in model.named_parameters() if is_head(name)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in head]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def adopt_optimizer(optimizers: tuple[Any, Any], model: nn.Module, head_learning_rate: float) -> None:
    """Check a user's optimizer and scheduler against the trained model, and add the flow head's parameters.

    The trainer attaches the head, so an optimizer created earlier cannot contain it. The head is added as a separate
    group with the optimizer's defaults. Without an optimizer, nothing is done.

    Args:
        optimizers: `(optimizer, scheduler)`. None: the trainer creates it.
        model: the model to train, with adapters and head.
        head_learning_rate: learning rate of the head's group.

    Raises:
        TypeError: not an optimizer.
        ValueError: the optimizer has parameters of another model or no trained ones, or the scheduler belongs to
            another optimizer.
    """
    optimizer, scheduler = optimizers
    if optimizer is None:
        if scheduler is not None:
            raise ValueError(
                "optimizers has a scheduler without an optimizer, so the scheduler would have no effect. Give both, "
                "or set lr_scheduler_type."
            )
        return
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizers[0] is {optimizer!r}; give a torch.optim.Optimizer over the model's parameters.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("The scheduler in optimizers belongs to another optimizer; create it for optimizers[0].")
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    _check_owner(ids, model)
    missing = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids}
    head = [parameter for name, parameter in missing.items() if is_head(name)]
    if head and scheduler is not None:
        raise ValueError(
            "The flow head is added to the optimizer as a new group, which the given scheduler would not know. Call "
            "gflowtrl.policy.attach_flow_heads(model) before you create both, or leave the scheduler out."
        )
    if head:
        optimizer.add_param_group({"params": head, "lr": head_learning_rate})
    _check_complete([name for name in missing if not is_head(name)], ids, model)


def _check_owner(ids: set[int], model: nn.Module) -> None:
    """Check that the optimizer has parameters, all of them of the model."""
    foreign = ids - {id(parameter) for parameter in model.parameters()}
    if foreign or not ids:
        raise ValueError(
            f"The optimizer in optimizers has {len(ids)} parameters, of which {len(foreign)} do not belong to the "
            f"{type(model).__name__} that is trained: it was created for another model, or before the model was "
            f"changed. Load the model, pass it to the trainer as an object, and create the optimizer over its "
            f"parameters."
        )


def _check_complete(missing: list[str], ids: set[int], model: nn.Module) -> None:
    """Raise an error if no trained parameter is in the optimizer (new adapters), and warn about missing ones."""
    trained = {id(p) for n, p in model.named_parameters() if p.requires_grad and not is_head(n)}
    if not trained & ids:
        raise ValueError(
            f"The optimizer in optimizers has none of the trained parameters, for example {missing[0]!r}: the trainer "
            f"adds adapters later. Wrap the model with peft.get_peft_model, create the optimizer over the result, and "
            f"leave peft_config out; or leave optimizers out."
        )
    if missing:
        warnings.warn(
            f"The optimizer in optimizers does not have {len(missing)} of {len(trained)} trainable tensors, for "
            f"example {missing[0]!r}; they will not be trained.",
            stacklevel=4,
        )
