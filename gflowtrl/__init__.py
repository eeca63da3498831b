"""gflowtrl: fine-tune generative recommenders with Generative Flow Networks, beside Hugging Face TRL.

Public names are imported on first use, so that `import gflowtrl` costs nothing and loads neither torch nor trl.
"""

import logging
from importlib import import_module


# Where bitsandbytes is installed, importing PEFT makes it warn of a kernel that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0.dev0"

_HOMES = {
    "APAOConfig": "trainer",
    "APAOTrainer": "trainer",
    "CausalTreePolicy": "policy",
    "GFlowNetConfig": "trainer",
    "GFlowNetTrainer": "trainer",
    "ItemCatalog": "catalog",
    "PrefixTree": "catalog",
    "Recommender": "recommender",
    "Seq2SeqTreePolicy": "policy",
    "make_policy": "policy",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}.")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
