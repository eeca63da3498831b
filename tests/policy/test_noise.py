import torch
from scipy import stats

from gflowtrl.policy import StatelessNoise


def test_numbers_are_uniform_and_independent_of_the_batch():
    ids = torch.arange(2000)
    drawn = StatelessNoise(7).at(3, ids).uniform("policy", 50)
    assert drawn.dtype == torch.float64 and drawn.min() > 0 and drawn.max() < 1
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    shuffled = torch.randperm(2000)
    assert torch.equal(StatelessNoise(7).at(3, ids[shuffled]).uniform("policy", 20), drawn[shuffled, :20])


def test_numbers_of_things_are_those_of_their_index():
    noise = StatelessNoise(7).at(3, torch.arange(5))
    drawn = noise.uniform("policy", 50, depth=2)
    index = torch.randint(50, (5, 4, 3), generator=torch.Generator().manual_seed(0))
    expected = drawn.gather(1, index.flatten(1)).view(5, 4, 3)
    assert torch.equal(noise.uniform_at("policy", index, depth=2), expected)


def test_every_argument_changes_the_numbers():
    ids = torch.arange(500)
    base = StatelessNoise(0).at(0, ids).uniform("a", 40).flatten()
    others = [
        StatelessNoise(1).at(0, ids).uniform("a", 40),
        StatelessNoise(-1).at(0, ids).uniform("a", 40),
        StatelessNoise(2**63 + 5).at(0, ids).uniform("a", 40),
        StatelessNoise(0).at(1, ids).uniform("a", 40),
        StatelessNoise(0).at(0, ids + 1).uniform("a", 40),
        StatelessNoise(0).at(0, ids).uniform("b", 40),
        StatelessNoise(0).at(0, ids).uniform("a", 40, depth=1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base, other.flatten()]))[0, 1])) < 0.03
