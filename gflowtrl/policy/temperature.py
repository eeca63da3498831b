"""The temperature of a policy: `softmax(logits / temperature)` over the children of a node.

The policy is renormalized at every step, so the temperature changes which items rank first, not only how peaked the
distribution is. The temperature of the training is therefore saved in the model's configuration, and every policy of
the model uses it.
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
FILE = "policy_config.json"  # next to adapters, whose folder has no model configuration


def temperature_of(model: nn.Module) -> float:
    """Return the temperature of a model, bare or wrapped; 1 if its configuration has none.

    Raises:
        ValueError: the value in the configuration is not a temperature.
    """
    temperature = getattr(getattr(innermost(model), "config", None), FIELD, 1.0)
    check_number(f"{FIELD} of the model's configuration", temperature, POSITIVE)
    return float(temperature)


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature that every policy of this model, and of its checkpoints, divides the logits by."""
    check_number("temperature", temperature, POSITIVE)
    config: Any = innermost(model).config
    if temperature != 1.0:
        setattr(config, FIELD, float(temperature))
    elif hasattr(config, FIELD):
        delattr(config, FIELD)


def write_temperature(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the temperature of a model with adapters into their folder, if it is not 1."""
    file, temperature = Path(directory, FILE), temperature_of(model)
    file.unlink(missing_ok=True)
    if temperature != 1.0:
        write_text(file, json.dumps({FIELD: temperature}) + "\n")


def read_temperature(model: PreTrainedModel, adapters: str | os.PathLike, **where: Any) -> None:
    """Set the temperature of a model from the file that `write_temperature` wrote next to its adapters.

    Args:
        model: the base model with the adapters. Its temperature becomes 1 if there is no file.
        adapters: the adapters' folder, or their name on the Hub.
        **where: `revision`, `cache_dir`, ..., as for `from_pretrained`.
    """
    try:
        file = cached_file(os.fspath(adapters), FILE, **where)
    except OSError:  # no such file: the adapters themselves have just been read from the same folder
        file = None
    content = {} if file is None else read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r}; it must hold a JSON object. Restore the file or delete it.")
    temperature = content.get(FIELD, 1.0)
    check_number(f"{FIELD} of {file}", temperature, POSITIVE)
    set_temperature(model, temperature)
