"""What is saved is what was trained: after a final save the folder is loaded and compared with the model in memory.

A folder can differ from its model without an error anywhere: a weight under two names, adapters on a base that was
changed after it was loaded, a layer that saving leaves out. It is seen by loading the folder the way a user does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import PromptEncoder
from gflowtrl.policy import make_policy, whole_models
from gflowtrl.policy.exactness import compute_dtype
from gflowtrl.policy.heads import is_head
from gflowtrl.policy.modules import evaluation_mode, innermost
from gflowtrl.recommender import Recommender


logger = logging.getLogger(__name__)
LARGEST = 2_000_000_000  # parameters of a model that is loaded a second time
LEAVES = 16  # that are scored: every state on their paths is compared
TENSORS = 16  # that are compared of a larger model
WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
#: Total variation that rounding explains, by the coarsest type that either model computes in.
ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.03, torch.float32: 2e-3, torch.float64: 2e-3}


def check_saved(
    trainer: Trainer, directory: str | os.PathLike, catalog: ItemCatalog, encoder: PromptEncoder, **model_kwargs: Any
) -> None:
    """Compare a saved recommender with the trained model; the main process loads the folder.

    Where DeepSpeed or FSDP shards the training, saving needs all processes, and so does this. Elsewhere it is the main
    process alone that compares and raises, since scripts may save in that one only.

    Both score a few leaves behind the longest prompts that the encoder makes. Above 2 billion parameters, and for
    adapters on a quantized base (which are merged into the whole one), a sample of tensors is compared with the files
    instead. Where nothing can be compared a warning says why.

    Args:
        trainer: of the model; any `transformers.Trainer`.
        directory: the folder.
        catalog, encoder: the items, and what makes prompts.
        **model_kwargs: of `from_pretrained`, where the model needs some (`trust_remote_code`, say).

    Raises:
        ValueError: the folder cannot be loaded, or is another model than the one that was trained. Its files stay.
    """
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    if type(innermost(unwrapped)).__module__.startswith("transformers_modules."):
        model_kwargs = {"trust_remote_code": True, **model_kwargs}  # its code has run here already
    together = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not together and not trainer.is_world_process_zero():
        return
    way = _same_everywhere(_way(trainer, directory), together)
    if way not in ("scores", "tensors"):
        if trainer.is_world_process_zero():
            logger.warning("%s was not compared with the trained model: %s", directory, way)
        return
    found = None
    if way == "scores":
        # The wrapper of DDP would wait for the other processes.
        expected = _scores(trainer, trainer.model_wrapped if together else unwrapped, catalog, encoder)
        if trainer.is_world_process_zero():
            found = _compare_scores(trainer, Path(directory), catalog, encoder, expected, model_kwargs)
    else:
        sample = _sample(unwrapped)
        if trainer.is_world_process_zero():
            found = _compare_tensors(Path(directory), sample)
    if (found := _same_everywhere(found, together)) is not None:
        raise ValueError(f"{found} The files stay as they are, and so do the checkpoints.")


def _same_everywhere(value: Any, together: bool) -> Any:
    """What the main process says, where others take part."""
    return broadcast_object_list([value])[0] if together else value


def _way(trainer: Trainer, directory: str | os.PathLike) -> str:
    """ "scores" or "tensors", or why there is none."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    base = innermost(model)
    if not any(next(Path(directory).glob(pattern), None) for pattern in WEIGHT_FILES):
        return (
            "it holds no whole weights, because the engine saves shards of them (FULL_STATE_DICT or "
            "stage3_gather_16bit_weights_on_model_save saves whole ones)."
        )
    adapters = isinstance(model, PeftModel)
    if getattr(base, "hf_quantizer", None) is not None:
        if adapters and next(Path(directory).glob("adapter_model*.safetensors"), None):
            return "tensors"
        return "the trained model is quantized, and the folder is not, so that they differ by more than rounding."
    if adapters and not model.peft_config[model.active_adapters[0]].base_model_name_or_path:
        return (
            "it holds adapters of a model that was made in memory and cannot be loaded. Save the base model, and give "
            "the trainer its folder."
        )
    numbers = (getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return "scores" if sum(numbers) <= LARGEST else "tensors"


# -------------------------------------------------------------------------------------------------------------- scores
@torch.no_grad()
def _scores(trainer: Trainer, model: Any, catalog: ItemCatalog, encoder: PromptEncoder) -> Tensor:
    """Probabilities of the children of every state on the paths of some leaves: `(B, K, L, C)`, on the CPU."""
    device = next(model.parameters()).device
    prompts = {name: value.to(device) for name, value in encoder(encoder.longest_histories()).items()}
    count = catalog.tree.num_leaves
    leaves = torch.arange(min(LEAVES, count), device=device) * count // min(LEAVES, count)
    with evaluation_mode(model), trainer.compute_loss_context_manager():
        scores = make_policy(model, catalog).score(prompts, leaves.expand(len(prompts["input_ids"]), -1))
    return scores.child_log_probs.float().exp().cpu()


def _compare_scores(
    trainer: Trainer,
    directory: Path,
    catalog: ItemCatalog,
    encoder: PromptEncoder,
    expected: Tensor,
    model_kwargs: Mapping[str, Any],
) -> str | None:
    """What is wrong with the folder, None for nothing."""
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    try:
        with whole_models():
            loaded = Recommender.from_pretrained(directory, **model_kwargs)
        if loaded.catalog.items != catalog.items:
            return f"The folder {directory} holds another catalog than the trainer's."
        model: Any = loaded.model
        model.to(_roomy(trainer.args.device, model))
        found = _scores(trainer, loaded.model, loaded.catalog, loaded.encoder)
    except Exception as error:  # whatever it is, the other processes wait to hear of it
        return f"The folder {directory} was saved, but it cannot be loaded: {error}"
    types = {*_types(trained), *_types(loaded.model), compute_dtype(trained)}
    types |= {torch.bfloat16} if trainer.args.bf16 else {torch.float16} if trainer.args.fp16 else set()
    rounding = max(ROUNDING.get(one, 0.1) for one in types)
    difference = float((expected - found).abs().sum(-1).max() / 2)
    if difference <= rounding:
        return None
    reason = (
        "a tensor is shared, tied or left out by save_pretrained, or a parameter was replaced after the model was made"
    )
    if isinstance(trained, PeftModel):
        base = trained.peft_config[trained.active_adapters[0]].base_model_name_or_path
        reason = (
            f"the base model was changed in memory after it was loaded from {base!r}, or that folder has changed since"
        )
    return (
        f"The folder {directory} is not the model that was trained: behind the longest prompts the probabilities of "
        f"the next token differ by a total variation of {difference:.3f}, and rounding explains {rounding}. The "
        f"likely reason: {reason}."
    )


def _types(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}


def _roomy(device: torch.device, model: nn.Module) -> torch.device:
    """The device where it has room for a second model, else the CPU."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.5 * size:
        return torch.device("cpu")
    return device


# ------------------------------------------------------------------------------------------------------------- tensors
def _sample(model: nn.Module) -> dict[str, Tensor]:
    """Some whole tensors under the names that they are saved with, on the CPU; all processes take part."""
    named = {name: parameter for name, parameter in model.named_parameters() if not is_head(name)}
    if isinstance(model, PeftModel):
        named = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    names = list(named)
    chosen = {names[place * len(names) // TENSORS]: None for place in range(TENSORS)}
    found = {}
    for name in chosen:
        with _whole(named[name]) as value:
            found[name] = value.detach().cpu().clone()
    return found


@contextmanager
def _whole(parameter: Any) -> Iterator[Tensor]:
    """A parameter that ZeRO-3 or FSDP2 may have split."""
    gathered: AbstractContextManager = nullcontext()
    if hasattr(parameter, "ds_id"):
        import deepspeed  # only where it is in use

        gathered = deepspeed.zero.GatheredParameters([parameter])
    with gathered:
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _compare_tensors(directory: Path, sample: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the files, None for nothing."""
    compared = 0
    for file in sorted(file for pattern in WEIGHT_FILES for file in directory.glob(pattern)):
        with safe_open(file, "pt") as saved:
            for name in sample.keys() & saved.keys():
                compared += 1
                value = saved.get_tensor(name)
                trained = sample[name].to(value.dtype)
                if value.shape != trained.shape or not torch.allclose(value, trained, rtol=1e-2, atol=1e-6):
                    return (
                        f"{file} is not what was trained: {name!r} differs from the model in memory. The likely "
                        f"reason: the files are of another save, or the engine gathered a part of the tensor only."
                    )
    if not compared:
        logger.warning("%s was not compared with the trained model: its tensors have other names.", directory)
    return None
