"""Strict loading of configurations, tokenizers, weights and adapters.

If tensors are missing in a folder, transformers initializes them at random with a warning. A recommender would then
give wrong answers, so it is an error here. transformers also runs Python code from a folder if the user types `y` at
the terminal. Here such code runs only with `trust_remote_code=True` for that model.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gflowtrl.catalog.catalog import CATALOG_FILE
from gflowtrl.checks import one_line, short_repr
from gflowtrl.files import damage_of

from .modules import innermost


# Arguments of `from_pretrained` that locate the files. They apply to the configuration as well as to the model.
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def tokenizer_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `from_pretrained` arguments of a model that its tokenizer needs, which is not in a subfolder."""
    kept = {*WHERE, "trust_remote_code"} - {"subfolder"}
    return {name: value for name, value in model_kwargs.items() if name in kept}


def load_config(name: str | os.PathLike, trust_remote_code: bool = False, **where: Any) -> PreTrainedConfig:
    """Load a model's configuration. Python code in the folder runs only with `trust_remote_code`.

    Raises:
        OSError: the configuration does not exist.
        ValueError: it is damaged, of an unknown kind, or needs Python code from the folder.
    """
    with _loading(f"The configuration (config.json) of {name}", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)


def load_tokenizer(name: str | os.PathLike, trust_remote_code: bool = False, **where: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. Python code in the folder runs only with `trust_remote_code`.

    Raises:
        OSError: the tokenizer does not exist.
        ValueError: it is damaged, or needs Python code from the folder.
    """
    with _loading(f"The tokenizer (tokenizer.json, tokenizer_config.json) of {name}", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length is {short_repr(tokenizer.model_max_length)}; it must be a number")
        return tokenizer


def load_weights(loader: Any, name: str | os.PathLike, **model_kwargs: Any) -> PreTrainedModel:
    """Return `loader.from_pretrained(name)` and check that every tensor came from the files.

    Args:
        loader: a model class or an auto class.
        name: folder or name on the Hub.
        **model_kwargs: keyword arguments of `from_pretrained`.

    Raises:
        OSError: the model or one of its files does not exist.
        ValueError: a tensor is missing or has another shape. For the folder of a recommender also: the file has a
            tensor that the model does not have, or the model's class is not the class that was saved.
    """
    options = {"trust_remote_code": False, **model_kwargs, "ignore_mismatched_sizes": True}  # reported below
    with _loading(f"The model (config.json, model.safetensors) of {name}", name):
        model, info = loader.from_pretrained(name, output_loading_info=True, **options)
        architectures = [str(kind).removeprefix("FSDP") for kind in model.config.architectures or ()]
    kind, is_recommender = type(model).__name__, Path(name, CATALOG_FILE).is_file()
    wrong = {"lacks": info["missing_keys"], "holds in another shape": [key[0] for key in info["mismatched_keys"]]}
    if is_recommender:
        wrong["holds, but the model does not have,"] = info["unexpected_keys"]
    _check_keys(
        wrong, f"The weights of {name} are not those of {kind}, which its config.json describes", "config.json"
    )
    saved = architectures or [kind.removeprefix("FSDP")]
    known = hasattr(transformers, saved[0])  # a user's own subclass is compared by its scores instead
    if is_recommender and known and kind.removeprefix("FSDP") not in saved:
        raise ValueError(
            f"{name} was saved as {saved[0]}, but its config.json describes {kind} (model_type "
            f"{model.config.model_type!r}). Restore the config.json that was saved with the weights."
        )
    return model


def load_adapters(
    model: PreTrainedModel, name: str | os.PathLike, saved: Mapping[str, Any], **where: Any
) -> PeftModel:
    """Add saved adapters to their base model and check that every tensor came from the file.

    Args:
        model: the base model.
        name: folder or name of the adapters.
        saved: the content of their file (`load_peft_weights`).
        **where: `revision`, `cache_dir`, ..., as for `from_pretrained`.

    Raises:
        ValueError: the file lacks a tensor, or holds one that no adapter has or that has another shape.
    """
    with _loading(f"The adapters of {name}, on the base model {model.name_or_path!r},", name):
        adapted = PeftModel.from_pretrained(model, str(name), **where)
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # PEFT saves the embeddings and the head whole if they were resized.
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if module in tables]
    unexpected = {key for key in saved.keys() - expected if not any(f".{name}." in key for name in names)}
    wrong = {"lacks": expected - saved.keys(), "holds, but the model does not have,": unexpected}
    _check_keys(wrong, f"The adapters of {name} do not fit their adapter_config.json", "adapter_config.json")
    return adapted


def num_embeddings(model: nn.Module) -> int:
    """Return the number of tokens that a model embeds, bare or with adapters, sharded or not."""
    # Adapters may wrap the table, and an engine may shard its weight.
    table: Any = innermost(model).get_input_embeddings()
    return next(module.num_embeddings for module in table.modules() if hasattr(module, "num_embeddings"))


def check_embedded(model: nn.Module, token: int, what: str = "The catalog uses") -> None:
    """Check that the model has an embedding for a token.

    Args:
        model: bare or wrapped.
        token: the largest token id in use.
        what: what uses the token, as the beginning of a sentence.

    Raises:
        ValueError: the model has no embedding for the token.
    """
    if token >= (size := num_embeddings(model)):
        raise ValueError(
            f"{what} token {token}, but the model embeds only {size} tokens. Call "
            f"gflowtrl.data.add_item_tokens(tokenizer, semantic_ids, model), which resizes them. For a saved folder, "
            f"restore the files that were saved together."
        )


def _check_keys(wrong: Mapping[str, Collection[str]], about: str, config: str) -> None:
    """Raise an error if any tensor is listed in `wrong` (problem -> names of tensors)."""
    problems = []
    for what, keys in wrong.items():
        if keys:
            examples = ", ".join(map(repr, sorted(keys)[:2])) + (", ..." if len(keys) > 2 else "")
            problems.append(f"the file {what} {len(keys)} tensors ({examples})")
    if problems:
        raise ValueError(
            f"{about}: {' and '.join(problems)}. Missing tensors would be initialized at random. Restore {config} and "
            f"the weights that were saved together. To use a model that lacks layers on purpose, load it by its own "
            f"class and pass the object."
        )


@contextmanager
def _loading(what: str, name: str | os.PathLike) -> Iterator[None]:
    """Context manager: errors about damaged files become a ValueError that names what was being loaded."""
    # tokenizers and safetensors raise other errors, even `Exception`.
    clear = (OSError, ImportError, NotImplementedError, torch.OutOfMemoryError)
    try:
        yield
    except Exception as error:
        damaged = next(((file, damage) for file in _files_of(name) if (damage := damage_of(file))), None)
        named = isinstance(error, ValueError) and str(name) in str(error)
        if damaged is None and (named or isinstance(error, clear)):
            raise
        reason = " ".join(map(str, damaged)) if damaged else one_line(str(error)).rstrip(".") or type(error).__name__
        raise ValueError(f"{what} cannot be loaded: {reason}. Restore the files that were saved together.") from error


def _files_of(name: str | os.PathLike) -> list[Path]:
    """The files of a model's folder that `damage_of` can check."""
    return sorted(path for path in Path(name).glob("*") if path.suffix in (".json", ".safetensors"))
