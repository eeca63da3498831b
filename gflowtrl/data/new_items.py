"""Items that nobody has seen yet: a share of the catalog is held out of all that is learned from."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

from gflowtrl.catalog import Item
from gflowtrl.checks import SHARE_BELOW_ONE, check_number

from .interactions import InteractionData, impressions_among


def hold_out_items(data: InteractionData, share: float, seed: int = 0) -> tuple[InteractionData, frozenset[Item]]:
    """Remove a random share of the items from all sequences, except as the last item of a user, the test target.

    The items stay in the catalog, with their features and semantic ids, so they can be recommended. The users whose
    last item is one of them are the test of new items.

    Args:
        data: the interactions.
        share: share of the items that become new ones.
        seed: seed of the choice.

    Returns:
        The data without the users who have fewer than three items left, whose number a warning says, and without
        impressions of the new items; and the new items.

    Raises:
        ValueError: the share is out of range or less than one item, the data have events, or no user is left.
    """
    check_number("share", share, SHARE_BELOW_ONE)
    if data.events is not None:
        raise ValueError(
            f"{data.name} has events, in which new items would be shown. Hold out items of data without events.jsonl."
        )
    new = frozenset(random.Random(seed).sample(data.items, round(share * len(data.items))))
    if share and not new:
        raise ValueError(f"The share of new items, {share}, is less than one of {len(data.items)} items. Raise it.")
    kept, times = {}, []
    for row, (user, sequence) in enumerate(zip(data.users, data.sequences, strict=True)):
        places = [place for place, item in enumerate(sequence[:-1]) if item not in new] + [len(sequence) - 1]
        if len(places) >= 3:
            kept[user] = [sequence[place] for place in places]
            if data.times is not None:
                moments = data.times[row]
                times.append([moments[place] for place in places])
    if not kept:
        raise ValueError(
            f"{data.name} has no user with three items left without {len(new)} new items; lower the share."
        )
    if len(kept) < len(data.users):
        warnings.warn(
            f"{data.name}: {len(data.users) - len(kept):,} of {len(data.users):,} users have fewer than three items "
            f"left without {len(new):,} new items. They are left out.",
            stacklevel=2,
        )
    shown = data.impressions and impressions_among(data.impressions, {*data.items} - new)
    users, sequences = list(kept), list(kept.values())
    return replace(
        data, users=users, sequences=sequences, times=None if data.times is None else times, impressions=shown
    ), new
