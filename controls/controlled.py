"""A frozen one-step generator with its branch."""

import hashlib
import inspect
from pathlib import Path

import torch
import torch.nn as nn

from common.errors import UserError
from common.files import WEIGHTS, load_weights, save_weights, write_json
from common.routed import Routed
from common.teachers.load import load_model
from common.teachers.students import network_of, read_student, sampler_of
from controls.branches import ControlNet, IPAdapter, make_branch, twin
from controls.maps import Control


class Controlled(nn.Module):
    """A frozen one-step generator f and a branch. `f(z, cond)` is the generator alone, `self(z, c, cond)` with condition c; what is not said here (shape,
    encode, decode, ...) the generator answers. Its weights are no parameters of this module: averages and checkpoints hold the branch only."""

    def __init__(self, generator, info, sample, control, branch, blocks=None):
        super().__init__()
        fn = inspect.unwrap(sample)  # without its no_grad
        own = dict(
            generator=generator,
            info=info,
            run=lambda z, cond: fn(generator, z, cond, 1, None, **info["sampler"]),
            control=control,
            blocks=blocks,
            folder=None,
        )
        self.__dict__.update(own)
        self.sample, self.branch = sample, branch

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["generator"], name)

    def __setattr__(self, name, value):
        if name == "dtype":
            self.generator.dtype = value
        else:
            super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):  # .to(device)
        self.generator._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        return super().train(False)  # no dropout: the same function in all four uses of a step

    def f(self, z, cond):
        return self.run(z, cond)

    def forward(self, z, c, cond):
        with self.branch.attached(self.generator.net, c):
            return self.run(z, cond)

    def rehearsal(self, z, cond):
        cond = {k: v.expand(len(z), *v.shape[1:]) for k, v in cond.items()}
        return self(z, self.condition(z, torch.zeros(len(z), 4, device=z.device), cond), cond)

    def condition(self, z, r, cond):
        """Of another sample of the generator: independent of any noise that it will be used with. r: normal numbers, at least 4 a sample (2 on the toy)."""
        return self.control(self.f(z, cond), torch.special.ndtr(r.flatten(1)[:, :4]))

    def checkpoint_activations(self):
        if not isinstance(
            self.branch, ControlNet
        ):  # the hooks of the others would be gone when a block runs again
            raise UserError(
                "--grad-checkpoint: expected a generator of class UNet2DConditionModel and a --control that is a picture: only its ControlNet can do it"
            )
        self.branch.net.enable_gradient_checkpointing()
        self.generator.checkpoint_activations()

    def unsharded(self):
        return self

    def copy(self):
        return Controlled(
            self.generator, self.info, self.sample, self.control, twin(self.branch), self.blocks
        )

    def config(self):
        return dict(adapter="controlled", control=self.control.config(), blocks=self.blocks)

    def save(self, folder, info, name="distill.json"):
        """The branch (ControlNet or IP-Adapter as diffusers knows them), in generator/ the generator, and `name` last."""
        folder = Path(folder)
        (folder / "generator").mkdir(parents=True, exist_ok=True)
        self.generator.save(
            folder / "generator", {k: v for k, v in self.info.items() if k != "model"}
        )
        if isinstance(self.branch, ControlNet):
            self.branch.net.save_pretrained(folder, safe_serialization=True)
        elif isinstance(self.branch, IPAdapter):
            save_weights(
                folder / IPAdapter.FILE,
                {IPAdapter.key(k): v for k, v in self.branch.state_dict().items()},
            )
        else:
            save_weights(folder / WEIGHTS, self.branch.state_dict())
        write_json(folder / name, dict(info, model=self.config()))


def load_generator(folder, teacher, name):
    """-> Model, distill.json, `sample` of a finished one-step student of this teacher; of a pipeline's folder: its network, asked once at the noise end."""
    if (Path(folder) / "model_index.json").is_file():
        info = dict(method="dmd2", teacher=name, nfe=1, sampler=dict(steps="999"), cfg=1.0)
        return teacher, info, sampler_of(Path(folder), info)
    home, info = read_student(folder)
    if info["nfe"] != 1 or info["method"] == "nct":
        found = (
            "one that has a control already"
            if info["method"] == "nct"
            else f"one of {info['nfe']} steps"
        )
        raise UserError(f"--generator {folder}: expected a student of one step, found {found}")
    sample = sampler_of(home, info)
    generator = network_of(folder, home, info, teacher, name)
    if isinstance(generator, Routed):
        if len(generator.experts) > 1:
            raise UserError(
                f"--generator {folder}: expected one network, found {len(generator.experts)} experts"
            )
        generator = generator.experts[0]
    return generator.to(teacher.device), info, sample


def hash_model(model):
    """Of all weights of a network in memory."""
    digest = hashlib.sha256()
    for name, v in sorted(model.state_dict().items()):
        digest.update(
            name.encode() + v.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def make(generator, info, sample, control, blocks=None):
    scale = 1 if control.shape is None else control.shape[-1] // generator.shape[-1]
    branch = make_branch(generator.net, control, scale, blocks).to(generator.device)
    return Controlled(generator, info, sample, control, branch, blocks)


def load_controlled(folder, info, teacher=None):
    """What `Controlled.save` wrote. info: "model" of its distill.json."""
    home, own = read_student(folder / "generator")
    generator = load_model(home, own["model"], teacher).requires_grad_(False)
    given = info.get("control")
    if (
        not isinstance(given, dict)
        or not isinstance(given.get("factor"), int)
        or not isinstance(given.get("name"), str)
        or not isinstance(given.get("folder") or "", str)
    ):
        raise UserError(
            f"{folder / 'distill.json'}: model.control: expected an object with name and factor, found {given!r}"
        )
    if not (info.get("blocks") is None or isinstance(info["blocks"], int)):
        raise UserError(
            f"{folder / 'distill.json'}: model.blocks: expected a number or null, found {info['blocks']!r}"
        )
    control = Control(given["name"], generator, teacher, given["factor"], given.get("folder"))
    model = make(generator, own, sampler_of(home, own), control, info.get("blocks"))
    if isinstance(model.branch, ControlNet):
        load_weights(folder / WEIGHTS, model.branch.net)
    elif isinstance(model.branch, IPAdapter):
        load_weights(folder / IPAdapter.FILE, model.branch, IPAdapter.key)
    else:
        load_weights(folder / WEIGHTS, model.branch)
    model.folder = folder
    return model
