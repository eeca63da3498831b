"""Configuration of `GFlowNetTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, SHARE_BELOW_ONE, check_number, check_storable
from gflowtrl.rewards.composite import check_weights

from .tree_policy_config import TreePolicyConfig, listed, option


@dataclass
class GFlowNetConfig(TreePolicyConfig):
    r"""
    Configuration of [`GFlowNetTrainer`]: [`TreePolicyConfig`] with the following fields and another default loss.

    Parameters:
        > Parameters that control the loss

        loss_type (`str` or `list[str]`, *optional*, defaults to `["vargrad"]`):
            One or more of `vargrad`, `contrastive_balance`, `trajectory_balance`, `detailed_balance`,
            `subtrajectory_balance`, `exact_flow`, `sft`, `prefix_pointwise`, `prefix_pairwise` (APAO's, arXiv
            2603.02730), the rivals `msl`, `bear`, `sdpo`, `ipa`, `grpo`, `sibling_grpo`, `gbpo`, `flowrl`
            (docs/rivals.md), and losses added by `gflowtrl.losses.register_loss`.
            GFlowGR's full loss is `["sft", "trajectory_balance"]` (or `"detailed_balance"`) with
            `loss_weights=[1.0, lambda]`.
        flows (`str`, *optional*, defaults to `"learned"`):
            Where log Z and log F of `trajectory_balance`, `detailed_balance` and `subtrajectory_balance` come from.
            `"learned"`: a head of the model, as in GFlowGR. `"known"`: the exact flows of the rewards, which must
            score all items; the model then has no head.
        trajectory_weighting (`str`, *optional*):
            Weights of a prompt's trajectories in the balance losses (the "heuristic weighting" of GFlowGR's abstract)
            and in rivals with one value per trajectory, with mean 1 within the prompt: `"source"` uses
            `source_weights`; `"reward"` is proportional to R. All weights are positive, so a policy that can represent
            R / Z still converges to it under a balance loss; the weights change the speed, and the compromise of a
            policy that cannot represent it (docs/objectives.md).
        source_weights (`dict[str, float]`, *optional*):
            Weight of each of the sampler's sources for `trajectory_weighting="source"`, > 0. Sources that are not
            named have weight 1.

        > Parameters that control the reward

        reward_weights (`list[float]`, *optional*):
            A weight for each reward function. By default all weights are 1.
        reward_transform (`str`, *optional*, defaults to `"power"`):
            `"power"`: log R = beta * log max(r, floor), r >= 0. `"exp"`: log R = beta * r, any sign.
        reward_beta (`float`, *optional*, defaults to `1.0`):
            The exponent or inverse temperature beta. Larger values make the policy greedier.
        reward_floor (`float`, *optional*, defaults to `1e-3`):
            Minimum reward under `"power"`, as a fraction of the prompt's mean reward.
        exclude_history (`str`, *optional*, defaults to `"no"`):
            Whether items that the user has had before (all of the column `history`, except the row's own target) get
            no reward: R is 0, or the floor. `"yes"` suits data without repeats, where such an item is never the next
            one: the policy learns to leave it out, without a filter. `"auto"`: yes if fewer than 0.1 % of the training
            targets are repeats; the log says how many are. Samplers do not draw these items, except on policy.
        leaf_reduction (`str`, *optional*, defaults to `"sum"`):
            How a leaf's reward is computed from the rewards of its items: `"sum"` or `"max"`.
        max_exact_elements (`int`, *optional*, defaults to `50_000_000`):
            Maximum size (prompts x leaves) of the reward table of a micro-batch. If a micro-batch needs a larger one,
            `exact_flow` falls back to the `exact_top_items` best leaves of each prompt; other losses then score only
            the drawn trajectories, and `reward_floor` refers to the group's mean.
        exact_top_items (`int`, *optional*, defaults to `1000`):
            Number of leaves per prompt that keep their own reward in this fallback. The others share the rest of the
            mass evenly, so that Z does not change.

        > Parameters that control the reference model

        ref_weight (`float`, *optional*, defaults to `0.0`):
            Exponent a of the reference model in the target pi_ref^a * R: every balance loss uses
            log R + a log pi_ref(leaf) instead of log R. 0: no reference model.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Move the reference toward the policy every `ref_model_sync_steps` steps, as in TRL's GRPOTrainer. The
            target then moves too. Not for adapters, flow heads, and sharded models.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the new reference, 0 to 1 (TR-DPO, arXiv 2404.09656).
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between two updates of the reference.
    """

    # Parameters that control the loss
    loss_type: list[str] = option(
        ["vargrad"],
        "One or more of vargrad, contrastive_balance, trajectory_balance, detailed_balance, "
        "subtrajectory_balance, exact_flow, sft, prefix_pointwise, prefix_pairwise, msl, bear, sdpo, ipa, grpo, "
        "sibling_grpo, gbpo, flowrl.",
    )
    flows: str = option("learned", "Where log Z and log F come from.", ["learned", "known"])
    trajectory_weighting: str | None = option(
        None, "Weights of a prompt's trajectories in balance losses.", ["source", "reward"]
    )
    source_weights: dict[str, Any] | str | None = option(
        None, "Weight of each of the sampler's sources; 1 for sources that are not named."
    )

    # Parameters that control the reward
    reward_weights: list[float] | None = option(None, "A weight for each reward function.")
    reward_transform: str = option("power", "Transform from the combined reward to log R.", ["power", "exp"])
    reward_beta: float = option(1.0, "Exponent (power) or inverse temperature (exp) of R.")
    reward_floor: float = option(1e-3, "Minimum reward under `power`, as a fraction of the prompt's mean reward.")
    exclude_history: str = option(
        "no", "Give no reward to items of the user's history; auto: if repeats are rare.", ["no", "yes", "auto"]
    )
    leaf_reduction: str = option("sum", "How the rewards of a leaf's items are combined.", ["sum", "max"])
    max_exact_elements: int = option(50_000_000, "Maximum size (prompts x leaves) of a micro-batch's reward table.")
    exact_top_items: int = option(1000, "Leaves per prompt that keep their own reward if that table is too large.")

    # Parameters that control the reference model
    ref_weight: float = option(0.0, "Exponent of the reference model in the target.")
    sync_ref_model: bool = option(False, "Move the reference toward the policy during training.")
    ref_model_mixup_alpha: float = option(0.6, "Share of the policy in the new reference.")
    ref_model_sync_steps: int = option(512, "Steps between two updates of the reference.")

    _VALID_DICT_FIELDS = TreePolicyConfig._VALID_DICT_FIELDS + ["source_weights"]
    _bounds = TreePolicyConfig._bounds | {
        "max_exact_elements": COUNT,
        "reward_beta": POSITIVE,
        "reward_floor": SHARE_BELOW_ONE,
        "exact_top_items": COUNT,
        "ref_weight": NOT_NEGATIVE,
        "ref_model_mixup_alpha": SHARE,
        "ref_model_sync_steps": COUNT,
    }

    def __post_init__(self):
        if isinstance(self.exclude_history, bool):  # YAML reads yes and no as such
            self.exclude_history = "yes" if self.exclude_history else "no"
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.reward_weights is not None:
            self.reward_weights = [float(weight) for weight in listed(self.reward_weights)]
            check_storable({"reward_weights": self.reward_weights})
            check_weights(self.reward_weights, self.reward_transform)
        self._check_weighting()
        self._check_flows()

    @property
    def weight_per_source(self) -> dict[str, float]:
        """Return `source_weights`, or an empty dictionary."""
        return self.source_weights if isinstance(self.source_weights, dict) else {}

    @property
    def needs_all_rewards(self) -> bool:
        """Whether a loss needs the reward of every leaf, for its target or for known flows."""
        known = self.flows == "known"
        return any(loss.needs_all_rewards or known and loss.needs_flow_heads for loss in self.losses.values())

    def _check_weighting(self) -> None:
        """Check that the weighting and the reference model have an effect on the losses."""
        rewarded = any(loss.needs_rewards for loss in self.losses.values())
        balanced = any(loss.needs_log_rewards for loss in self.losses.values())
        weighted = any(loss.needs_rewards and not loss.per_prompt for loss in self.losses.values())
        uses = (("trajectory_weighting", weighted), ("ref_weight", balanced), ("exclude_history", rewarded))
        for name, used in uses:
            if getattr(self, name) not in (None, 0, "no") and not used:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but no loss of {self.loss_type} balances rewards, so it has "
                    f"no effect. Leave it out or add a balance loss to loss_type."
                )
        drawn = [name for name, loss in self.losses.items() if loss.needs_log_rewards and not loss.needs_all_rewards]
        if self.exclude_history != "no" and self.reward_floor == 0 and drawn:
            raise ValueError(
                f"exclude_history is {self.exclude_history!r} and reward_floor is 0, so log R of a history item would "
                f"be minus infinity, and the loss of {drawn[0]!r} infinite if the policy draws one. Set reward_floor "
                f"to 1e-3, for example, or use exact_flow."
            )
        if (self.trajectory_weighting == "source") != bool(self.source_weights):
            raise ValueError(
                f"trajectory_weighting is {self.trajectory_weighting!r} and source_weights is {self.source_weights}; "
                f"use trajectory_weighting='source' and source_weights together or not at all."
            )
        for name, weight in self.weight_per_source.items():
            check_number(f"The weight of source {name!r}", weight, POSITIVE)

    def _check_flows(self) -> None:
        """Check that flows can be known, and that losses which share the flow head learn the same log Z."""
        learned = {name: loss for name, loss in self.losses.items() if loss.needs_flow_heads}
        other = [name for name, loss in learned.items() if not loss.needs_log_rewards]
        if self.flows == "known" and not learned:
            raise ValueError(
                f"flows is 'known', but no loss of {self.loss_type} has a learned flow. Leave it out, or use "
                f"trajectory_balance, detailed_balance or subtrajectory_balance."
            )
        if self.flows == "known" and other:
            raise ValueError(
                f"flows is 'known', but log Z of the loss {other[0]!r} is not the sum of the rewards. Leave flows out."
            )
        balanced = [name for name, loss in learned.items() if loss.needs_log_rewards]
        if "flowrl" in learned and balanced:
            raise ValueError(
                f"loss_type has 'flowrl' and {balanced[0]!r}, which learn different values of log Z with one head. "
                f"Leave one of them out, or use 'vargrad', which has no head, instead of {balanced[0]!r}."
            )
