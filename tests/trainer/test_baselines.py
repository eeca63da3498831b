"""S-DPO and GRPO in the trainer: they need a reference, and teach what they are for."""

import pytest
import torch

from gflowtrl.data import Step
from gflowtrl.policy import make_policy
from gflowtrl.rewards import GroundTruthReward, RankPenaltyReward
from tests.distributed.cases import Case, adapters_of

from .world import make_catalog, make_rows, make_trainer


CATALOG = make_catalog()


def target_probs(trainer) -> torch.Tensor:
    rows = make_rows()
    prompts = trainer._encoder(rows["history"])
    log_pi = make_policy(trainer.model.eval(), trainer._catalog).leaf_log_probs(prompts)
    return log_pi.exp().gather(1, CATALOG.leaf_of(rows["target"])[:, None])


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sdpo", "num_generations": 4},
        {"loss_type": "grpo", "reward_transform": "exp", "sampler": "beam", "num_generations": 8},
        {"loss_type": ["sft", "sdpo"], "peft_config": adapters_of(Case("sdpo"))},
    ],
    ids=["sdpo", "grpo", "sft and sdpo with adapters"],
)
@torch.no_grad()
def test_targets_become_more_probable(tmp_path, options):
    rewards = [GroundTruthReward(), RankPenaltyReward()] if options["loss_type"] == "grpo" else None
    trainer = make_trainer(tmp_path, rewards, max_steps=30, **options)
    before = target_probs(trainer).mean()
    with torch.enable_grad():
        trainer.train()
    assert target_probs(trainer).mean() > before + 0.1
    assert trainer.prior is None and trainer.reference is not None  # it is no part of any reward


def test_the_reference_stays_as_the_model_was(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="sdpo", num_generations=4)
    batch = next(iter(trainer.get_train_dataloader()))
    leaves = torch.arange(23).expand(8, -1)
    before = trainer.reference.token_log_probs(trainer.model, batch["prompts"], leaves)
    trainer.train()
    assert torch.equal(before, trainer.reference.token_log_probs(trainer.model, batch["prompts"], leaves))
    own = make_policy(trainer.model, trainer._catalog).score(batch["prompts"], leaves).log_probs
    assert (own - before).abs().max() > 0.1


def test_a_rank_penalty_by_hand():
    reward = RankPenaltyReward().bind(CATALOG)
    target = CATALOG.items_of(5)[0]
    step = Step({}, torch.arange(2), torch.full((2,), -1), {"target": [target, target]})
    found = reward.score_leaves(step, torch.tensor([[7, 5, 1], [7, 2, 1]]))
    shares = [1 / torch.log2(torch.tensor(i + 2.0)) for i in range(3)]
    torch.testing.assert_close(found[0], torch.tensor([-shares[0] / sum(shares), 1.0, -shares[2] / sum(shares)]))
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="looks at whole groups"):
        reward(["a"], [[1]], target=[target])
