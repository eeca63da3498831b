"""The rival losses as plain loops over the exact distributions of policy and reference, for one update per group."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev, stdev

from torch import Tensor


Path = Sequence[str]


def next_tokens(pi: Tensor, paths: list[Path], prefix: Path) -> dict[str, float]:
    """The probability of each token after a prefix."""
    mass: dict[str, float] = {}
    for leaf, path in enumerate(paths):
        if path[: len(prefix)] == prefix:
            mass[path[len(prefix)]] = mass.get(path[len(prefix)], 0.0) + float(pi[leaf])
    return {token: value / sum(mass.values()) for token, value in mass.items()}


def token_log_probs(pi: Tensor, paths: list[Path], leaf: int) -> list[float]:
    """log pi of each token on the path to `leaf`, over its alternatives."""
    path = paths[leaf]
    return [math.log(next_tokens(pi, paths, path[:depth])[path[depth]]) for depth in range(len(path))]


def ipa(pi, ref, rewards, group, paths, beta=0.1) -> list[float]:
    ranked = sorted(range(len(group)), key=lambda k: rewards[k])
    if rewards[ranked[0]] == rewards[ranked[-1]]:
        return [0.0]
    worst, best = (math.log(pi[group[k]] / ref[group[k]]) for k in (ranked[0], ranked[-1]))
    return [math.log1p(math.exp(beta * (worst - best)))]


def gbpo(pi, ref, rewards, group, paths, importance_sampling_level="token") -> list[float]:
    values = []
    for leaf, reward in zip(group, rewards, strict=True):
        probs = [math.exp(value) for value in token_log_probs(pi, paths, leaf)]
        if importance_sampling_level == "sequence":
            probs = [math.prod(probs)]
        bounds = probs if reward >= 0 else [max(p, 1 - p) for p in probs]
        values.append(fmean(-reward * p / bound for p, bound in zip(probs, bounds, strict=True)))
    return values


def grpo(pi, ref, rewards, group, paths, beta=1e-3) -> list[float]:
    """Advantages have mean 0, so only the divergence remains."""
    values = []
    for leaf in group:
        pairs = zip(token_log_probs(pi, paths, leaf), token_log_probs(ref, paths, leaf), strict=True)
        values.append(beta * fmean(math.exp(b - a) - (b - a) - 1 for a, b in pairs))
    return values


def sibling_grpo(pi, ref, rewards, group, paths, beta=0.0) -> list[float]:
    """One value per token that has an advantage."""
    values = []
    for leaf in group:
        path = paths[leaf]
        ours, theirs = token_log_probs(pi, paths, leaf), token_log_probs(ref, paths, leaf)
        for depth in range(len(path)):
            by_child: dict[str, list[float]] = {}
            for other, reward in zip(group, rewards, strict=True):
                if paths[other][:depth] == path[:depth]:
                    by_child.setdefault(paths[other][depth], []).append(reward)
            means = {token: fmean(each) for token, each in by_child.items()}
            deviation = pstdev(means.values())
            if deviation > 1e-6:
                d = theirs[depth] - ours[depth]
                advantage = (means[path[depth]] - fmean(means.values())) / (deviation + 1e-4)
                values.append(-advantage + beta * min(100.0, math.exp(d) - d - 1))
    return values


def flowrl(pi, ref, rewards, group, paths, log_z, beta=15.0) -> list[float]:
    values = []
    for leaf, reward in zip(group, rewards, strict=True):
        advantage = (reward - fmean(rewards)) / (stdev(rewards) + 1e-6)
        ours, theirs = token_log_probs(pi, paths, leaf), token_log_probs(ref, paths, leaf)
        values.append((log_z + fmean(ours) - beta * advantage - fmean(theirs)) ** 2)
    return values


def bear(pis, targets, paths, num_beams=10, xi=2.75, lam=0.25) -> float:
    """The loss of a whole batch."""
    total = weights = 0.0
    for pi, target in zip(pis, targets, strict=True):
        path = paths[target]
        for depth in range(len(path)):
            probs = next_tokens(pi, paths, path[:depth])
            if len(probs) > 1:
                last = sorted(probs.values(), reverse=True)[min(num_beams, len(probs)) - 1]
                own = probs[path[depth]]
                weight = 1 + lam / (1 + (last / own) ** (1 / xi))
                weights, total = weights + weight, total - weight * math.log(own)
    return total / weights
