"""What surrounds the loop of a script: --start, --resume, --ema-cpu, checkpoints and rates."""

import inspect

from helpers.runs import log
from helpers.trace import Trace

from common.teachers.students import start_from
from training.run import Run

RATES = dict(lr=3e-3, lr_fake=2e-3)


def critic_without_head(steps):
    return steps.critic and steps.critic.fake


def check_frame(monkeypatch, script, out, *flags, show, rates=RATES, critic_of=critic_without_head):
    """Two iterations with --start and a checkpoint after each; then --resume with none left.

    show: names of the logged values that the progress bar shows. rates: names and learning rates.
    critic_of(Trace): the critic that --start gives weights, or None.
    -> Trace of the two iterations
    """
    started = []

    def note_start(*args, **kwargs):
        started.append(inspect.signature(start_from).bind(*args, **kwargs).arguments)

    monkeypatch.setattr(script, "start_from", note_start)
    monkeypatch.setattr("training.run.read_student", lambda folder: None)  # it has no student
    common = ["--iters", 2, "--save-every", 1, "--start", out, "--warmup", 0, "--cooldown", 0]
    for name, rate in rates.items():
        common += [f"--{name.replace('_', '-')}", rate]
    flags = [*common, *flags]
    record = [(Run, "loop"), (Run, "save"), (script, "adamw")]
    steps = Trace(monkeypatch, script, out, *flags, "--ema", 64, "--ema-cpu", record=record)
    (loop,) = steps.calls["loop"]
    assert loop.kwargs["show"] == show
    assert all(name in steps.logs[0] for name in show)
    assert len(steps.calls["save"]) == 2
    assert steps.ema.on_cpu
    assert [call.args[1] for call in steps.calls["adamw"]] == list(rates.values())
    for line in log(out):
        assert {name: line[name] for name in rates} == rates

    (start,) = started
    assert start["folder"] == str(out)
    assert start["teacher"] is steps.teacher
    assert start["student"] is steps.student
    assert start.get("critic") is critic_of(steps)
    assert start["say"].__func__ is Run.print

    loop.args[0].close()  # the Run lets go of its folder
    resumed = Trace(monkeypatch, script, out, *flags, "--resume")
    assert len(started) == 1  # the weights are those of the checkpoint
    for trace in (steps, resumed):
        assert trace.distill["training"]["iterations"] == 2
    return steps
