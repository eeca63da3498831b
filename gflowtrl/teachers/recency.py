"""Weights of the items of a history by their age."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gflowtrl.checks import Bound


#: Bound of `decay`: how much less an item counts than the one after it.
DECAY = Bound("a number in (0, 1]", lambda value: 0 < value <= 1)


def recent_items(rows: Sequence[Sequence[int]], decay: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the items of histories by age, and their weights: both `(B, T)`, with the last item in column 0.

    The weight of an item with age t is proportional to `decay ** t`. The weights of a history sum to 1, and those of
    an empty history are 0.

    Args:
        rows: item indices of each history, oldest first.
        decay: in (0, 1]; 1 weighs all items equally.
        device: where the tensors are.
    """
    reversed_rows = [torch.tensor(row[::-1], dtype=torch.long) for row in rows]
    indices = nn.utils.rnn.pad_sequence(reversed_rows, batch_first=True).to(device)
    ages = torch.arange(indices.shape[1], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    weights = (ages < lengths[:, None]) * decay ** ages.float()
    return indices, weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
