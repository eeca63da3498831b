"""Tests of encoder-decoders against a naive reference: one full sequence per row, mask, renormalize."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from gflowtrl.policy import (
    CausalTreePolicy,
    Seq2SeqTreePolicy,
    StatelessNoise,
    attach_flow_heads,
    has_flow_heads,
    make_policy,
)
from gflowtrl.policy.modules import innermost
from tests import tiny
from tests.tiny import (
    SEQ2SEQ,
    assert_close_gradients,
    assert_distributed,
    catalog_of,
    gradients,
    ragged_prompts,
    random_paths,
    tiny_model,
    tiny_seq2seq,
)


BATCH, VOCAB = 3, 30
CASES = [(kind, "sdpa", 1) for kind in SEQ2SEQ] + [("t5", "eager", 0), ("t5", "sdpa", 0), ("bart", "eager", 1)]


def build(kind="t5", attention="sdpa", ragged=0, num_leaves=40, depth=3) -> tuple[Seq2SeqTreePolicy, PreTrainedModel]:
    """Build the policy, and a copy of the model that no policy has changed."""
    model = tiny_seq2seq(VOCAB, kind, attention)
    untouched = copy.deepcopy(model)
    catalog = catalog_of(random_paths(num_leaves, depth=depth, ragged=bool(ragged)))
    return Seq2SeqTreePolicy(model, catalog), untouched


def naive_log_probs(model, tree, prompts, leaves):
    def logits_of(prompt, path):
        fed = torch.cat([torch.tensor([model.config.decoder_start_token_id]), path[:-1]])
        return model(input_ids=prompt[None], decoder_input_ids=fed[None]).logits[0]

    return tiny.naive_log_probs(tree, prompts, leaves, VOCAB, logits_of)


def some_leaves(policy, count=5):
    return torch.randint(policy.catalog.tree.num_leaves, (BATCH, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "attention", "ragged"), CASES)
def test_scores_equal_the_naive_reference_in_value_and_gradient(kind, attention, ragged):
    policy, untouched = build(kind, attention, ragged)
    prompts, leaves = ragged_prompts(BATCH, VOCAB), some_leaves(policy)
    weights = torch.randn(BATCH, 5, 3, generator=torch.Generator().manual_seed(2))
    packed = policy.score(prompts, leaves)
    naive = naive_log_probs(untouched, policy.catalog.tree, prompts, leaves)
    torch.testing.assert_close(packed.log_probs, naive, rtol=0, atol=1e-5)
    assert_close_gradients(
        gradients(policy.model, (packed.log_probs * weights).sum()), gradients(untouched, (naive * weights).sum())
    )


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_positions_matter(kind):
    """Without branch positions the packed row is wrong, so the tests above can fail."""
    policy, untouched = build(kind)
    prompts, leaves = ragged_prompts(BATCH, VOCAB), some_leaves(policy)
    right = policy.score(prompts, leaves).log_probs
    policy.model.forward = lambda branch_positions, **kwargs: untouched(**kwargs)
    assert not torch.allclose(policy.score(prompts, leaves).log_probs, right, atol=0.05)


@pytest.mark.parametrize("depth", [1, 5])
def test_short_and_long_ids(depth):
    catalog = catalog_of(random_paths(5, depth=depth, codes=5))
    model = tiny_seq2seq(VOCAB)
    for stack in (model.encoder, model.decoder):  # so few buckets that distances share them
        attention = stack.block[0].layer[0].SelfAttention
        attention.relative_attention_num_buckets, attention.relative_attention_max_distance = 4, 6
    untouched = copy.deepcopy(model)
    policy = Seq2SeqTreePolicy(model, catalog)
    prompts, leaves = ragged_prompts(BATCH, VOCAB), torch.arange(5).expand(BATCH, -1)
    naive = naive_log_probs(untouched, catalog.tree, prompts, leaves)
    torch.testing.assert_close(policy.score(prompts, leaves).log_probs, naive, rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.leaf_log_probs(prompts), naive.sum(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "attention", "ragged"), CASES)
def test_leaf_log_probs_and_a_wide_beam_equal_brute_force(kind, attention, ragged):
    policy, untouched = build(kind, attention, ragged, num_leaves=24)
    prompts = ragged_prompts(BATCH, VOCAB)
    tree = policy.catalog.tree
    with torch.no_grad():
        naive = naive_log_probs(untouched, tree, prompts, torch.arange(tree.num_leaves).expand(BATCH, -1)).sum(-1)
    exact = policy.leaf_log_probs(prompts, chunk_size=7)
    torch.testing.assert_close(exact, naive, rtol=0, atol=2e-5)
    torch.testing.assert_close(exact.logsumexp(1), torch.zeros(BATCH), rtol=0, atol=1e-5)
    leaves, log_probs = policy.beam_search(prompts, tree.num_leaves + 2)
    assert (leaves[:, -2:] == -1).all() and (log_probs[:, -2:] == -torch.inf).all()
    torch.testing.assert_close(log_probs[:, :-2], naive.sort(1, descending=True).values, rtol=0, atol=2e-5)
    torch.testing.assert_close(naive.gather(1, leaves[:, :-2]), log_probs[:, :-2], rtol=0, atol=2e-5)


def test_samples_follow_the_exact_distribution():
    policy, _ = build(num_leaves=20, ragged=1)
    prompt = {name: value[:1] for name, value in ragged_prompts(1, VOCAB).items()}
    prompts = {name: value.expand(50, -1) for name, value in prompt.items()}
    leaves, log_q = policy.sample(prompts, 100, StatelessNoise(5).at(0, torch.arange(50)))
    exact = policy.leaf_log_probs(prompt)[0]
    torch.testing.assert_close(log_q, exact[leaves], rtol=0, atol=1e-4)
    assert_distributed(leaves.flatten(), exact.exp())


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_side_of_the_padding_does_not_matter(kind):
    policy, _ = build(kind)
    left = ragged_prompts(BATCH, VOCAB)
    right = {name: torch.zeros_like(value) for name, value in left.items()}
    for b, length in enumerate(left["attention_mask"].sum(1).tolist()):
        for name, value in left.items():
            right[name][b, :length] = value[b, value.shape[1] - length :]
    leaves = some_leaves(policy)
    assert torch.equal(policy.score(left, leaves).log_probs, policy.score(right, leaves).log_probs)


def test_encoder_and_cross_attention_process_a_prompt_once():
    policy, _ = build()
    prompts, seen = ragged_prompts(BATCH, VOCAB), []
    decoder = policy.model.decoder.block[1].layer[1].EncDecAttention
    for module in (policy.model.encoder.block[0], decoder.k):
        module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    once = [torch.Size([BATCH, 9])] * 2
    policy.score(prompts, some_leaves(policy, 16))
    assert seen == once
    noise = StatelessNoise(0).at(0, torch.arange(BATCH))
    for decode in (
        lambda: policy.sample(prompts, 16, noise),
        lambda: policy.beam_search(prompts, 16),
        lambda: policy.stochastic_beam_search(prompts, 16, noise),
        lambda: policy.leaf_log_probs(prompts, chunk_size=7),
    ):
        seen.clear()
        decode()
        assert seen == once


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["t5", "umt5", "bart"])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    policy, _ = build(kind)
    attach_flow_heads(policy.model)
    torch.nn.init.normal_(policy.model.flow_heads.outer.weight)
    prompts, leaves = ragged_prompts(BATCH, VOCAB), some_leaves(policy)

    def loss():
        scores = make_policy(policy.model, policy.catalog).score(prompts, leaves)
        return (scores.log_probs.sum(-1) - scores.log_flows.sum(-1)).square().mean()

    for module in policy.model.modules():  # no dropout, so that two computations can be compared in training mode
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy.model.train()
    parameters = list(policy.model.named_parameters())

    def collect():
        policy.model.zero_grad()
        loss().backward()
        return {name: p.grad for name, p in parameters}

    plain = collect()
    enable = "activation_checkpointing_enable"  # its name since transformers 5.23
    getattr(policy.model, enable, policy.model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    policy.model.enable_input_require_grads()
    layer = policy.model.get_decoder().get_submodule("layers.1.self_attn" if kind == "bart" else "block.1.layer.0")
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert_close_gradients(collect(), plain)
    assert len(calls) == 2  # it was computed a second time


@pytest.fixture
def process_group(tmp_path):
    """A process group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shard(model):
    """Shard a model with FSDP2: parameters are whole only inside the forward of their module."""
    mesh = init_device_mesh("cpu", (1,))
    stack = model.get_decoder()
    for layer in getattr(stack, "block", None) or stack.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("wrap", [DistributedDataParallel, shard])
