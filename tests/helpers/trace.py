"""main() of a script, run in the process of the test, with a record of every optimiser step."""

import contextlib
import dataclasses
import signal
import sys

import torch

from common.routed import Routed
from training.report import Report
from training.run import Run, stop_signals


@contextlib.contextmanager
def signal_handlers_restored():
    """A Run takes over SIGTERM, SIGINT and others; pytest needs its own handlers back."""
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_main(monkeypatch, script, *flags):
    """Runs the main() of an imported script as `python SCRIPT FLAGS` would."""
    argv = [f"{script.__name__}.py", *map(str, flags)]
    with monkeypatch.context() as patch, signal_handlers_restored():
        patch.setattr(sys, "argv", argv)
        script.main()


@dataclasses.dataclass
class Call:
    args: tuple
    kwargs: dict
    result: object


def record_calls(monkeypatch, owner, name):
    """Every later call of owner.name still runs. -> list that grows by one Call each time.

    owner: a module, or a class; args of a method start with its object.
    """
    calls = []
    function = getattr(owner, name)

    def recorded(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(Call(args, kwargs, result))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return calls


def weights(net):
    """All parameters of a network as one vector, detached from it."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@dataclasses.dataclass
class Step:
    """One optimiser step. The dicts have an entry for each network of Trace.networks()."""

    role: str  # the network that the optimiser steps
    lr: float
    grads: dict  # name -> gradients before the step, one a parameter, None where there is none
    before: dict  # name -> weights before the step, one vector
    after: dict  # name -> weights after it
    images: int  # that the weight average has seen before the step
    moments: int  # parameters for which the optimiser has a state before the step

    def has_grad(self, name):
        return any(g is not None for g in self.grads[name])

    def moved(self, name):
        return not torch.equal(self.before[name], self.after[name])

    def flat_grad(self):
        """Gradient of the stepped network as one float64 vector, without missing ones."""
        found = [g.flatten() for g in self.grads[self.role] if g is not None]
        return torch.cat(found).double()


class Trace(list):
    """A list of Step, one for each optimiser step of script.main() on toy-cond with batch 16.

    flags: more flags. record: (owner, name) pairs; trace.calls[name] lists their calls.
    watch(trace) -> {name: module}: more networks to follow, such as dict(head=trace.critic.head).
    teacher: a Model in place of toy-cond, whose preset stays. After the run, trace.teacher,
    trace.student, trace.ema, and trace.critic (the module that the script's class Critic made, or
    None) are the networks; trace.logs are the lines of Run.log, trace.distill is the student's
    distill.json.
    """

    def __init__(self, monkeypatch, script, out, *flags, record=(), watch=None, teacher=None):
        super().__init__()
        self.watch = watch
        self.teacher = self.ema = self.critic = self.distill = None
        self.calls = {}
        self.logs = []
        self.trained = []
        with monkeypatch.context() as patch:
            if teacher is not None:
                patch.setattr(script, "load_teacher", lambda *args, **kwargs: teacher)
            self.patch_script(patch, script)
            self.patch_run(patch)
            for owner, name in record:
                self.calls[name] = record_calls(patch, owner, name)
            fixed = ["--teacher", "toy-cond", "--batch", 16, "--out", out]
            if "--resume" not in flags:
                fixed.append("--overwrite")
            quiet = ["--save-every", 0, "--sample-every", 0, "--eval-n", 0, "--log-every", 1]
            run_main(monkeypatch, script, *fixed, *quiet, *flags)

    @property
    def student(self):
        return self.ema.live

    def patch_script(self, patch, script):
        """Notes the networks that main() makes; leaves out the pictures and files of its end."""

        def keep_first(attribute, make):
            def made(*args, **kwargs):
                result = make(*args, **kwargs)
                if getattr(self, attribute) is None:
                    setattr(self, attribute, result)
                return result

            return made

        for name, attribute in (("load_teacher", "teacher"), ("EMA", "ema"), ("Critic", "critic")):
            if hasattr(script, name):
                patch.setattr(script, name, keep_first(attribute, getattr(script, name)))
        patch.setattr(Report, "end", lambda report, it: setattr(self, "distill", report.record(it)))

    def patch_run(self, patch):
        train, step, log = Run.train, Run.step, Run.log

        def recorded_train(run, net, **kwargs):
            self.trained.append(net)
            return train(run, net, **kwargs)

        def recorded_log(run, it, values):
            numbers = {}
            for name, value in values.items():
                if value is None:
                    continue
                numbers[name] = float(torch.as_tensor(value).detach().float().nanmean())
            self.logs.append(numbers)
            return log(run, it, values)

        def recorded_step(run, opt, *args):
            entry = self.before_step(opt)
            norm = step(run, opt, *args)
            for name, net in self.networks().items():
                entry.after[name] = weights(net)
            self.append(entry)
            return norm

        patch.setattr(Run, "train", recorded_train)
        patch.setattr(Run, "log", recorded_log)
        patch.setattr(Run, "step", recorded_step)

    def networks(self):
        """name -> network: teacher, student (student0, student1, ... where there are several),
        critic. Without a class Critic, the critic is the other network that is trained."""
        named = {}
        if isinstance(self.student, Routed):
            for i, expert in enumerate(self.student.experts):
                named[f"student{i}"] = expert
        else:
            named["student"] = self.student
        known = [self.student, *named.values()]
        others = [net for net in self.trained if not any(net is other for other in known)]
        if self.critic is not None:
            named["critic"] = self.critic
        elif others:
            named["critic"] = others[0]
        named["teacher"] = self.teacher
        if self.watch:
            named.update(self.watch(self))
        return named

    def before_step(self, opt):
        params = [p for group in opt.param_groups for p in group["params"]]
        networks = self.networks()
        grads = {name: gradients(net.parameters()) for name, net in networks.items()}
        role = stepped_network(params, networks)
        if role == "other":
            grads[role] = gradients(params)
        return Step(
            role=role,
            lr=opt.param_groups[0]["lr"],
            grads=grads,
            before={name: weights(net) for name, net in networks.items()},
            after={},
            images=self.ema.images,
            moments=len(opt.state),
        )


def stepped_network(params, networks):
    """Name of the network that has the first of the optimiser's parameters with a gradient.

    "other" if none of them has it. One optimiser may hold all students, of which one has its turn.
    """
    with_grad = [p for p in params if p.grad is not None]
    first = with_grad[0] if with_grad else params[0]
    for name, net in networks.items():
        if any(p is first for p in net.parameters()):
            return name
    return "other"


def gradients(params):
    return [None if p.grad is None else p.grad.clone() for p in params]
