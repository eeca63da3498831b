"""The temperature that a model is read at: `softmax(logits / temperature)` over the children of a node.

Dividing by it changes which items are best, not only how sure the policy is: it is renormalized at every step. So what
a model was trained at belongs to the model, as a field of its configuration, and every policy made of it obeys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from gflowtrl.checks import POSITIVE, check_number
from gflowtrl.files import read_json, write_text

from .modules import innermost


FIELD = "policy_temperature"
FILE = "policy_config.json"  # beside adapters, whose folder has no configuration of the model


def temperature_of(model: nn.Module) -> float:
    """What the logits of a model, bare or wrapped, are divided by; 1 where its configuration says nothing.

    Raises:
        ValueError: the configuration holds what is not a temperature.
    """
    temperature = getattr(getattr(innermost(model), "config", None), FIELD, 1.0)
    check_number(f"{FIELD} of the model's configuration", temperature, POSITIVE)
    return float(temperature)


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Make every policy of this model, and of what is saved of it, divide the logits by `temperature`."""
    check_number("temperature", temperature, POSITIVE)
    config: Any = innermost(model).config
    if temperature != 1.0:
        setattr(config, FIELD, float(temperature))
    elif hasattr(config, FIELD):
        delattr(config, FIELD)


def write_temperature(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the temperature of a model with adapters beside them, where it is not 1."""
    file, temperature = Path(directory, FILE), temperature_of(model)
    file.unlink(missing_ok=True)
    if temperature != 1.0:
        write_text(file, json.dumps({FIELD: temperature}) + "\n")


def read_temperature(model: PreTrainedModel, adapters: str | os.PathLike, **where: Any) -> None:
    """Set the temperature of a model to what `write_temperature` wrote beside the adapters that were merged into it.

    Args:
        model: the base model with the adapters; it is read at 1 where the folder says nothing.
        adapters: their folder, or their name on the Hub.
        **where: `revision`, `cache_dir`, ..., as for `from_pretrained`.
    """
    try:
        file = cached_file(os.fspath(adapters), FILE, **where)
    except OSError:  # there is none: the adapters themselves have just been read from the same place
        file = None
    known = {} if file is None else read_json(file)
    if not isinstance(known, dict):
        raise ValueError(f"{file} must hold a JSON object, but it holds {known!r}. Restore it or take it out.")
    temperature = known.get(FIELD, 1.0)
    check_number(f"{FIELD} of {file}", temperature, POSITIVE)
    set_temperature(model, temperature)
