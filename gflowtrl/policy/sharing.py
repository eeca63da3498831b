"""Several rows whose prompts begin alike in one forward: one prompt, branches hanging off several of its positions.

A row of the forward is `[longest prompt, member 1, ..., member C]`, and a member is `[its prompt's last token once
more, its branches]`. Everything of a member sees the long prompt only as far as its own prompt goes, at the
positions that it would have there, so it is computed exactly as if the row stood alone. The last token is repeated so
that the logits behind every prompt stand in one block that `logits_to_keep` can ask for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .branches import Branches
from .packing import Layout, group_visibility, prompt_positions


def shared_layout(prompts: Mapping[str, Tensor], branches: Branches) -> Layout:
    """The layout of a batch whose rows share prompts.

    Args:
        prompts: a left-padded batch of B prompts with `members` `(U, C)`: rows that share a prompt, the longest first,
            padded with -1 (`gflowtrl.data.prompt_members`).
        branches: of each of the B rows.
    """
    mask, members = prompts["attention_mask"], prompts["members"]
    rows = members.clamp(min=0)
    prompt_mask = mask[rows[:, 0]]
    length = mask.sum(1)[rows]  # (U, C)
    tokens = torch.cat([prompts["input_ids"][:, -1:], branches.tokens], 1)[rows]  # (U, C, 1 + S)
    width = tokens.shape[-1]
    offsets = torch.nn.functional.pad(branches.steps, (1, 0), value=-1)
    # Padding members write behind the last row, where nobody looks.
    target = torch.where(members >= 0, members, len(mask)).flatten()
    place = torch.zeros(len(mask) + 1, dtype=torch.long, device=mask.device)
    return Layout(
        input_ids=torch.cat([prompts["input_ids"][rows[:, 0]], tokens.flatten(1)], 1),
        position_ids=torch.cat([prompt_positions(prompt_mask), (length[..., None] + offsets).flatten(1)], 1),
        visible=_visibility(prompt_mask, length, members >= 0, branches.visible[rows]),
        keep=torch.arange(mask.shape[1], mask.shape[1] + members.shape[1] * width, device=mask.device),
        place=place.scatter_(0, target, torch.arange(target.numel(), device=mask.device))[:-1],
    )


def _visibility(prompt_mask: Tensor, length: Tensor, present: Tensor, branches: Tensor) -> Tensor:
    """Who sees whom, with branches `(U, C, S, S)`."""
    (batch, count), width, device = length.shape, branches.shape[-1] + 1, prompt_mask.device
    # A member's branches see its whole prompt, its repeated last token all of it but the original.
    reach = length[..., None] - (torch.arange(width, device=device) == 0).long()
    reach = torch.where(present[..., None], reach, 0).flatten(1)
    rank = prompt_mask.cumsum(1) - 1
    # Behind the repeated token, each member sees its own branches.
    members = torch.zeros(batch, count, width, count, width, dtype=torch.bool, device=device)
    members[:, :, 1:, :, 1:].diagonal(dim1=1, dim2=3).copy_(branches.permute(0, 2, 3, 1))
    behind = members.reshape(batch, count * width, count * width)
    return group_visibility(prompt_mask, behind, of_prompt=rank[:, None] < reach[..., None])
