"""Training stops where something is no longer finite, and says at which step and what it was first.

Every step leaves marks on its device, for which nothing waits. They are read when a log line is due, before an
evaluation or a checkpoint, at the end, and every `CHECK_EVERY` steps. Before a checkpoint is written, weights and the
optimizer's state are looked at themselves, so that no checkpoint holds NaN.
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
FP16_PATIENCE = 50  # steps one after the other; the loss scale of fp16 needs up to 32 to come down from 2^16
LOSS, GRADIENT = "the loss", "the gradient"
REMEDIES = {
    "the reward": "Look at the reward functions.",
    "the reference model": "Look at ref_model: its weights, and whether its numbers overflow in its dtype.",
    "the policy's score": "Lower learning_rate, lengthen the warm-up, or train in bf16 or float32.",
    "the flow head": "Lower log_z_learning_rate, or max_grad_norm.",
    GRADIENT: "Lower learning_rate or max_grad_norm, lengthen the warm-up, or train in bf16 or float32.",
}
REMEDY = (
    "Lower learning_rate, lengthen the warm-up, or choose an option of the loss that bounds it (huber_delta, say)."
)


class FirstSteps:
    """The first step at which each part was not finite, kept on the device.

    Args:
        device: of the training.
        start: steps that were done before.
        forgives: a step that is finite makes up for those before it (fp16, whose loss scaler skips steps by design).
    """

    def __init__(self, device: torch.device, start: int, forgives: bool):
        self.device, self.start, self.forgives = device, start, forgives
        self.read_at = start
        self._first: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def note(self, step: int, parts: Mapping[str, Tensor]) -> None:
        """Look at the parts of step number `step`: tensors, in the order in which one follows from the other."""
        names = tuple(parts)
        sums = torch.stack([local_shard(value).detach().float().sum().to(self.device) for value in parts.values()])
        never = torch.full_like(sums, math.inf)
        first = self._first.get(names, never)
        self._first[names] = torch.where(
            torch.isfinite(sums), never if self.forgives else first, first.clamp(max=step)
        )

    def earliest(self, step: int) -> tuple[float, int, str] | None:
        """The step, the place in the order, and the name of what was not finite first; waits for the device.

        Under fp16 only what was not finite for `FP16_PATIENCE` steps, or a loss that never was.
        """
        self.read_at = step
        entries = [pair for names, first in self._first.items() for pair in zip(names, first.tolist(), strict=True)]
        found = [(first, place, name) for place, (name, first) in enumerate(entries) if first < math.inf]
        if self.forgives:
            never = [entry for entry in found if entry[0] == self.start + 1 and entry[2] != GRADIENT]
            found = [entry for entry in found if step - entry[0] + 1 >= FP16_PATIENCE] or never
        return min(found, default=None)


class FiniteMixin(TrainerBase):
    """For any `transformers.Trainer`: NaN and infinity end the training with `NonFiniteError`, on all processes."""

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
        except NonFiniteError:
            raise
        except Exception as error:  # what computes with NaN can fail in any way
            if (weight := find_nonfinite_weight(self.model)) is not None:
                raise NonFiniteError(_stopped(step + 1, f"the weight {weight!r}", REMEDY)) from error
            raise
        self.note({LOSS: loss})
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            self.note({GRADIENT: torch.as_tensor(norm)})
        return norm

    def note(self, parts: Mapping[str, Tensor]) -> None:
        """Look at parts of the present step, in the order in which one follows from the other; never waits."""
        if self._first_steps is not None:
            self._first_steps.note(self.state.global_step + 1, parts)

    def check_steps(self) -> None:
        """Stop where a step was not finite; all processes must call it.

        Raises:
            NonFiniteError: names the first such step, the part, and the remedy.
        """
        if self._first_steps is None:
            return
        found = self._first_steps.earliest(self.state.global_step)
        if self.args.world_size > 1:
            mine = torch.tensor([math.inf if found is None else found[0]], device=self.args.device)
            steps: Any = self.accelerator.gather(mine)
            if bool(torch.isinf(steps).all()):
                return
            found = min(entry for entry in gather_object([found]) if entry is not None)
        if found is not None:
            step, _, part = found
            weight = nonfinite_weight(self, self.model)
            by_now = f" By now its weight {weight!r} is not finite either." if weight else ""
            raise NonFiniteError(_stopped(int(step), part, REMEDIES.get(part, REMEDY)) + by_now)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # what all processes log
            self.check_steps()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        if self.is_in_train:
            self.check_steps()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # a checkpoint, of all processes; a user may call from the first one only
            self.check_steps()
        self.check_weights("The model was not saved")
        if _internal_call and not self.args.save_only_model:
            self._check_optimizer("The checkpoint was not written")
        super().save_model(output_dir, _internal_call)

    # ------------------------------------------------------------------------------------------- weights and state
    def check_weights(self, consequence: str) -> None:
        """Refuse to go on with weights that are not finite; all processes of a sharded model must call it."""
        if (weight := nonfinite_weight(self, self.model)) is not None:
            remedy = "Go on from the last checkpoint with a lower learning_rate."
            raise NonFiniteError(f"{consequence}: its weight {weight!r} holds NaN or infinity. {remedy}")

    def models_of_step(self) -> dict[str, nn.Module]:
        """All models that a step computes with, by what errors call them."""
        return {f"The checkpoint {self._resumed_from}" if self._resumed_from else describe(self.model): self.model}

    def check_start(self) -> None:
        """Refuse weights that are not finite, and such a state of an optimizer that a checkpoint has brought; all
        processes must call it."""
        for source, model in self.models_of_step().items():
            if (weight := nonfinite_weight(self, model)) is not None:
                file = f" ({HEADS_FILE})" if is_head(weight) and self._resumed_from else ""
                raise NonFiniteError(
                    f"{source}{file} has NaN or infinity in its weight {weight!r}: its training diverged, or its "
                    f"files are damaged. Begin with an earlier checkpoint."
                )
        if self._resumed_from:
            self._check_optimizer(f"The checkpoint {self._resumed_from} cannot be resumed from")

    def _check_optimizer(self, consequence: str) -> None:
        name = find_nonfinite(self._optimizer_state())
        if is_split(self.model):
            name = first_of(gather_object([name]))
        if name is not None:
            raise NonFiniteError(
                f"{consequence}: the optimizer's state holds NaN or infinity, {name}. Begin with an earlier "
                f"checkpoint, with a lower learning_rate or max_grad_norm."
            )

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        optimizer: Any = self.optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for number, group in enumerate(getattr(optimizer, "param_groups", ())):
            if group.get("lr") is not None:  # Adafactor can find its own
                yield f"the learning rate of group {number}", torch.as_tensor(group["lr"], dtype=torch.float64)
        for parameter, state in getattr(optimizer, "state", {}).items():
            for key, value in state.items() if isinstance(state, Mapping) else ():
                if isinstance(value, Tensor):
                    yield f"{key} of {names.get(id(parameter), 'a parameter')!r}", value


def _stopped(step: int, part: str, remedy: str) -> str:
    return (
        f"The training was stopped: at step {step} {part} was not finite (NaN or infinity). {remedy} No checkpoint "
        f"was written since."
    )


def is_split(model: nn.Module) -> bool:
    """Whether each process holds a part of the model's weights (FSDP2, ZeRO-3)."""
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def first_of(names: list[str | None]) -> str | None:
    """The first that is not None."""
    return next((name for name in names if name is not None), None)


def nonfinite_weight(trainer: Any, model: nn.Module) -> str | None:
    """The first weight of a trainer's model that is not finite, the same on all processes, or None."""
    split = is_split(model)
    if trainer.is_fsdp_enabled and not split:
        return None  # the first process alone may have loaded it; looked at when it is in parts
    name = find_nonfinite_weight(model)
    return first_of(gather_object([name])) if split else name


def group_parts(group: Group) -> dict[str, Tensor]:
    """What a step of tree policies consists of, in the order in which one follows from the other."""
    scores, rewards = group.all_scores, group.rewards
    found = {
        "the reward": None if rewards is None else rewards.rewards,
        "the reference model": scores.ref_log_probs
        if rewards is None or rewards.log_prior is None
        else rewards.log_prior,
        "the policy's score": scores.log_probs,
        "the flow head": scores.log_z if scores.log_flows is None else scores.log_flows,
    }
    parts = {name: values for name, values in found.items() if values is not None}
    return parts | {f"the loss {name!r}": value for name, value in group.losses.items()}
