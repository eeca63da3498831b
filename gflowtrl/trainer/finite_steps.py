"""Stops training when a value is not finite, and names the step and the part where this happened first.

Every step records flags on its device without synchronizing. They are read before a log line, an evaluation or a
checkpoint, at the end, and every `CHECK_EVERY` steps. Before a checkpoint is written, the weights and the optimizer's
state are checked too, so that no checkpoint contains NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gflowtrl.finite import NonFiniteError, describe, find_nonfinite, find_nonfinite_weight, local_shard
from gflowtrl.policy.heads import is_head

from .checkpoints import TrainerBase
from .group import Group


HEADS_FILE = "flow_heads.safetensors"
CHECK_EVERY = 50  # steps without a log line
FP16_PATIENCE = 50  # consecutive steps; the loss scale of fp16 needs up to 32 to decrease from 2^16
LOSS, GRADIENT = "the loss", "the gradient"
REMEDIES = {
    "the reward": "Check the reward functions.",
    "the reference model": "Check ref_model: its weights, and whether its activations overflow in its dtype.",
    "the policy's score": "Lower learning_rate, lengthen the warm-up, or train in bf16 or float32.",
    "the flow head": "Lower log_z_learning_rate, or max_grad_norm.",
    GRADIENT: "Lower learning_rate or max_grad_norm, lengthen the warm-up, or train in bf16 or float32.",
}
REMEDY = "Lower learning_rate, lengthen the warm-up, or use an option that bounds the loss (for example huber_delta)."


class FirstSteps:
    """The first step at which each part was not finite, stored on the device.

    Args:
        device: the device of the training.
        start: number of steps done before.
        forgives: a finite step resets the earlier ones (fp16, whose loss scaler skips steps by design).
    """

    def __init__(self, device: torch.device, start: int, forgives: bool):
        self.device, self.start, self.forgives = device, start, forgives
        self.read_at = start
        self._first: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def note(self, step: int, parts: Mapping[str, Tensor]) -> None:
        """Record the parts of a step: tensors in the order in which they are computed from each other."""
        names = tuple(parts)
        sums = torch.stack([local_shard(value).detach().float().sum().to(self.device) for value in parts.values()])
        never = torch.full_like(sums, math.inf)
        first = self._first.get(names, never)
        self._first[names] = torch.where(
            torch.isfinite(sums), never if self.forgives else first, first.clamp(max=step)
        )

    def earliest(self, step: int) -> tuple[float, int, str] | None:
        """Return the step, the position in the order, and the name of the first part that was not finite.

        This waits for the device. Under fp16, a part counts if it was not finite for `FP16_PATIENCE` steps, or if it
        is a loss that never was finite.
        """
        self.read_at = step
        entries = [pair for names, first in self._first.items() for pair in zip(names, first.tolist(), strict=True)]
        nonfinite = [(first, index, name) for index, (name, first) in enumerate(entries) if first < math.inf]
        if self.forgives:
            never = [entry for entry in nonfinite if entry[0] == self.start + 1 and entry[2] != GRADIENT]
            nonfinite = [entry for entry in nonfinite if step - entry[0] + 1 >= FP16_PATIENCE] or never
        return min(nonfinite, default=None)


class FiniteMixin(TrainerBase):
    """Mixin for any `transformers.Trainer`: NaN or infinity stops the training on all processes (`NonFiniteError`)."""

    model: nn.Module
    _first_steps: FirstSteps | None = None
    _resumed_from: str | bool | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        self._first_steps, self._resumed_from = None, resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        step = self.state.global_step
        if self._first_steps is None:
            self.check_start()
            self._first_steps = FirstSteps(self.args.device, step, bool(self.args.fp16))
        elif step >= self._first_steps.read_at + CHECK_EVERY:
            self.check_steps()
        try:
            loss = super().training_step(*args, **kwargs)
        except Exception as error:  # computing with NaN can fail in any way
            if isinstance(error, NonFiniteError) or (weight := find_nonfinite_weight(self.model)) is None:
                raise
            raise NonFiniteError(_stopped(step + 1, f"the weight {weight!r}", REMEDY)) from error
        self.note({LOSS: loss})
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            self.note({GRADIENT: torch.as_tensor(norm)})
        return norm

    def note(self, parts: Mapping[str, Tensor]) -> None:
        """Record parts of the current step, in the order in which they are computed; does not wait for the device."""
        if self._first_steps is not None:
            self._first_steps.note(self.state.global_step + 1, parts)

    def check_steps(self) -> None:
        """Raise an error if a step was not finite. All processes must call this method.

        Raises:
            NonFiniteError: names the first such step, the part, and the remedy.
        """
        if self._first_steps is None:
            return
        earliest = self._first_steps.earliest(self.state.global_step)
        if self.args.world_size > 1:
            first = torch.tensor([math.inf if earliest is None else earliest[0]], device=self.args.device)
            steps: Any = self.accelerator.gather(first)
            if bool(torch.isinf(steps).all()):
                return
            earliest = min(entry for entry in gather_object([earliest]) if entry is not None)
        if earliest is not None:
            step, _, part = earliest
            weight = nonfinite_weight(self, self.model)
            by_now = f" By now the model's weight {weight!r} is not finite either." if weight else ""
            raise NonFiniteError(_stopped(int(step), part, REMEDIES.get(part, REMEDY)) + by_now)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # logged by all processes
            self.check_steps()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        if self.is_in_train:
            self.check_steps()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # all processes write a checkpoint; a user may call this on the main process only
            self.check_steps()
        if (weight := nonfinite_weight(self, self.model)) is not None:
            raise NonFiniteError(
                f"The model was not saved: its weight {weight!r} contains NaN or infinity. Resume from the last "
                f"checkpoint with a lower learning_rate."
            )
        if _internal_call and not self.args.save_only_model:
            self._check_optimizer("The checkpoint was not written")
        super().save_model(output_dir, _internal_call)

    # ------------------------------------------------------------------------------------------- weights and state
    def models_of_step(self) -> dict[str, nn.Module]:
        """Return all models that a step uses, under their names in error messages."""
        return {f"The checkpoint {self._resumed_from}" if self._resumed_from else describe(self.model): self.model}

    def check_start(self) -> None:
        """Raise an error if a weight, or the optimizer's state in a resumed training, is not finite.

        All processes must call this method.
        """
        for source, model in self.models_of_step().items():
            if (weight := nonfinite_weight(self, model)) is not None:
                file = f" ({HEADS_FILE})" if is_head(weight) and self._resumed_from else ""
                raise NonFiniteError(
                    f"{source}{file} has NaN or infinity in its weight {weight!r}: its training diverged, or its "
                    f"files are damaged. Start from an earlier checkpoint."
                )
        if self._resumed_from:
            self._check_optimizer(f"The checkpoint {self._resumed_from} cannot be resumed")

    def _check_optimizer(self, consequence: str) -> None:
        name = find_nonfinite(self._optimizer_state())
        if is_split(self.model):
            name = first_of(gather_object([name]))
        if name is not None:
            raise NonFiniteError(
                f"{consequence}: the optimizer's state contains NaN or infinity, {name}. Start from an earlier "
                f"checkpoint, with a lower learning_rate or max_grad_norm."
            )

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        optimizer: Any = self.optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for number, group in enumerate(getattr(optimizer, "param_groups", ())):
            if group.get("lr") is not None:  # Adafactor can choose its own rate
                yield f"the learning rate of group {number}", torch.as_tensor(group["lr"], dtype=torch.float64)
        for parameter, state in getattr(optimizer, "state", {}).items():
            for key, value in state.items() if isinstance(state, Mapping) else ():
                if isinstance(value, Tensor):
                    yield f"{key} of {names.get(id(parameter), 'a parameter')!r}", value


def _stopped(step: int, part: str, remedy: str) -> str:
    return (
        f"The training was stopped: at step {step} {part} was not finite (NaN or infinity). {remedy} No checkpoint "
        f"has been written since then."
    )


def is_split(model: nn.Module) -> bool:
    """Return whether each process holds a part of the model's weights (FSDP2, ZeRO-3)."""
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def first_of(names: list[str | None]) -> str | None:
    """Return the first name that is not None."""
    return next((name for name in names if name is not None), None)


def nonfinite_weight(trainer: Any, model: nn.Module) -> str | None:
    """Return the first weight that is not finite in a trainer's model, the same on all processes, or None."""
    split = is_split(model)
    if trainer.is_fsdp_enabled and not split:
        return None  # perhaps loaded on the main process only; checked again after sharding
    name = find_nonfinite_weight(model)
    return first_of(gather_object([name])) if split else name


def group_parts(group: Group) -> dict[str, Tensor]:
    """Return the tensors of a step to check, in the order in which they are computed."""
    scores, rewards = group.all_scores, group.rewards
    prior = None if rewards is None else rewards.log_prior
    parts = {
        "the reward": None if rewards is None else rewards.rewards,
        "the reference model": scores.ref_log_probs if prior is None else prior,
        "the policy's score": scores.log_probs,
        "the flow head": scores.log_z if scores.log_flows is None else scores.log_flows,
    }
    parts |= {f"the loss {name!r}": value for name, value in group.losses.items()}
    return {name: values for name, values in parts.items() if values is not None}
