"""Reward models of TRL: sequence classifiers that score the text of a prompt and its completion."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.checks import check_type
from gflowtrl.policy import innermost, whole_models
from gflowtrl.policy.loading import load_tokenizer, load_weights, tokenizer_kwargs


class RewardModel:
    """A sequence classifier with one label as a reward, as in TRL's GRPOTrainer.

    It reads the prompt, a space and the completion, and its score is the logit. It may be negative: use
    `reward_transform="exp"`.

    Args:
        model: the classifier, also with the adapters of PEFT or compiled by `torch.compile`. It is not trained.
        tokenizer: its tokenizer. A missing padding token becomes the end token.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        check_type("model", model, nn.Module, "a sequence classifier of transformers")
        check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
        if tokenizer.pad_token is None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.eos_token
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config: Any = innermost(model).config
        # The classifier reads the last token that is not padding.
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.__name__ = Path(config.name_or_path or "reward_model").name

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        """Return the score of each completion."""
        texts = [" ".join(filter(None, pair)) for pair in zip(prompts, completions, strict=True)]
        device = next(self.model.parameters()).device
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(device)
        return self.model(**batch).logits[:, 0].float().tolist()


def resolve_rewards(reward_funcs: Any, processing_classes: Any, model_kwargs: Mapping[str, Any]) -> list[Any]:
    """Return a trainer's rewards as a list, with a `RewardModel` for each classifier and each name or folder of one.

    Args:
        reward_funcs: one reward, several, or `None`.
        processing_classes: `None`, or the tokenizer of each reward: `None` for that of the classifier's folder and for
            other rewards.
        model_kwargs: keyword arguments of `from_pretrained` for classifiers given by name.

    Raises:
        ValueError: there are not as many tokenizers as rewards, one is missing or has no use, or a classifier has more
            than one label.
    """
    rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    rewards = [] if reward_funcs is None else rewards
    tokenizers = processing_classes if isinstance(processing_classes, list | tuple) else [processing_classes]
    tokenizers = [None] * len(rewards) if processing_classes is None else list(tokenizers)
    if len(tokenizers) != len(rewards):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries, but there are {len(rewards)} rewards. Give one "
            f"per reward, None for those that need none."
        )
    return [_resolved(*pair, model_kwargs) for pair in zip(rewards, tokenizers, strict=True)]


def _resolved(reward: Any, tokenizer: PreTrainedTokenizerBase | None, model_kwargs: Mapping[str, Any]) -> Any:
    name = reward if isinstance(reward, str) else None
    if name is not None:
        with whole_models():  # the classifier is not trained, so no engine gathers its shards
            reward = load_weights(AutoModelForSequenceClassification, name, **{**model_kwargs, "num_labels": 1})
    if not isinstance(reward, nn.Module) or not isinstance(model := innermost(reward), PreTrainedModel):
        if tokenizer is not None:
            raise ValueError(
                f"reward_processing_classes has a tokenizer for a {type(reward).__name__}, which is not a classifier, "
                f"so it would not be used. Give None for this reward."
            )
        return reward
    labels = model.config.num_labels
    if labels != 1:
        raise ValueError(
            f"The reward model {model.config.name_or_path!r} has {labels} labels, but a reward is one number. Load "
            f"it with num_labels=1."
        )
    if tokenizer is None:
        source = name or model.config.name_or_path
        if not source:
            raise ValueError("A reward model without a name needs its tokenizer; give reward_processing_classes.")
        tokenizer = load_tokenizer(source, **({} if name is None else tokenizer_kwargs(model_kwargs)))
    return RewardModel(reward, tokenizer)
