"""From interactions to training examples: readers, splits, tokenizers, prompts, and a synthetic shop."""

from .augmentation import Augmentation, augmented_rows, check_augmentable
from .exposed import ExposedCollator, ExposedRows, exposed_rows, has_exposed_rows, reordered
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
from .interactions import CLICKED, PURCHASED, SHOWN, Event, Exposed, InteractionData, k_core
from .new_items import hold_out_items
from .order import GroupedEpochSampler, LengthGroupedEpochSampler
from .prompts import BatchRows, GroupCollator, PromptEncoder, PromptFormat, TargetCollator, sft_dataset
from .readers import read_exposed, read_folder, read_interactions, read_letter
from .sequences import Sequences
from .splits import Splits, leave_one_out
from .step import Step, check_column_names
from .synthetic_shop import ShopTruth, SyntheticShop
from .temporal import has_clock, temporal_split
from .text_prompts import TextPromptEncoder, text_sft_dataset
from .tokenization import add_item_tokens, build_tokenizer, check_round_trip
from .windows import RowWindows, Window, Windows, count_repeats, history_lengths, user_windows, window_starts
from .writers import write_folder


__all__ = [
    "CLICKED",
    "PUBLIC_DATA",
    "PURCHASED",
    "RAW_FORMATS",
    "SHOWN",
    "Augmentation",
    "BatchRows",
    "Columns",
    "Event",
    "Exposed",
    "ExposedCollator",
    "ExposedRows",
    "GroupCollator",
    "GroupedEpochSampler",
    "InteractionData",
    "LengthGroupedEpochSampler",
    "Preparation",
    "PromptEncoder",
    "PromptFormat",
    "RawFiles",
    "RowWindows",
    "Sequences",
    "ShopTruth",
    "Splits",
    "Step",
    "SyntheticShop",
    "TargetCollator",
    "TextPromptEncoder",
    "Window",
    "Windows",
    "add_item_tokens",
    "augmented_rows",
    "build_tokenizer",
    "check_augmentable",
    "check_column_names",
    "check_round_trip",
    "count_repeats",
    "download",
    "download_file",
    "exposed_rows",
    "extract_zip",
    "has_clock",
    "has_exposed_rows",
    "history_lengths",
    "hold_out_items",
    "k_core",
    "leave_one_out",
    "prepare",
    "read_exposed",
    "read_folder",
    "read_interactions",
    "read_letter",
    "reordered",
    "sft_dataset",
    "temporal_split",
    "text_sft_dataset",
    "user_windows",
    "window_starts",
    "write_folder",
]
