"""Weights that fill their model, or an error.

transformers gives tensors that it misses in a folder random values and goes on with a warning; for a recommender that
is a wrong answer to every question. And it runs a folder's own Python code where a user says `y` at the terminal; here
code runs only where `trust_remote_code=True` was passed for that model.
"""

from __future__ import annotations

import json
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

from .modules import innermost


# Arguments of `from_pretrained` that say where the files lie, and so hold for the configuration as for the model.
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_config(name: str | os.PathLike, trust_remote_code: bool = False, **where: Any) -> PreTrainedConfig:
    """A model's configuration. Code that comes with it runs only with `trust_remote_code`.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, of an unknown kind, or needs code of its own.
    """
    with _named(f"The configuration (config.json) of {name}"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)


def load_tokenizer(name: str | os.PathLike, trust_remote_code: bool = False, **where: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Code that comes with it runs only with `trust_remote_code`.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or needs code of its own.
    """
    with _named(f"The tokenizer (tokenizer.json, tokenizer_config.json) of {name}"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **where)


def load_weights(loader: Any, name: str | os.PathLike, **model_kwargs: Any) -> PreTrainedModel:
    """`loader.from_pretrained(name)` whose every tensor came from the files.

    Args:
        loader: a class of models, or an auto class.
        name: folder or name.
        **model_kwargs: of `from_pretrained`.

    Raises:
        OSError: there is no such model, or one of its files is missing.
        ValueError: a tensor is missing or of another shape; or, in the folder of a recommender, there is one that the
            model has not, or the model is of another class than the one that was saved.
    """
    options = {"trust_remote_code": False, **model_kwargs, "ignore_mismatched_sizes": True}  # reported below
    with _named(f"The model (config.json, model.safetensors) of {name}"):
        model, found = loader.from_pretrained(name, output_loading_info=True, **options)
    kind, saved = type(model).__name__, Path(name, CATALOG_FILE).is_file()
    wrong = {"lacks": found["missing_keys"], "holds in another shape": [key[0] for key in found["mismatched_keys"]]}
    if saved:
        wrong["holds, but the model does not have,"] = found["unexpected_keys"]
    _refuse(wrong, f"The weights of {name} are not those of {kind}, which its config.json describes", "config.json")
    written = model.config.architectures or [kind]
    known = hasattr(transformers, written[0].removeprefix("FSDP"))  # a user's own subclass is compared by its scores
    if saved and known and kind.removeprefix("FSDP") not in [one.removeprefix("FSDP") for one in written]:
        raise ValueError(
            f"{name} was saved as {written[0]}, but its config.json describes {kind} (model_type "
            f"{model.config.model_type!r}). Restore the config.json that was saved with the weights."
        )
    return model


def load_adapters(
    model: PreTrainedModel, name: str | os.PathLike, saved: Mapping[str, Any], **where: Any
) -> PeftModel:
    """Put saved adapters on their base model, every one of them from the file.

    Args:
        model: the base.
        name: folder or name of the adapters.
        saved: what their file holds (`load_peft_weights`).
        **where: of `from_pretrained`.

    Raises:
        ValueError: the file lacks a tensor of an adapter, holds one that belongs nowhere, or one of another shape.
    """
    with _named(f"The adapters of {name}, on the base model {model.name_or_path!r},"):
        adapted = PeftModel.from_pretrained(model, str(name), **where)
    own = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]  # PEFT saves them whole where they grew
    names = [name for name, module in model.named_modules() if module in tables]
    strangers = {key for key in saved.keys() - own if not any(f".{name}." in key for name in names)}
    wrong = {"lacks": own - saved.keys(), "holds, but the model does not have,": strangers}
    _refuse(wrong, f"The adapters of {name} do not fit their adapter_config.json", "adapter_config.json")
    return adapted


def num_embeddings(model: nn.Module) -> int:
    """How many tokens a model embeds, bare or under adapters, sharded or not."""
    # Adapters may have wrapped the table, whose own weight an engine may have split.
    table: Any = innermost(model).get_input_embeddings()
    return next(module.num_embeddings for module in table.modules() if hasattr(module, "num_embeddings"))


def check_embedded(model: nn.Module, token: int, what: str = "The catalog uses") -> None:
    """A token must be one that the model embeds.

    Args:
        model: bare or wrapped.
        token: the largest that is used.
        what: by whom, as the beginning of a sentence.

    Raises:
        ValueError: the model has no row for it.
    """
    known = num_embeddings(model)
    if token >= known:
        raise ValueError(
            f"{what} token {token}, but the model embeds only {known} tokens. Call "
            f"gflowtrl.data.add_item_tokens(tokenizer, semantic_ids, model), which resizes them; in a saved folder, "
            f"restore the files that were saved together."
        )


def _refuse(wrong: Mapping[str, Collection[str]], about: str, config: str) -> None:
    """Raise where anything is listed."""
    told = []
    for what, keys in wrong.items():
        if keys:
            some = ", ".join(map(repr, sorted(keys)[:2])) + (", ..." if len(keys) > 2 else "")
            told.append(f"the file {what} {len(keys)} tensors ({some})")
    if told:
        raise ValueError(
            f"{about}: {' and '.join(told)}. What is missing would begin at random. Restore {config} and the weights "
            f"that were saved together; a model that lacks layers on purpose can be loaded by its own class and given "
            f"as an object."
        )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Within, what libraries raise of every kind becomes a ValueError that says what was being loaded."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
        if not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise  # sentences already, or mistakes in the arguments
        raise ValueError(f"{what} cannot be loaded: {error}. Restore the files that were saved together.") from error
    except Exception as error:  # tokenizers and safetensors have their own kinds, some of them bare `Exception`
        raise ValueError(f"{what} cannot be loaded: {error}. Restore the files that were saved together.") from error
