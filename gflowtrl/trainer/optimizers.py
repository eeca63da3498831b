"""Optimizers and schedulers that a user brings, and the flow head's group in them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from gflowtrl.policy.heads import is_head


def split_head_group(optimizer: Any, model: nn.Module, learning_rate: float) -> None:
    """Give the flow head parameter groups of its own, in place.

    Args:
        optimizer: over the model's parameters; DeepSpeed may have put one of its own in the place.
        model: with or without a head.
        learning_rate: the head's.
    """
    own = {id(parameter) for name, parameter in model.named_parameters() if is_head(name)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def adopt_optimizer(optimizers: tuple[Any, Any], model: nn.Module, head_learning_rate: float) -> None:
    """Check a user's optimizer and scheduler against the model that is trained, and add the flow head's parameters.

    The trainer attaches the head, which an optimizer that was made before cannot hold: it joins as a group of its own,
    with the optimizer's defaults. Nothing is done where no optimizer is given.

    Args:
        optimizers: `(optimizer, scheduler)`, each None where the trainer is to make it.
        model: with adapters and head, as it will be trained.
        head_learning_rate: of that group.

    Raises:
        TypeError: something that is not an optimizer.
        ValueError: parameters of another model, none of those that are trained, or a scheduler of another optimizer.
    """
    optimizer, scheduler = optimizers
    if optimizer is None:
        if scheduler is not None:
            raise ValueError(
                "optimizers holds a scheduler without an optimizer: it would change the rate of an optimizer that is "
                "not used. Give both, or set lr_scheduler_type."
            )
        return
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizers[0] is {optimizer!r}; give a torch.optim.Optimizer over the model's parameters.")
    of_scheduler = getattr(scheduler, "optimizer", optimizer)
    if of_scheduler is not optimizer:
        raise ValueError("The scheduler in optimizers was made for another optimizer; make it for optimizers[0].")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _check_owner(held, names, model)
    ids = {id(parameter) for parameter in held}
    left_out = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids}
    heads = {name: parameter for name, parameter in left_out.items() if is_head(name)}
    if heads and scheduler is not None:
        raise ValueError(
            "The flow head joins the optimizer as a group of its own, which the given scheduler would not know. Call "
            "gflowtrl.policy.attach_flow_heads(model) before you make both, or leave the scheduler out."
        )
    if heads:
        optimizer.add_param_group({"params": list(heads.values()), "lr": head_learning_rate})
    _check_complete(left_out, heads, names, ids, model)


def _check_owner(held: list[nn.Parameter], names: Mapping[int, str], model: nn.Module) -> None:
    strangers = [parameter for parameter in held if id(parameter) not in names]
    if strangers or not held:
        raise ValueError(
            f"The optimizer in optimizers holds {len(held)} parameters, of which {len(strangers)} do not belong to "
            f"the {type(model).__name__} that is trained: it was made for another model, or before it was changed. "
            f"Load the model, give it to the trainer as an object, and make the optimizer over its parameters."
        )


def _check_complete(
    left_out: Mapping[str, nn.Parameter], heads: Mapping[str, Any], names: Mapping[int, str], ids: set[int],
    model: nn.Module,
) -> None:  # fmt: skip
    """Refuse an optimizer over nothing that is trained (adapters that the trainer makes); warn of parts left out."""
    others = [name for name in left_out if name not in heads]
    trained = {id(p) for n, p in model.named_parameters() if p.requires_grad and not is_head(n)}
    if not trained & ids:
        raise ValueError(
            f"The optimizer in optimizers holds none of the parameters that are trained, {others[0]!r} for one: the "
            f"trainer makes adapters after it. Wrap the model with peft.get_peft_model, make the optimizer over that, "
            f"and leave peft_config out; or leave optimizers out."
        )
    if others:
        warnings.warn(
            f"The optimizer in optimizers leaves out {len(others)} of {len(trained)} tensors that could be trained, "
            f"{others[0]!r} for one; they stay as they are.",
            stacklevel=4,
        )
