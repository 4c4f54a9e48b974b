"""training/ema.py: the weight average."""

import pytest
import torch

from common.teachers.load import load_teacher
from training.ema import EMA


class Weights(torch.nn.Module):
    """Stands for a Model: one weight, and copy()."""

    def __init__(self, value, dtype=torch.float32):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((2,), value, dtype=dtype))

    def copy(self):
        return Weights(float(self.w.detach()[0]))


def test_ema_starts_warm():
    """While few images are seen the half-life is 5 % of them.

    After 100 steps the start is forgotten, and the average lags about 5 % / ln 2 behind.
    """
    live = Weights(0.0)
    ema = EMA(live, 1e9)
    assert float(ema.model.w[0]) == 0
    for i in range(1, 101):
        live.w.data.fill_(float(i))
        ema.update(64)
    assert ema.images == 6400
    assert 100 - float(ema.model.w[0]) == pytest.approx(6.5, abs=0.5)  # measured 6.52


def test_ema_is_fp32_and_frozen():
    """One update moves it by a step that bf16 could not hold."""
    live = Weights(1.0, torch.bfloat16)
    ema = EMA(live, 1000)
    ema.images = 10**6
    live.w.data.fill_(2.0)
    ema.update(1)
    assert ema.model.w.dtype == torch.float32
    assert not ema.model.w.requires_grad
    assert float(ema.model.w[0]) == pytest.approx(1 + 1 - 0.5**0.001, rel=1e-6)
    assert live.w.dtype == torch.bfloat16
    assert live.w.requires_grad


def test_ema_moves_only_on_update():
    live = Weights(1.0)
    ema = EMA(live, 1000)
    live.w.data.fill_(2.0)
    assert float(ema.model.w[0]) == 1.0


def test_ema_off_is_the_model_itself():
    live = Weights(1.0)
    ema = EMA(live, 0)
    ema.update(64)
    assert ema.model is live
    assert ema.images == 64
    assert live.w.requires_grad
    assert ema.state_dict()["model"] == {}


def test_ema_resumes_bit_for_bit():
    def walk(ema, live, steps):
        for i in steps:
            live.w.data.fill_(float(i))
            ema.update(64)

    live = Weights(0.0)
    straight, first = EMA(live, 500), EMA(live, 500)
    walk(straight, live, range(40))
    walk(first, live, range(20))
    second = EMA(Weights(-5.0), 500)
    second.load_state_dict(first.state_dict())
    walk(second, second.live, range(20, 40))
    assert torch.equal(second.model.w, straight.model.w)
    assert second.images == straight.images


def test_ema_of_a_model():
    student = load_teacher("toy").copy()
    ema = EMA(student, 1000)
    with torch.no_grad():
        student.net.out.bias += 1
    ema.update(64)
    assert not ema.model.exact
    assert torch.allclose(ema.model.net.out.bias, student.net.out.bias)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in student.parameters())
