"""Tiny catalogs and models for tests."""

from collections.abc import Mapping

import pytest
import scipy
import torch
from accelerate.utils import compare_versions
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedModel,
    T5Config,
    UMT5Config,
)

from gflowtrl.catalog import ItemCatalog
from gflowtrl.policy import CausalTreePolicy


FIRST_TOKEN = 3  # 0 padding, 1 beginning, 2 end


def random_paths(num_leaves: int, depth: int = 3, codes: int = 6, seed: int = 0, ragged: bool = False) -> torch.Tensor:
    """Return distinct random paths, each level with its own codes. With `ragged`, some ids are one token shorter."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*[torch.arange(codes)] * depth).view(-1, depth)
    paths = every[torch.randperm(len(every), generator=generator)[:num_leaves]].clone()
    if ragged:  # shorten one id and drop the ids that it is a prefix of
        for row in paths[:: max(num_leaves // 4, 1)].clone():
            paths = paths[~(paths[:, :-1] == row[:-1]).all(1)]
            row[-1] = -1 - FIRST_TOKEN - (depth - 1) * codes
            paths = torch.cat([paths, row[None]])
    return paths + FIRST_TOKEN + torch.arange(depth) * codes


def catalog_of(paths: torch.Tensor) -> ItemCatalog:
    texts = [tuple(f"<t{t}>" for t in row if t >= 0) for row in paths.tolist()]
    return ItemCatalog(list(range(len(paths))), texts, paths)


def tiny_model(
    vocab_size: int, kind: str = "llama", attention: str = "sdpa", seed: int = 0, hidden_size: int = 32, **options
) -> PreTrainedModel:
    """Build a causal model; `options` are further fields of its configuration."""
    torch.manual_seed(seed)
    if kind != "gpt_neox":  # it has no grouped heads
        options |= {"num_key_value_heads": 2, "head_dim": hidden_size // 4}
    config = AutoConfig.for_model(
        kind, vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def needs_transformers(version: str, feature: str) -> None:
    """Skip a test of a feature that gflowtrl does not support with the installed version of transformers."""
    if compare_versions("transformers", "<", version):
        pytest.skip(f"{feature} need transformers {version}")


SEQ2SEQ = {
    "t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config,
    "bart": BartConfig, "mbart": MBartConfig, "pegasus": PegasusConfig, "marian": MarianConfig,
}  # fmt: skip


def tiny_seq2seq(vocab_size: int, kind: str = "t5", attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Build an encoder-decoder with two layers on each side, in which positions matter."""
    if kind.endswith("t5"):
        needs_transformers("5.18", f"tree policies on {kind}")
    torch.manual_seed(seed)
    shared = {
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
        "vocab_size": vocab_size,
        "d_model": 32,
    }
    if kind.endswith("t5"):
        options = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    else:
        options = {
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.3,
            "bos_token_id": 1, "forced_eos_token_id": None,
        }  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[kind](**shared, **options), attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or "embed_positions" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval()


def ragged_prompts(batch: int, vocab_size: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) >= (length - lengths)[:, None]).long()
    tokens = torch.randint(FIRST_TOKEN, vocab_size, (batch, length), generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask}


def naive_log_probs(tree, prompts, leaves, vocab_size, logits_of) -> torch.Tensor:
    """Compute tree-normalized log-probabilities `(B, K, L)`, one sequence at a time, without padding, mask or cache.

    `logits_of(prompt, path)` returns the logits that predict each token of the path, `(len(path), V)`.
    """
    rows = []
    for b in range(len(leaves)):
        prompt = prompts["input_ids"][b][prompts["attention_mask"][b].bool()]
        for leaf in leaves[b].tolist():
            path = tree.paths[leaf].long()
            path = path[path >= 0]
            nodes = tree.walk(torch.tensor(leaf))[: len(path)]
            masked = logits_of(prompt, path).masked_fill(~tree.allowed_tokens(nodes, vocab_size), -torch.inf)
            taken = masked.log_softmax(-1).gather(1, path[:, None]).squeeze(1)
            rows.append(torch.nn.functional.pad(taken, (0, tree.max_depth - len(path))))
    return torch.stack(rows).view(*leaves.shape, -1)


def causal_log_probs(policy: CausalTreePolicy, prompts, leaves) -> torch.Tensor:
    """Compute `naive_log_probs` with the model of a causal policy."""

    def logits_of(prompt, path):
        return policy.model(input_ids=torch.cat([prompt, path])[None]).logits[0, len(prompt) - 1 : -1].float()

    return naive_log_probs(policy.catalog.tree, prompts, leaves, policy.model.config.vocab_size, logits_of)


def gradients(model, loss):
    """Return gradients by name; None for a parameter that the loss does not depend on."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True))


def assert_close_gradients(actual: Mapping, expected: Mapping, tolerance: float = 1e-5) -> None:
    """Compare gradients, relative to the largest one; None for a parameter that the loss does not depend on."""
    scale = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            assert float((actual[name] - gradient).abs().max()) <= tolerance * scale, name


def assert_distributed(outcomes: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare outcomes with probabilities by a chi-square test; rare outcomes are pooled."""
    assert abs(float(expected.sum()) - 1) < 1e-4
    counts = torch.bincount(outcomes, minlength=len(expected)).double()
    common = expected * counts.sum() >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0] * counts.sum() / wanted.sum()
    assert scipy.stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3
