"""Interactions in, training examples out: readers, splits, tokenizers, prompts, and a synthetic shop."""

from .formats import (
    PUBLIC_DATA,
    RAW_FORMATS,
    Columns,
    Preparation,
    RawFiles,
    download,
    download_file,
    extract_zip,
    prepare,
)
from .interactions import CLICKED, PURCHASED, SHOWN, Event, InteractionData, k_core
from .prompts import GroupCollator, PromptEncoder, PromptFormat, TargetCollator, sft_dataset
from .readers import read_folder, read_interactions, read_letter, write_folder
from .sharing import PrefixGroupedEpochSampler, prefix_groups, prompt_members
from .splits import Splits, Window, leave_one_out, user_windows
from .step import Step, check_column_names
from .synthetic_shop import ShopTruth, SyntheticShop
from .text_prompts import TextPromptEncoder, text_sft_dataset
from .tokenization import add_item_tokens, build_tokenizer, check_round_trip


__all__ = [
    "CLICKED",
    "PUBLIC_DATA",
    "PURCHASED",
    "RAW_FORMATS",
    "SHOWN",
    "Columns",
    "Event",
    "GroupCollator",
    "InteractionData",
    "PrefixGroupedEpochSampler",
    "Preparation",
    "PromptEncoder",
    "PromptFormat",
    "RawFiles",
    "ShopTruth",
    "Splits",
    "Step",
    "SyntheticShop",
    "TargetCollator",
    "TextPromptEncoder",
    "Window",
    "add_item_tokens",
    "build_tokenizer",
    "check_column_names",
    "check_round_trip",
    "download",
    "download_file",
    "extract_zip",
    "k_core",
    "leave_one_out",
    "prefix_groups",
    "prepare",
    "prompt_members",
    "read_folder",
    "read_interactions",
    "read_letter",
    "sft_dataset",
    "text_sft_dataset",
    "user_windows",
    "write_folder",
]
