"""Checks that a saved folder contains the trained model: after a final save it is loaded and compared.

A folder can silently differ from the model: a weight with two names, adapters on a base that was changed after it was
loaded, a layer that saving omits. Loading the folder as a user does detects this.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
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

from .adapters import gathered
from .resume import WEIGHTS


logger = logging.getLogger(__name__)
LARGEST = 2_000_000_000  # maximum number of parameters of a model that is loaded a second time
LEAVES = 16  # number of scored leaves; every state on their paths is compared
TENSORS = 16  # number of tensors that are compared for a larger model
#: Total variation that rounding explains, for the least precise type that either model computes in.
ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.03, torch.float32: 2e-3, torch.float64: 2e-3}


def check_saved(
    trainer: Trainer, directory: str | os.PathLike, catalog: ItemCatalog, encoder: PromptEncoder, **model_kwargs: Any
) -> None:
    """Compare a saved recommender with the trained model; the main process loads the folder.

    If DeepSpeed or FSDP shards the training, saving needs all processes, and so does this function. Otherwise only the
    main process compares and raises, because scripts may save only there.

    Both models score a few leaves after the longest prompts of the encoder. Above 2 billion parameters, and for
    adapters on a quantized base (which are merged into the full one), a sample of tensors is compared with the files
    instead. If nothing can be compared, a warning states the reason.

    Args:
        trainer: trainer of the model; any `transformers.Trainer`.
        directory: the folder.
        catalog, encoder: the items, and the encoder of prompts.
        **model_kwargs: keyword arguments of `from_pretrained` that the model needs (for example `trust_remote_code`).

    Raises:
        ValueError: the folder cannot be loaded, or does not contain the trained model. Its files are kept.
    """
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    if type(innermost(unwrapped)).__module__.startswith("transformers_modules."):
        model_kwargs = {"trust_remote_code": True, **model_kwargs}  # its code has already run here
    sharded, main = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled, trainer.is_world_process_zero()
    if not sharded and not main:
        return
    method = _from_main_process(_comparison_method(unwrapped, Path(directory)), sharded)
    if method not in ("scores", "tensors"):
        if main:
            logger.warning("%s was not compared with the trained model: %s", directory, method)
        return
    problem = None
    if method == "scores":
        # The wrapper of DDP would wait for the other processes.
        expected = _scores(trainer, trainer.model_wrapped if sharded else unwrapped, catalog, encoder)
        if main:
            problem = _compare_scores(trainer, Path(directory), catalog, encoder, expected, model_kwargs)
    else:
        sample = _sample(unwrapped)
        if main:
            problem = _compare_tensors(Path(directory), sample)
    if (problem := _from_main_process(problem, sharded)) is not None:
        raise ValueError(f"{problem} The files and the checkpoints are kept.")


def _from_main_process(value: Any, sharded: bool) -> Any:
    """Return the value of the main process if all processes take part, otherwise `value`."""
    return broadcast_object_list([value])[0] if sharded else value


def _comparison_method(model: Any, directory: Path) -> str:
    """Return "scores" or "tensors", or the reason why nothing can be compared."""
    if not any(next(directory.glob(pattern), None) for pattern in WEIGHTS):
        return (
            "it contains no full weights, because the engine saves shards (FULL_STATE_DICT or "
            "stage3_gather_16bit_weights_on_model_save saves full weights)."
        )
    adapters = isinstance(model, PeftModel)
    if getattr(innermost(model), "hf_quantizer", None) is not None:
        if adapters and next(directory.glob("adapter_model*.safetensors"), None):
            return "tensors"
        return "the trained model is quantized and the folder is not, so they differ by more than rounding."
    if adapters and not model.peft_config[model.active_adapters[0]].base_model_name_or_path:
        return (
            "it contains adapters of a model that was created in memory and cannot be loaded. Save the base model, "
            "and pass its folder to the trainer."
        )
    numbers = (getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return "scores" if sum(numbers) <= LARGEST else "tensors"


# -------------------------------------------------------------------------------------------------------------- scores
@torch.no_grad()
def _scores(trainer: Trainer, model: Any, catalog: ItemCatalog, encoder: PromptEncoder) -> Tensor:
    """Return the probabilities of the children of every state on the paths of some leaves: `(B, K, L, C)`, on CPU."""
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
    """Return what is wrong with the folder, or None."""
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    try:
        with whole_models():
            loaded = Recommender.from_pretrained(directory, **model_kwargs)
        if loaded.catalog.items != catalog.items:
            return f"The folder {directory} contains another catalog than the trainer's."
        model: Any = loaded.model
        model.to(_device_with_room(trainer.args.device, model))
        actual = _scores(trainer, loaded.model, loaded.catalog, loaded.encoder)
    except Exception as error:  # any error, because the other processes wait for the result
        return f"The folder {directory} was saved, but it cannot be loaded: {error}"
    types = {p.dtype for p in [*trained.parameters(), *model.parameters()] if p.dtype.is_floating_point}
    types.add(compute_dtype(trained))
    types |= {torch.bfloat16} if trainer.args.bf16 else {torch.float16} if trainer.args.fp16 else set()
    rounding = max(ROUNDING.get(dtype, 0.1) for dtype in types)
    difference = float((expected - actual).abs().sum(-1).max() / 2)
    if difference <= rounding:
        return None
    reason = "a tensor is shared, tied or omitted by save_pretrained, or a parameter was replaced in the model"
    if isinstance(trained, PeftModel):
        base = trained.peft_config[trained.active_adapters[0]].base_model_name_or_path
        reason = f"the base model was changed in memory after it was loaded from {base!r}, or that folder has changed"
    return (
        f"The folder {directory} does not contain the trained model: after the longest prompts, the probabilities of "
        f"the next token differ by a total variation of {difference:.3f}, and rounding explains {rounding}. The "
        f"likely reason: {reason}."
    )


def _device_with_room(device: torch.device, model: nn.Module) -> torch.device:
    """Return the device if it has enough memory for a second model, otherwise the CPU."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.5 * size:
        return torch.device("cpu")
    return device


# ------------------------------------------------------------------------------------------------------------- tensors
def _sample(model: nn.Module) -> dict[str, Tensor]:
    """Return some full tensors under the names in the saved files, on the CPU. All processes must call it."""
    named: dict[str, Any] = {name: parameter for name, parameter in model.named_parameters() if not is_head(name)}
    if isinstance(model, PeftModel):
        named = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    names, sample = list(named), {}
    for name in dict.fromkeys(names[i * len(names) // TENSORS] for i in range(TENSORS)):
        parameter = named[name]
        with gathered([parameter]):
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            sample[name] = tensor.detach().cpu().clone()
    return sample


def _compare_tensors(directory: Path, sample: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the files, or None."""
    compared = 0
    for file in sorted(file for pattern in WEIGHTS for file in directory.glob(pattern)):
        with safe_open(file, "pt") as saved:
            for name in sample.keys() & saved.keys():
                compared += 1
                value = saved.get_tensor(name)
                trained = sample[name].to(value.dtype)
                if value.shape != trained.shape or not torch.allclose(value, trained, rtol=1e-2, atol=1e-6):
                    return (
                        f"{file} does not contain the trained model: {name!r} differs from the model in memory. The "
                        f"likely reason: the files are from another save, or the engine gathered only a part of the "
                        f"tensor."
                    )
    if not compared:
        logger.warning("%s was not compared with the trained model: its tensors have other names.", directory)
    return None
