"""Flow heads: log F(state) predicted inside the model's forward, from the hidden state that gives the state's logits.

A parameter or a head used outside the forward fails under DDP, ZeRO-3 or FSDP2. Inside the forward, every wrapper
sees an ordinary module. The class of the model is replaced by a subclass of the same name, so `AutoModelForCausalLM`
or `AutoModelForSeq2SeqLM` can still load a checkpoint by its `architectures`. The trainer saves the head's weights in
a separate file.

One head predicts all states: log Z(x) is log F of the root, so learning one also teaches the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .modules import copy_whole, mix_in


HEADS_ATTRIBUTE = "flow_heads"


@dataclass
class FlowOutput(ModelOutput):
    """A model's logits, and `log_flows` `(B, n)` at the n (decoder) positions `flow_positions` of the forward."""

    logits: Tensor | None = None
    log_flows: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


class FlowHeads(nn.Module):
    """log F(s) = w . gelu(A h + b) + c on the hidden state h of the token that ends the prefix s.

    The last layer is initialized to zero, so log F starts at 0 in every state.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(hidden))).squeeze(-1).float()


class _FlowForward:
    """Mixed into a model's class by `attach_flow_heads`."""

    def forward(self, *args, flow_positions: Tensor | None = None, **kwargs):
        """Run the model's own forward. With `flow_positions` `(n,)` the output also has `log_flows` `(B, n)`."""
        if flow_positions is None:
            return super().forward(*args, **kwargs)
        kwargs["output_hidden_states"] = True
        output = super().forward(*args, **kwargs)
        states = output.decoder_hidden_states if self.config.is_encoder_decoder else output.hidden_states
        log_flows = getattr(self, HEADS_ATTRIBUTE)(states[-1].index_select(1, flow_positions))
        encoded = output.encoder_last_hidden_state if self.config.is_encoder_decoder else None
        return FlowOutput(logits=output.logits, log_flows=log_flows, encoder_last_hidden_state=encoded)


def has_flow_heads(model: nn.Module) -> bool:
    """Return whether the model has flow heads, also inside PEFT, DDP and DeepSpeed wrappers."""
    return any(isinstance(module, FlowHeads) for module in model.modules())


def attach_flow_heads(model: PreTrainedModel) -> PreTrainedModel:
    """Add a log F head to a causal or encoder-decoder model, in place. A second call changes nothing.

    With PEFT, call this on `get_base_model()` after the adapters were added. They would freeze or adapt an earlier
    head.
    """
    if has_flow_heads(model):
        return model
    hidden_size = model.config.get_text_config().hidden_size
    example = next(model.get_input_embeddings().parameters())  # `.weight` of wrapped embeddings is computed
    heads = FlowHeads(hidden_size).to(device=example.device, dtype=example.dtype)
    setattr(model, HEADS_ATTRIBUTE, heads)
    mix_in(_FlowForward, model)
    return model


def is_head(name: str) -> bool:
    """Return whether a parameter of this name belongs to the heads."""
    return f"{HEADS_ATTRIBUTE}." in name


def split_heads(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the language model's part and the heads' part."""
    heads = {name: value for name, value in state_dict.items() if is_head(name)}
    return {name: value for name, value in state_dict.items() if name not in heads}, heads


def load_heads(model: nn.Module, heads: dict[str, Tensor]) -> None:
    """Load the heads' part of a state dict (`split_heads`). If FSDP2 shards the model, every process must call this.

    Raises:
        ValueError: the names do not match the model's.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if is_head(name)}
    if parameters.keys() != heads.keys():
        raise ValueError(
            f"The flow heads in the checkpoint are {sorted(heads)}, but the model's are {sorted(parameters)}. Use a "
            f"checkpoint of this model."
        )
    for name, parameter in parameters.items():
        copy_whole(heads[name], parameter)
