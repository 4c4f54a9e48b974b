"""training/passes.py: network passes, counted by hooks."""

import pytest
import torch

from common.teachers.load import load_teacher
from training.passes import PassCounter


@pytest.fixture
def student():
    return load_teacher("mnist").copy()


def one_pass(model, n=3, x=None):
    x = torch.zeros(n, *model.shape) if x is None else x
    return model(x, 0.5, 0.5, model.encode(torch.zeros(n, dtype=torch.int64)))


def test_a_pass_without_gradient_is_one(student):
    counter = PassCounter(dict(student=student))
    with torch.no_grad():
        one_pass(student)
    assert counter.samples == dict(student=3)


def test_a_pass_of_a_trained_network_is_three(student):
    counter = PassCounter(dict(student=student))
    one_pass(student)
    assert counter.samples == dict(student=9)


def test_a_frozen_network_that_a_gradient_flows_through_is_two(student):
    student.requires_grad_(False)
    counter = PassCounter(dict(student=student))
    one_pass(student, x=torch.zeros(3, *student.shape, requires_grad=True))
    assert counter.samples == dict(student=6)


def test_guidance_doubles(student):
    counter = PassCounter(dict(student=student))
    cond = student.encode(torch.tensor([1, 2]))
    with torch.no_grad():
        student.guided(torch.zeros(2, *student.shape), 0.5, 0.5, cond, 2.0)
    assert counter.samples == dict(student=4)


def test_networks_are_counted_apart_and_each_once(student):
    """A module that wraps a model counts as that model's first name."""
    teacher = load_teacher("mnist")
    wrapper = torch.nn.ModuleDict(dict(fake=student))
    counter = PassCounter(dict(critic=wrapper, student=student, teacher=teacher))
    with torch.no_grad():
        one_pass(student)
        one_pass(teacher, n=5)
    assert counter.samples == dict(critic=3, student=0, teacher=5)


def test_the_toys_exact_teacher_counts_although_it_has_no_network():
    teacher = load_teacher("toy")
    counter = PassCounter(dict(teacher=teacher))
    one_pass(teacher)
    assert counter.samples == dict(teacher=3)


def test_nothing_is_counted_after_remove(student):
    counter = PassCounter(dict(student=student))
    counter.remove()
    one_pass(student)
    assert counter.samples == dict(student=0)


@pytest.mark.parametrize(
    "flags, expected",
    # (nfe - 1) / 2 rollout + 1 + 3 critic + (2 student + 1 or 2 teacher + 1 critic) / ratio
    [("--ratio 5", 4 + 4 / 5), ("--ratio 2 --cfg 3", 4 + 5 / 2)],
)
def test_passes_of_a_run(flags, expected, scripts, tmp_path):
    args = ["--teacher", "toy-cond", "--batch", 16, "--eval-n", 0, "--iters", 10]
    p = scripts.run("dmd2.py", *args, *flags.split(), "--out", tmp_path / "run")
    assert f"passes per iteration   {expected:.2f}: student" in p.out


def test_what_is_no_model_is_named(student, scripts, tmp_path):
    """nct's student is a branch beside a frozen generator: only the generator is counted."""
    counter = PassCounter(dict(student=student, heads=torch.nn.Linear(2, 2)))
    assert counter.left_out == ["heads"]
    args = ["--teacher", "toy", "--batch", 16, "--eval-n", 0, "--iters", 2, "--sample-every", 0]
    p = scripts.run("nct.py", *args, "--out", tmp_path)
    text = "passes per iteration   4.00: generator 4.00; a backward counts two; without student\n"
    assert text in p.out
