"""common/rng.py: random numbers that do not depend on the number of processes."""

import pytest
import torch

from common.rng import BatchRandom, PerImageNoise, derive_seed
from dryrun import ghost
from dryrun.ghost import GhostDevice

ghost.register()  # before the first backward of this process: while pytest collects


def all_draws(draw):
    return [
        draw.randn(3),
        draw.rand(),
        draw.randint(0, 1000),
        draw.randn_like(torch.zeros(2, 4, 4)),
        draw.randn(3),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_draws_do_not_depend_on_the_world_size(world):
    one = BatchRandom(0, 7, 8)
    ranks = [BatchRandom(0, 7, 8, rank, world) for rank in range(world)]
    for whole, *parts in zip(all_draws(one), *[all_draws(rank) for rank in ranks]):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("world", [2, 4])
def test_shared_draws_are_equal_on_all_ranks(world):
    draws = [BatchRandom(0, 7, 8)] + [BatchRandom(0, 7, 8, r, world) for r in range(world)]
    shared = [[draw.shared_randint(0, 1000) for _ in range(20)] for draw in draws]
    assert all(numbers == shared[0] for numbers in shared)
    assert len(set(shared[0])) > 10


def test_draws_of_other_iterations_and_seeds_differ():
    draws = {
        tuple(BatchRandom(seed, it, 4).randn(1).flatten().tolist())
        for seed in (0, 1, 2)
        for it in range(50)
    }
    assert len(draws) == 150  # (seed 0, it 1) is not (seed 1, it 0)
    assert len({BatchRandom(0, it, 1).shared_randint(0, 10**9) for it in range(50)}) == 50


def test_neighbouring_iterations_are_uncorrelated():
    x = torch.stack([BatchRandom(0, it, 64).randn(1).flatten() for it in range(400)])
    correlation = float((x[1:] * x[:-1]).mean())
    assert abs(correlation) < 4 / (399 * 64) ** 0.5  # 4 standard errors


def test_ranges():
    draw = BatchRandom(0, 0, 100000)
    i = draw.randint(20, 981)
    assert (int(i.min()), int(i.max())) == (20, 980)
    u = draw.rand()
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005


def test_derived_seeds_differ():
    keys = [(s, i, p) for s in range(-2, 10) for i in range(50) for p in range(1, 6)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(2**40, 1) != derive_seed(2**40 + 1, 1)
    assert 0 <= derive_seed(-1) < 2**64


def test_image_noise_does_not_depend_on_the_batch():
    noise = PerImageNoise(3, range(10))
    z, more = noise(1, 4, 4), noise(2)
    for part in ([0, 1, 2], [9], [5, 1]):
        noise = PerImageNoise(3, part)
        assert torch.equal(noise(1, 4, 4), z[part])
        assert torch.equal(noise(2), more[part])


def test_image_noise_depends_on_image_and_seed():
    z = PerImageNoise(3, range(10))(1, 4, 4)
    assert len({float(v) for v in z[:, 0, 0, 0]}) == 10
    assert not torch.equal(PerImageNoise(4, [0])(1, 4, 4), z[:1])


def test_numbers_that_decide_are_on_the_host():
    with GhostDevice() as gpu:
        draw = BatchRandom(0, 5, 12, 1, 3, "ghost")
        numbers = draw.rand(), draw.randint(0, 9), draw.randn()
        assert draw.randn(2, 2).device.type == "ghost"
        assert not gpu.waits
    assert [t.device.type for t in numbers] == ["cpu"] * 3
    assert [t.shape for t in numbers] == [(4,)] * 3
