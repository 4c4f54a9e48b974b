"""A frozen one-step generator with a branch: the student of nct.py."""

import hashlib
import inspect
from pathlib import Path

import torch
import torch.nn as nn

from common.errors import UserError
from common.files import write_folder
from common.routed import Routed
from common.schema import COUNT, OBJECT, TEXT, check, is_integer
from common.teachers.load import load_model
from common.teachers.students import is_pipeline, network_of, read_student, sampler_of
from controls.branches import (
    ControlNet,
    MLPBranch,
    TransformerBranch,
    UNetBranch,
    trainable_copy,
)
from controls.ip_adapter import IPAdapter
from controls.maps import Control

# fields of "model" in a student's distill.json (common/schema.py)
CONTROL = dict(name=TEXT, factor=COUNT)
BLOCKS = ("an integer or null", lambda value: value is None or is_integer(value))


class Controlled(nn.Module):
    """A frozen one-step generator f and a trained branch.

    `f(z, cond)` is the generator alone, `self(z, c, cond)` the generator with condition c. All
    other attributes (shape, encode, decode, ...) are the generator's. Its weights are no parameters
    of this module, so optimisers, averages and checkpoints hold the branch only.

    generator: Model. info: the distill.json of its student. sample: its method's sampler.
    """

    def __init__(self, generator, info, sample, control, branch, blocks=None):
        super().__init__()
        self.__dict__["generator"] = generator  # not registered as a submodule
        self.info = info
        self.sample = sample
        self.control = control
        self.branch = branch
        self.blocks = blocks
        self.folder = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["generator"], name)

    @property
    def dtype(self):
        return self.generator.dtype

    @dtype.setter
    def dtype(self, value):
        self.generator.dtype = value

    def _apply(self, fn, recurse=True):
        """Called by .to(device)."""
        self.generator._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        """Always eval mode: without dropout the four passes of a step use the same function."""
        return super().train(False)

    def f(self, z, cond):
        """The generator alone. z: unit noise [B, *shape] -> samples [B, *shape], with gradient."""
        sample_with_gradient = inspect.unwrap(self.sample)  # the sampler runs under no_grad
        return sample_with_gradient(self.generator, z, cond, 1, None, **self.info["sampler"])

    def forward(self, z, c, cond):
        """The generator with the conditions c [B, ...] of `Control`."""
        with self.branch.attached(self.generator.net, c):
            return self.f(z, cond)

    def condition(self, z, r, cond):
        """The condition of the generator's sample from noise z.

        r: normal numbers [B, ...] for the control's random part, of which it uses up to 4 a sample.
        """
        uniform = torch.special.ndtr(r.flatten(1)[:, :4])
        return self.control(self.f(z, cond), uniform)

    def checkpoint_activations(self):
        self.branch.checkpoint_activations()
        self.generator.checkpoint_activations()

    def unsharded(self):
        return self

    def copy(self):
        branch = trainable_copy(self.branch)
        return Controlled(self.generator, self.info, self.sample, self.control, branch, self.blocks)

    def config(self):
        return dict(adapter="controlled", control=self.control.config(), blocks=self.blocks)

    def save(self, folder, info, name="distill.json"):
        """Writes the branch, the generator (in generator/), and last the JSON file `name`."""
        write_folder(folder, self.files() | {name: dict(info, model=self.config())})

    def files(self):
        """As Model.files."""
        generator = self.generator.files()
        generator["distill.json"] = dict(self.info, model=self.generator.config())
        generator = {f"generator/{path}": v for path, v in generator.items()}
        return generator | self.branch.files()


def make_branch(net, control, scale=1, blocks=None):
    """An untrained branch for the network `net`. scale: pixels per latent, along one side.
    blocks: how many transformer blocks it copies; None: half of them.
    """
    kind = type(net).__name__
    classes = {"UNet2DConditionModel": ControlNet, "UNet2DModel": UNetBranch, "MLP": MLPBranch}
    if control.embedding:
        cls = IPAdapter
    elif kind in classes:
        cls = classes[kind]
    elif hasattr(net, "transformer_blocks"):
        return TransformerBranch(net, control, scale, blocks).eval()
    else:
        raise UserError(f"--generator: expected a UNet or transformer of diffusers, found {kind}")
    branch = cls(net, control, scale)
    if blocks is not None:
        raise UserError(f"--blocks: expected a transformer, found {kind}, {cls.copies}")
    return branch.eval()


def make_controlled(generator, info, sample, control, blocks=None):
    """`Controlled` with an untrained branch. Arguments as there."""
    scale = 1 if control.shape is None else control.shape[-1] // generator.shape[-1]
    branch = make_branch(generator.net, control, scale, blocks).to(generator.device)
    return Controlled(generator, info, sample, control, branch, blocks)


def load_generator(folder, teacher, name):
    """-> Model, distill.json, sampler of a finished one-step student of `teacher`.

    name: --teacher. The folder of a one-step pipeline is accepted too: its network is evaluated
    once, at the last of 1,000 noise levels.
    """
    if is_pipeline(folder):
        info = dict(method="dmd2", teacher=name, nfe=1, sampler=dict(steps="999"), cfg=1.0)
        return teacher, info, sampler_of(Path(folder), info)
    home, info = read_student(folder)
    found = None
    if info["method"] == "nct":
        found = "one that has a control already"
    elif info["nfe"] != 1:
        found = f"one of {info['nfe']} steps"
    if found:
        raise UserError(f"--generator {folder}: expected a student of one step, found {found}")
    sample = sampler_of(home, info)
    generator = network_of(folder, home, info, teacher, name)
    if isinstance(generator, Routed):
        n = len(generator.experts)
        if n > 1:
            raise UserError(f"--generator {folder}: expected one network, found {n} experts")
        generator = generator.experts[0]
    return generator.to(teacher.device), info, sample


def load_controlled(folder, info, teacher=None):
    """What `Controlled.save` wrote. info: "model" of its distill.json. UserError."""
    folder = Path(folder)
    check(info, f"{folder / 'distill.json'}: model.", dict(control=OBJECT, blocks=BLOCKS))
    config = info["control"]
    check(config, f"{folder / 'distill.json'}: model.control.", CONTROL, dict(folder=TEXT))

    home, own = read_student(folder / "generator")
    generator = load_model(home, own["model"], teacher).requires_grad_(False)
    control = Control(config["name"], generator, teacher, config["factor"], config.get("folder"))
    model = make_controlled(generator, own, sampler_of(home, own), control, info.get("blocks"))
    model.branch.load(folder)
    model.folder = folder
    return model


def hash_model(model):
    """SHA-256 of all weights of a network in memory, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + data)
    return digest.hexdigest()
