"""gflowtrl: fine-tune generative recommenders with Generative Flow Networks, as a companion of Hugging Face TRL.

Public names are imported on first use, so `import gflowtrl` is fast and imports neither torch nor trl.
"""

from typing import TYPE_CHECKING

from gflowtrl.lazy import import_name


if TYPE_CHECKING:  # type checkers and editors cannot follow __getattr__
    from .catalog import ItemCatalog, PrefixTree
    from .policy import CausalTreePolicy, Seq2SeqTreePolicy, make_policy
    from .recommender import Recommender
    from .trainer import APAOConfig, APAOTrainer, GFlowNetConfig, GFlowNetTrainer

__version__ = "0.2.0"

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

__all__ = [
    "APAOConfig",
    "APAOTrainer",
    "CausalTreePolicy",
    "GFlowNetConfig",
    "GFlowNetTrainer",
    "ItemCatalog",
    "PrefixTree",
    "Recommender",
    "Seq2SeqTreePolicy",
    "__version__",
    "make_policy",
]


def __getattr__(name: str) -> object:
    return import_name(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
