"""Model: a network with its noise schedule and conditions, evaluated at any (alpha, sigma)."""

import contextlib
import copy
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import lora, small
from common.errors import UserError
from common.files import WEIGHTS, load_weights, write_folder
from common.schedules import equal_snr, expand, native_weight, to_x0

EXTRAS = "extras.safetensors"  # weights of the scalar conditions that `extend` added


def take_rows(a, rows):
    """Rows of a tensor [B, ...] on any device. rows: indices on the host.

    The copy of the indices does not make the host wait, as a[rows] would.
    """
    return a[rows.to(a.device, non_blocking=True)]


def put_rows(a, rows, values):
    """a[rows] = values, for `rows` as in `take_rows`."""
    a[rows.to(a.device, non_blocking=True)] = values


class StopForward(Exception):
    """Raised by a hook to end a forward pass after the last layer that is needed."""


class ScalarEmbedding(nn.Module):
    """Embedding of a new scalar condition: numbers of order one [B] -> [B, width].

    The last layer starts at zero, so that a network starts as it was without the condition. At most
    freqs / 4 periods per unit keep derivatives along the condition moderate. Input [B, 2] is the
    number and a factor on its embedding: factor 0 removes the condition, whatever was learnt.
    """

    def __init__(self, width, freqs=8):
        super().__init__()
        self.freqs = freqs
        self.layers = nn.Sequential(nn.Linear(2 * freqs, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, s):
        weight = self.layers[0].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # bf16 would round the number
        s = s.to(device=weight.device, dtype=dtype, non_blocking=True)
        factor = 1
        if s.ndim == 2:
            s, factor = s[:, 0], s[:, 1:]
        phase = s[:, None] * torch.arange(1, self.freqs + 1, device=s.device) * (math.pi / 2)
        return factor * self.layers(torch.cat([phase.cos(), phase.sin()], 1))


class Model(nn.Module):
    """A network with its schedule and conditions. Teacher, student and critic are Models.

    schedule, prediction: see common/schedules.py; prediction is what the network outputs. shape: of
    one sample, without batch. classes: number of labels; the null label is `classes`. A subclass
    for one architecture is called a teacher class.
    """

    adapter = None  # name of the teacher class in teacher.json and distill.json
    network_class = None  # name of the network's class in config.json
    pipeline = None  # diffusers class of the pipeline that the network belongs to
    fields = ()  # further arguments of __init__, saved in teacher.json and distill.json
    part = "transformer"  # prefix in LoRA files: the network's name in a diffusers pipeline
    lora_names = "diffusers"  # form of the names in LoRA files, a key of lora.KEYS
    settings = ()  # attributes that are inputs of the network, numbers >= 0; saved with a student
    video = False  # samples are videos
    blank = False  # --dry-run: there are no weights and no images (dryrun/teachers.py)
    sizes = None  # of a run with several --size (common/teachers/sizes.py)
    vae = None  # the autoencoder of a teacher of latents
    prompts = None  # list of str of a text-to-image teacher
    negative = None  # the text of its null condition (--negative-prompt); None: its pipeline's
    loras = ()  # of --teacher-lora, which the weights contain

    def __init__(self, net, schedule, prediction, shape, classes=0, sigma_data=0.5):
        super().__init__()
        native_weight(prediction, 1.0, 1.0)  # ValueError if the prediction is unknown
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.shape = tuple(shape)
        self.classes = classes
        self.sigma_data = sigma_data
        self.dtype = torch.float32  # bf16 runs the network under autocast; weights do not change
        self.read_weights = None  # () -> fp32 state_dict of a network that was rounded on loading
        self.folder = None
        self.evaluation = {}  # how samples are measured, from teacher.json
        self.extras = nn.ModuleDict()  # scalar conditions, see `extend`
        self.extra = None  # sum of their embeddings during a pass
        self.lora = None  # rank, alpha and targets, if the network has LoRA adapters
        self.base = []  # then: the weights under them, which are shared with the teacher
        self.copied_share = None  # of a smaller network's parameters, those that were the teacher's
        self.sharding = None  # --shard: what spreads modules over processes (training/shard.py)
        self.skeleton = None  # --shard: this model without weights

    # -- what a teacher class defines

    def predict(self, x, t, cond):
        """The network's own output, for its own input x [B, *shape] at its own time t [B].

        t is float32, or float64 if x is. cond: dict of tensors [B, ...].
        """
        raise NotImplementedError

    def feature_layers(self, depths=(0.5,)):
        """Modules whose outputs serve as features, in the order in which the network runs them.

        depths: rising shares of the network's depth, from 0 to below 1.
        """
        raise NotImplementedError

    def to_feature_map(self, h):
        """Output of a feature layer as a map [B, C, H, W], or [B, C]."""
        return h

    def time_embedders(self):
        """(modules, width): modules whose output [B, width] carries the time into the network."""
        raise NotImplementedError

    def encode(self, labels):
        """cond, a dict of tensors [n, ...] on the model's device, of n samples.

        labels: int64 tensor or list [n], for text-to-image models indices into their prompts.
        """
        raise NotImplementedError

    def null(self, n):
        """cond of n unconditional samples."""
        raise NotImplementedError

    def unconditional(self, cond, n):
        """cond of n samples with the null condition in its place. What the null condition does not
        have stays: scalar conditions, and the image of an edit."""
        null = self.null(n)
        return {name: null.get(name, value) for name, value in cond.items()}

    def decode(self, x):
        """Samples [n, *shape] -> uint8 images [n, C, H, W]."""
        raise NotImplementedError

    def encode_images(self, images):
        """uint8 images [n, C, H, W] -> samples [n, *shape]: inverse of decode, up to rounding."""
        raise NotImplementedError

    def class_names(self):
        """Names of each class, lists of str; [] if they are not known. For folders of --data."""
        return [[name] for name in self.evaluation.get("names", [])]

    def to_pictures(self, x):
        """Samples [n, *shape] -> uint8 images for a grid of pictures, usually one a sample."""
        return self.decode(x)

    def expected_shape(self):
        """(shape, classes) according to the network's own configuration."""
        raise NotImplementedError

    @property
    def image_shape(self):
        """Shape of the images that `decode` returns, without batch."""
        return self.shape

    # -- evaluation

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x_t, alpha, sigma, cond, features=False):
        """Clean-sample estimate [B, *shape], in the dtype of x_t = alpha x0 + sigma eps.

        alpha, sigma: numbers or tensors, 0-d or [B], of any schedule. features: True or depths of
        `feature_layers`; the result is then the list of their maps, float32, and the network does
        not run beyond the last of them.
        """
        t, alpha_n, sigma_n, scale = equal_snr(self.schedule, alpha, sigma)
        x = (x_t.double() * expand(scale, x_t)).to(x_t.dtype)  # scale is 1 in the own schedule
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = t.to(device=x.device, dtype=dtype, non_blocking=True).expand(len(x))
        autocast = torch.autocast(
            x.device.type,
            torch.bfloat16,
            enabled=self.dtype == torch.bfloat16,
            cache_enabled=self.sharding is None,  # no cast may outlive a weight that was gathered
        )
        with autocast, self.attention(), self.adding_to_time(self.embed_scalars(cond)):
            if features:
                depths = (0.5,) if features is True else features
                return self.run_to_features(x, t, cond, depths)
            out = self.predict(x, t, cond)
        # in float64: dividing by alpha amplifies rounding
        return to_x0(self.prediction, out, x, alpha_n, sigma_n, self.sigma_data).to(x_t.dtype)

    def guided(self, x_t, alpha, sigma, cond, w):
        """Classifier-free guidance u + w (c - u) on the clean-sample estimate.

        It is the same in eps or velocity, which are linear in x0. w = 1 is the conditional, w = 0
        the unconditional estimate; both take one pass.
        """
        if w == 1:
            return self(x_t, alpha, sigma, cond)
        if w == 0:
            return self(x_t, alpha, sigma, self.unconditional(cond, len(x_t)))
        c, u = self.cond_and_uncond(x_t, alpha, sigma, cond)
        return u + w * (c - u)

    def cond_and_uncond(self, x_t, alpha, sigma, cond):
        """Estimates with the condition and with the null condition, in one pass of twice the batch.

        Scalar conditions (`extend`) are the same in both.
        """
        null = self.unconditional(cond, len(x_t))
        both = {name: torch.cat([cond[name], null[name]]) for name in cond}
        twice = lambda a: torch.cat([a, a]) if torch.is_tensor(a) and a.ndim else a
        return self(torch.cat([x_t, x_t]), twice(alpha), twice(sigma), both).chunk(2)

    def random_cond(self, draw):
        """cond of a batch with uniformly drawn labels (of a text-to-image model: of its prompts).

        draw: BatchRandom of common/rng.py. A model without classes gets label 0 for every sample.
        """
        return self.encode(draw.randint(0, max(self.classes, 1)))

    def drop_condition(self, cond, empty):
        """cond with the null condition in the samples where `empty` [n] is true."""
        null = self.unconditional(cond, len(empty))
        dropped = dict(cond)
        for name in cond:
            if null[name] is cond[name]:  # no part of the null condition
                continue
            rows = empty.view(-1, *[1] * (cond[name].ndim - 1))
            rows = rows.to(cond[name].device, non_blocking=True)
            dropped[name] = torch.where(rows, null[name], cond[name])
        return dropped

    def native_loss_weight(self, alpha, sigma):
        """lambda, shaped as sigma, that weighs squared x0 errors as the network's training loss."""
        _, alpha_n, sigma_n, _ = equal_snr(self.schedule, alpha, sigma)
        return native_weight(self.prediction, alpha_n, sigma_n, self.sigma_data)

    def attention(self):
        """Context that chooses the kernel of attention.

        On CPUs the backward pass of torch's fused attention is slow in bf16: it takes longer than
        the rest of a network. Without gradient the fused kernel is the faster one.
        """
        if self.dtype == torch.bfloat16 and self.device.type == "cpu" and torch.is_grad_enabled():
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    def run_to_features(self, x, t, cond, depths=(0.5,)):
        """Maps of the feature layers, float32. The pass ends after the last of them."""
        layers = self.feature_layers(depths)
        maps = []

        def collect(module, args, out):
            maps.append(self.to_feature_map(out).float())
            if len(maps) == len(layers):
                raise StopForward

        handles = [layer.register_forward_hook(collect) for layer in layers]
        try:
            self.predict(x, t, cond)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def checkpoint_activations(self):
        """--grad-checkpoint: blocks keep no activations, and run again in the backward pass."""
        if not hasattr(self.net, "enable_gradient_checkpointing"):
            raise UserError(
                f"--grad-checkpoint: expected a network of diffusers, "
                f"found {type(self.net).__name__}, which does not offer it"
            )

        def checkpoint(block, *args, **kw):
            extra = self.extra  # of this pass; by the time of the backward there may be another

            def run(*args):
                with self.attention(), self.adding_to_time(extra):
                    return block(*args, **kw)

            return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

        self.net.enable_gradient_checkpointing(checkpoint)

    # -- scalar conditions beside the time: a second time, a guidance scale

    def extend(self, *names):
        """Adds scalar conditions, given as cond[name] from then on (see ScalarEmbedding).

        Their embeddings are added to that of the time. They start at zero, so that the network
        starts as it was. Returns self.
        """
        for name in names:
            embed = ScalarEmbedding(self.time_embedders()[1]).to(self.device)
            self.extras[name] = self.sharding(embed) if self.sharding else embed
        return self

    def embed_scalars(self, cond):
        """Sum of the embeddings of all scalar conditions, [B, width]; None if there are none."""
        if not self.extras:
            return None
        return sum(embed(cond[name]) for name, embed in self.extras.items())

    @contextlib.contextmanager
    def adding_to_time(self, extra):
        """Context in which the time embedders return their output plus `extra` [B, width].

        The networks are diffusers' and have no argument for more conditions. A forward hook adds
        them without a change to the network, its state_dict or its folder; it exists during a pass
        only, so that copies of the network never have it.
        """
        if extra is None or extra is self.extra:  # nothing to add, or added already
            yield
            return

        def add(module, args, out):  # out: [B, width], or [B, rows, width] of equal time
            return out + self.extra.to(out.dtype).view(len(out), *[1] * (out.ndim - 2), -1)

        handles = [module.register_forward_hook(add) for module in self.time_embedders()[0]]
        self.extra = extra
        try:
            yield
        finally:
            self.extra = None
            for handle in handles:
                handle.remove()

    # -- copies

    def copy(self, adapters=None, changes=None):
        """A trainable copy with its own network weights in fp32; everything else is shared.

        adapters: the specification that --lora gives (common/lora.py). Then the copy has LoRA
        adapters of its own, on the weights of this model. So has a copy of a model with adapters.
        changes: those that --small gives (common/small.py). Then the copy has a network of another
        size.
        """
        if changes:
            return self.resized(changes)
        if self.sharding:
            return self.sharding.copy(self)
        if self.lora:
            copied = self.with_network(lora.copy_network(self.net, self.base))
        elif adapters:
            net, base = lora.add_adapters(self.net, adapters)
            copied = self.with_network(net)
            copied.base = base
            copied.lora = {name: adapters[name] for name in ("rank", "alpha", "targets")}
        else:
            copied = self.with_network(copy.deepcopy(self.net).float())
            if self.is_rounded():
                copied.net.load_state_dict(self.read_weights())
        copied.extras = copy.deepcopy(self.extras).float()
        return copied.requires_grad_(True)

    def is_rounded(self):
        """Whether its files have more digits than its weights: those of a frozen bf16 teacher.

        What is trained starts from the files, as in the official code of the methods.
        """
        rounded = any(p.dtype != torch.float32 for p in self.net.parameters())
        return rounded and self.read_weights is not None

    def with_network(self, net):
        """This model around another network of its class; everything else is shared."""
        copied = copy.copy(self)
        for name, value in vars(self).items():
            if name.startswith("_") and isinstance(value, dict):  # its own modules, hooks, ...
                vars(copied)[name] = value.copy()
        copied.net = net
        copied.extras = nn.ModuleDict()
        return copied

    def unsharded(self):
        """The model with whole weights. With --shard: to be called by all processes; the weights
        are in the CPU memory of rank 0."""
        return self.sharding.unsharded(self) if self.sharding else self

    def resized(self, changes):
        """A trainable model like this one with a network of another size, fp32.

        It starts with the weights of this one where they fit. changes: see common/small.py.
        UserError if there is no such network, or if it is not for the same samples and conditions.
        """
        net = small.build(self.network, self.net_config(), changes, self.device)
        model = (self.skeleton or self).with_network(net)
        self.check_resized(model, changes)
        names = small.teacher_names(net, self.net)
        parameters = dict(net.named_parameters())
        copied = sum(p.numel() for name, p in parameters.items() if name in names)
        model.copied_share = copied / sum(p.numel() for p in parameters.values())
        if self.sharding:
            model = self.sharding(model)
        self.give_weights(model.net, names)
        return model.requires_grad_(True)

    def check_resized(self, model, changes):
        """UserError unless the network of `model` takes and returns samples of this one."""
        t = self.schedule.grid(2)[:1].to(self.device, torch.float32, non_blocking=True)
        zeros = torch.zeros(1, *self.shape, device=self.device)
        try:
            with torch.no_grad():
                found = tuple(model.predict(zeros, t, self.encode([0])).shape[1:])
        except Exception as e:  # of many kinds, as for an unusable configuration
            raise small.cannot(changes, "no network for the teacher's samples", e) from None
        classes = self.classes
        if self.prompts is None:
            found, classes = model.expected_shape()
        if (found, classes) != (self.shape, self.classes):
            raise UserError(
                f"{small.flag_text(changes)}: expected a network for samples {list(self.shape)} of "
                f"{self.classes} classes, found one for {list(found)} of {classes}"
            )

    @torch.no_grad()
    def give_weights(self, net, names):
        """Copies weights of this network into another one.

        names: {name of a tensor there: name of the tensor here}.
        """
        if self.sharding and self.is_rounded():
            self.sharding.scatter(self.read_weights, net, names)
            return
        own = self.read_weights() if self.is_rounded() else self.net.state_dict()
        tensors = net.state_dict()
        for name, own_name in names.items():
            tensors[name].copy_(own[own_name])

    # -- files

    def save(self, folder, info, name="distill.json"):
        """Writes a diffusers folder and the JSON file `name`: info and what loading needs."""
        write_folder(folder, self.files() | {name: dict(info, model=self.config())})

    def files(self):
        """What the folder of `save` holds besides its JSON file, {path: contents}: config.json and
        the weights, or a LoRA file. Contents: tensors {name: tensor}, or an object for JSON."""
        files = self.network_files()
        if self.extras:
            files[EXTRAS] = self.extras.state_dict()
        return files

    def network_files(self):
        """`files` without the conditions that `extend` added."""
        if self.lora:
            return {lora.FILE: lora.to_file(self, lora.tensors_of(self))}
        return {"config.json": self.config_file(), WEIGHTS: self.net.state_dict()}

    def config_file(self):
        """Contents of config.json."""
        return dict(self.net_config(), _class_name=type(self.net).__name__)

    def config(self):
        """The entry "model" of teacher.json and distill.json."""
        config = dict(
            adapter=self.adapter,
            schedule=self.schedule.config,
            prediction=self.prediction,
            shape=list(self.shape),
            classes=self.classes,
            sigma_data=self.sigma_data,
        )
        if self.extras:
            config["extras"] = list(self.extras)
        if self.lora:
            config["lora"] = lora.config(self)
        return config

    def net_config(self):
        """The network's configuration, without diffusers' private entries but its version."""
        return {
            key: value
            for key, value in self.net.config.items()
            if not key.startswith("_") or key == "_diffusers_version"
        }


def layers_at(layers, depths):
    """The layers at these shares of the depth, each once: a shallow network has fewer of them."""
    return list(dict.fromkeys(layers[int(depth * len(layers))] for depth in depths))


def load_extras(folder, info, model):
    """Loads what a student has besides its network: `settings`, and conditions of `extend`.

    info: the entry "model" of its distill.json. UserError if it cannot be used.
    """
    for name in model.settings:
        if name not in info:
            continue
        value = info[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise UserError(f"{folder}: {name}: expected a number >= 0, found {value!r}")
        setattr(model, name, value)
    names = info.get("extras")
    if not names:
        return
    known = isinstance(names, list) and all(isinstance(n, str) and n.isidentifier() for n in names)
    if not known:
        raise UserError(f"{folder}: extras: expected a list of names, found {names!r}")
    load_weights(Path(folder) / EXTRAS, model.extend(*names).extras)
