"""Interactions in, training examples out: readers, splits, tokenizers, prompts, and a synthetic shop."""

from .interactions import CLICKED, PURCHASED, SHOWN, Event, InteractionData, k_core
from .prompts import GroupCollator, PromptEncoder, TargetCollator, sft_dataset
from .readers import read_folder, read_interactions, read_letter, write_folder
from .sharing import PrefixGroupedEpochSampler, prefix_groups, prompt_members
from .splits import Splits, Window, leave_one_out, user_windows
from .synthetic_shop import ShopTruth, SyntheticShop
from .tokenization import add_item_tokens, build_tokenizer, check_round_trip


__all__ = [
    "CLICKED",
    "PURCHASED",
    "SHOWN",
    "Event",
    "GroupCollator",
    "InteractionData",
    "PrefixGroupedEpochSampler",
    "PromptEncoder",
    "ShopTruth",
    "Splits",
    "SyntheticShop",
    "TargetCollator",
    "Window",
    "add_item_tokens",
    "build_tokenizer",
    "check_round_trip",
    "k_core",
    "leave_one_out",
    "prefix_groups",
    "prompt_members",
    "read_folder",
    "read_interactions",
    "read_letter",
    "sft_dataset",
    "user_windows",
    "write_folder",
]