def test_distributed_wrappers_change_nothing(process_group, kind, wrap):
    def loss_and_gradients(policy):
        scores = policy.score(prompts, leaves)
        loss = (scores.log_probs.sum(-1) - scores.log_flows.sum(-1)).square().mean()
        loss.backward()
        named = innermost(policy.model).named_parameters()
        whole = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in named}
        return loss.detach(), whole

    policy, model = build(kind)
    prompts, leaves = ragged_prompts(BATCH, VOCAB), some_leaves(policy)
    attach_flow_heads(model)
    torch.nn.init.normal_(model.flow_heads.outer.weight)
    loss, plain = loss_and_gradients(make_policy(copy.deepcopy(model), policy.catalog))
    wrapped = make_policy(wrap(model), policy.catalog)
    assert isinstance(wrapped, Seq2SeqTreePolicy)
    other_loss, other = loss_and_gradients(wrapped)
    torch.testing.assert_close(other_loss, loss)
    assert_close_gradients(other, plain)
    torch.testing.assert_close(wrapped.leaf_log_probs(prompts), policy.leaf_log_probs(prompts))


def test_adapters():
    policy, _ = build()
    prompts, leaves = ragged_prompts(BATCH, VOCAB), some_leaves(policy)
    expected, exact = policy.score(prompts, leaves), policy.leaf_log_probs(prompts)
    adapted = get_peft_model(policy.model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))
    attach_flow_heads(adapted.get_base_model())
    wrapped = make_policy(adapted, policy.catalog)
    assert isinstance(wrapped, Seq2SeqTreePolicy)
    scores = wrapped.score(prompts, leaves)
    torch.testing.assert_close(scores.log_probs, expected.log_probs)
    assert torch.equal(scores.log_z, torch.zeros(BATCH))
    torch.testing.assert_close(wrapped.leaf_log_probs(prompts), exact)
    scores.log_probs.sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and "lora_B" in name}
    assert len(trained) == 2 * 2 * 3  # two layers; queries and values of encoder, decoder and cross-attention


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_log_flows_equal_those_of_separate_rows(kind):
    policy, _ = build(kind, ragged=1)
    attach_flow_heads(policy.model)
    assert has_flow_heads(policy.model)
    torch.nn.init.normal_(policy.model.flow_heads.outer.weight)
    policy = Seq2SeqTreePolicy(policy.model, policy.catalog)
    prompts, leaves, tree = ragged_prompts(BATCH, VOCAB), some_leaves(policy), policy.catalog.tree
    scores = policy.score(prompts, leaves)
    torch.testing.assert_close(scores.log_flows[:, :, 0], scores.log_z[:, None].expand(-1, 5))
    for b in range(BATCH):
        prompt = prompts["input_ids"][b][prompts["attention_mask"][b].bool()]
        for k in range(5):
            length = int(scores.lengths[b, k])
            path = tree.paths[leaves[b, k]].long()[: length - 1]
            output = policy.model(
                input_ids=prompt[None], decoder_input_ids=torch.cat([torch.zeros(1, dtype=torch.long), path])[None],
                output_hidden_states=True,
            )  # fmt: skip
            alone = policy.model.flow_heads(output.decoder_hidden_states[-1][0])
            torch.testing.assert_close(scores.log_flows[b, k, :length], alone, rtol=0, atol=1e-5)
            assert (scores.log_flows[b, k, length:] == 0).all()


def test_make_policy_chooses_by_the_model():
    catalog = catalog_of(random_paths(10))
    assert isinstance(make_policy(tiny_seq2seq(VOCAB), catalog), Seq2SeqTreePolicy)
    assert isinstance(make_policy(tiny_model(VOCAB), catalog), CausalTreePolicy)


def test_errors():
    policy, untouched = build()
    untouched.config.model_type = "led"
    with pytest.raises(ValueError, match="of kind 'led' is not known to be exact"):
        Seq2SeqTreePolicy(untouched, policy.catalog)
    policy.model.config.decoder_start_token_id = policy.model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="has no decoder_start_token_id"):
        Seq2SeqTreePolicy(policy.model, policy.catalog)
    policy.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        Seq2SeqTreePolicy(policy.model, policy.catalog)
