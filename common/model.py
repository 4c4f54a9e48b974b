"""Model: a network with its noise schedule and conditions, evaluated at any (alpha, sigma)."""

import contextlib
import copy
import json
import math
from pathlib import Path

import torch.nn as nn
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import lora, schedules
from common.errors import UserError, did_you_mean
from common.files import WEIGHTS, load_weights, save_weights, write_json
from common.schedules import equal_snr, expand, to_x0

EXTRAS = "extras.safetensors"  # weights that `extend` added


class StopForward(Exception):
    """Raised by a hook to end a forward pass after the last layer that is needed."""


class ScalarEmbedding(nn.Module):
    """Embedding of a new scalar condition, [B] of order one -> [B, width]. The last layer starts at zero: the network starts as it was. Smooth in its
    input (at most freqs / 4 periods per unit), so that derivatives along it are tame. [B, 2] is the number and a factor on its embedding: where the
    factor is 0 the network knows nothing of the condition, for good."""

    def __init__(self, width, freqs=8):
        super().__init__()
        self.freqs = freqs
        self.layers = nn.Sequential(nn.Linear(2 * freqs, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, s):
        s = s.to(self.layers[0].weight.dtype)
        s, factor = (s[:, 0], s[:, 1:]) if s.ndim == 2 else (s, 1)
        phase = s[:, None] * torch.arange(1, self.freqs + 1, device=s.device) * (math.pi / 2)
        return factor * self.layers(torch.cat([phase.cos(), phase.sin()], 1))


class Model(nn.Module):
    """A network with its schedule and conditioning. Teacher, student and critic are all of this class.

    schedule: of the network; prediction: what it outputs (common/schedules.py); shape: of one sample, without batch; classes: number of labels, the
    null label being `classes`; dtype: of the network pass (bf16 runs it under autocast, parameters and everything around it stay as they are).
    """

    adapter = None  # name in teacher.json
    part = "transformer"  # name of the network in a LoRA file, that of its place in a pipeline
    settings = ()  # attributes that the network gets besides time and condition, kept with a student
    video = False  # samples are videos
    vae = None  # a teacher of latents: the autoencoder
    prompts = None  # a teacher of text: list of str

    def __init__(self, net, schedule, prediction, shape, classes=0, sigma_data=0.5):
        super().__init__()
        schedules.native_weight(prediction, 1.0, 1.0)  # ValueError if the prediction is unknown
        self.net, self.schedule, self.prediction, self.shape, self.classes, self.sigma_data = (
            net,
            schedule,
            prediction,
            tuple(shape),
            classes,
            sigma_data,
        )
        self.dtype, self.folder, self.evaluation, self.extras, self.extra = (
            torch.float32,
            None,
            {},
            nn.ModuleDict(),
            None,
        )
        self.lora, self.base = (
            None,
            [],
        )  # of a network with adapters: rank, alpha, targets; the weights that are not its own
        self.sharding, self.skeleton = (
            None,
            None,
        )  # --shard (common/shard.py): what spreads modules over the processes; this model as it was, without weights

    # -- what an adapter defines

    def predict(self, x, t, cond):
        """The network's own output for its own input x [B, *shape] and time t [B] on its own schedule (float32; float64 if x is). cond: dict of tensors [B, ...]."""
        raise NotImplementedError

    def feature_layers(self, depths=(0.5,)):
        """Modules whose outputs serve as features, in the order in which the network runs them; depths: rising shares of the network, from 0 to below 1."""
        raise NotImplementedError

    def time_embedders(self):
        """(modules whose output [B, width] carries the time into the network, width): what `extend` adds to."""
        raise NotImplementedError

    def to_feature_map(self, h):
        """Output of a site as a map [B, C, H, W] (or [B, C])."""
        return h

    def encode(self, labels):
        """Labels (int64 tensor or list, [n]) or prompts (list of str) -> cond: dict of tensors [n, ...] on the model's device."""
        raise NotImplementedError

    def null(self, n):
        """cond of n unconditional samples."""
        raise NotImplementedError

    def random_cond(self, draw):
        """cond of a batch with uniformly drawn labels (of a text-to-image model: prompts of its list).

        draw: BatchRandom of common/rng.py. A model without classes gets label 0 for every sample.
        """
        return self.encode(draw.randint(0, max(self.classes, 1)))

    def drop_condition(self, cond, empty):
        """cond of n samples, the unconditional one where `empty` [n] is true."""
        null = self.null(len(empty))
        return {
            k: torch.where(empty.view(-1, *[1] * (v.ndim - 1)), null[k], v) if k in null else v
            for k, v in cond.items()
        }

    def expected_shape(self):
        """(shape, classes) that the network's own configuration asks for."""
        raise NotImplementedError

    def decode(self, x):
        """Samples [n, *shape] -> uint8 images [n, C, H, W]."""
        raise NotImplementedError

    def encode_images(self, images):
        """uint8 images [n, C, H, W] -> samples [n, *shape], the inverse of decode up to rounding."""
        raise NotImplementedError

    # -- what every model can do

    @property
    def image_shape(self):
        """Shape of what `decode` returns, without batch."""
        return self.shape

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x_t, alpha, sigma, cond, features=False):
        """x0 estimate [B, *shape] in the dtype of x_t, for x_t = alpha x0 + sigma eps of any schedule; alpha, sigma: 0-d or [B].
        features=True: instead the list of hidden states at `sites()`, float32, and the network runs no further than the last site; a tuple: at those depths."""
        t, alpha_n, sigma_n, scale = equal_snr(self.schedule, alpha, sigma)
        x = (x_t.double() * expand(scale, x_t)).to(
            x_t.dtype
        )  # scale is exactly 1 in the network's own schedule
        t = t.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        autocast = torch.autocast(
            x.device.type,
            torch.bfloat16,
            enabled=self.dtype == torch.bfloat16,
            cache_enabled=self.sharding is None,
        )
        with autocast, self.attention(), self.extended(cond):
            if features:
                return self.run_to_features(x, t, cond, *[features] * (features is not True))
            out = self.predict(x, t, cond)
        return to_x0(self.prediction, out, x, alpha_n, sigma_n, self.sigma_data).to(
            x_t.dtype
        )  # float64 inside: eps / alpha amplifies rounding

    x0 = forward

    def rehearsal(self, x, cond):
        """A pass on x [n, *shape], for what it costs; cond: of one sample."""
        given = {k: v.expand(len(x), *v.shape[1:]) for k, v in cond.items()} | {
            name: torch.zeros(len(x), device=x.device) for name in self.extras
        }
        return self(x, 0.5, 0.5, given)

    def attention(self):
        """Which attention torch takes. On CPUs the backward of its fused one needs longer in bf16 than all the rest of a network; forwards it is the faster one."""
        plain = (
            self.dtype == torch.bfloat16 and self.device.type == "cpu" and torch.is_grad_enabled()
        )
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()

    def run_to_features(self, x, t, cond, depths=(0.5,)):
        found, sites = [], self.feature_layers(depths)

        def hook(module, args, out):
            found.append(self.to_feature_map(out).float())
            if len(found) == len(sites):
                raise StopForward

        handles = [site.register_forward_hook(hook) for site in sites]
        try:
            self.predict(x, t, cond)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def extend(self, *names):
        """New scalar conditions, a second time or a guidance scale: given as cond[name], [B] numbers of order one (or [B, 2]: Scalar), from then on.
        They are added to the time embedding, by zero at first, so the network starts as it was. -> self"""
        for name in names:
            embed = ScalarEmbedding(self.time_embedders()[1]).to(self.device)
            self.extras[name] = self.sharding(embed) if self.sharding else embed
        return self

    @contextlib.contextmanager
    def extended(self, cond, extra=None):
        if not self.extras:
            yield
            return
        outer, self.extra = (
            self.extra,
            sum(embed(cond[name]) for name, embed in self.extras.items())
            if extra is None
            else extra,
        )
        add = lambda module, args, out: out + self.extra.to(out.dtype)
        handles = (
            [module.register_forward_hook(add) for module in self.time_embedders()[0]]
            if outer is None
            else []
        )
        try:
            yield
        finally:
            self.extra = outer
            for handle in handles:
                handle.remove()

    def guided(self, x_t, alpha, sigma, cond, w):
        """Classifier-free guidance u + w (c - u) on the x0 estimate (linear, so the same in eps or velocity). w = 1 is the conditional, w = 0 the
        unconditional, each in one pass."""
        if w == 1:
            return self(x_t, alpha, sigma, cond)
        if w == 0:
            null = self.null(len(x_t))
            return self(x_t, alpha, sigma, {k: null.get(k, cond[k]) for k in cond})
        c, u = self.cond_and_uncond(x_t, alpha, sigma, cond)
        return u + w * (c - u)

    def cond_and_uncond(self, x_t, alpha, sigma, cond):
        """x0 estimates with the condition and with the null condition, in one pass of twice the batch."""
        null = self.null(len(x_t))
        both = {
            k: torch.cat([cond[k], null.get(k, cond[k])]) for k in cond
        }  # conditions of `extend` are the same in both halves
        alpha, sigma = (
            torch.cat([a, a]) if torch.is_tensor(a) and a.ndim else a for a in (alpha, sigma)
        )
        return self(torch.cat([x_t, x_t]), alpha, sigma, both).chunk(2)

    def native_loss_weight(self, alpha, sigma):
        """lambda [same shape as sigma] that turns a squared x0 error at (alpha, sigma) into the loss this network was trained with."""
        _, alpha_n, sigma_n, _ = equal_snr(self.schedule, alpha, sigma)
        return schedules.native_weight(self.prediction, alpha_n, sigma_n, self.sigma_data)

    def copy(self, adapters=None):
        """A twin with its own fp32 network weights, trainable; everything else is shared. adapters, what --lora says (common/lora.py): only these are its
        own, on this model's weights. A twin of a model with adapters has its own adapters on the same weights."""
        if self.sharding:
            return self.sharding.copy(self)
        if self.lora:
            twin = self.with_network(lora.copy_network(self.net, self.base).requires_grad_(True))
        elif adapters:
            net, base = lora.add_adapters(self.net, adapters)
            twin = self.with_network(net.requires_grad_(True))
            twin.lora, twin.base = {k: adapters[k] for k in ("rank", "alpha", "targets")}, base
        else:
            twin = self.with_network(copy.deepcopy(self.net).float().requires_grad_(True))
        twin.extras = copy.deepcopy(self.extras).float().requires_grad_(True)
        return twin

    def unsharded(self):
        """The model itself; with --shard, by all processes, one with all weights on the host of rank 0."""
        return self.sharding.unsharded(self) if self.sharding else self

    def with_network(self, net):
        """The same model around another network of its class; everything else is shared."""
        twin = copy.copy(self)
        twin.__dict__.update(
            {
                k: v.copy()
                for k, v in vars(self).items()
                if k.startswith("_") and isinstance(v, dict)
            }
        )  # hooks, parameters: its own
        twin.net, twin.extras = net, nn.ModuleDict()
        return twin

    def resized(self, changes, seed=0):
        """A model like this one with a fresh network of another size. changes: ["KEY=VALUE", ...] to its configuration, values as in JSON."""
        twin, config, flag = (
            (self.skeleton or self).copy(),
            dict(self.net_config()),
            f"--small {' '.join(changes)}",
        )
        for key, _, value in (change.partition("=") for change in changes):
            if key not in config:
                raise UserError(
                    f"{flag}: {key}: expected a key of the network's config.json{did_you_mean(key, config)}"
                )
            try:
                config[key] = json.loads(value)
            except ValueError:
                config[key] = value  # a word
        torch.manual_seed(seed)  # equal on all processes
        try:
            twin.net = self.network(config).to(self.device)
            fits = twin.expected_shape()
        except (
            Exception
        ) as e:  # diffusers and torch raise many kinds for a configuration that cannot be built
            raise UserError(
                f"{flag}: no network can be built: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
            ) from None
        if fits != (self.shape, self.classes):
            raise UserError(
                f"{flag}: expected a network for samples {list(self.shape)} of {self.classes} classes, found one for {list(fits[0])} of {fits[1]}"
            )
        return self.sharding(twin) if self.sharding else twin

    def checkpoint_activations(self):
        """--grad-checkpoint: recompute activations in backward."""
        if not hasattr(self.net, "enable_gradient_checkpointing"):
            raise UserError(
                f"--grad-checkpoint: expected a network of diffusers, found {type(self.net).__name__}, which does not offer it"
            )

        def recompute(block, *args):
            extra = (
                self.extra
            )  # a later call of the network will have another one by the time of the backward

            def run(*args):
                with (
                    self.attention(),
                    self.extended(None, extra) if extra is not None else contextlib.nullcontext(),
                ):
                    return block(*args)

            return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

        self.net.enable_gradient_checkpointing(recompute)

    def config(self):
        return (
            dict(
                adapter=self.adapter,
                schedule=self.schedule.config,
                prediction=self.prediction,
                shape=list(self.shape),
                classes=self.classes,
                sigma_data=self.sigma_data,
            )
            | (dict(extras=list(self.extras)) if self.extras else {})
            | (dict(lora=lora.config(self)) if self.lora else {})
        )

    def save(self, folder, info, name="distill.json"):
        """Diffusers folder (config.json, *.safetensors; with adapters a LoRA file) plus `name`: what inference needs beside the weights. The JSON is written last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_net(folder)
        write_json(folder / name, dict(info, model=self.config()))

    def save_net(self, folder):
        if not self.lora:
            write_json(
                folder / "config.json", dict(self.net_config(), _class_name=type(self.net).__name__)
            )
        own = {lora.FILE: lora.tensors(self)} if self.lora else {WEIGHTS: self.net.state_dict()}
        for name, tensors in (
            own | ({EXTRAS: self.extras.state_dict()} if self.extras else {})
        ).items():
            save_weights(folder / name, tensors)

    def net_config(self):
        return {
            k: v
            for k, v in self.net.config.items()
            if not k.startswith("_") or k == "_diffusers_version"
        }

    def to_pictures(self, x):
        """Pictures of samples for a grid: here one image per sample."""
        return self.decode(x)


def layers_at(layers, depths):
    """The layers at these shares of the depth; a shallow network has fewer of them."""
    return list(dict.fromkeys(layers[int(d * len(layers))] for d in depths))


def load_extras(folder, info, model):
    """What a student has beside its network's weights, if the folder's `info` says so: numbers it is told, conditions that `extend` added."""
    for name in model.settings:
        if name in info:
            if (
                isinstance(info[name], bool)
                or not isinstance(info[name], (int, float))
                or not 0 <= info[name] < math.inf
            ):
                raise UserError(f"{folder}: {name}: expected a number >= 0, found {info[name]!r}")
            setattr(model, name, info[name])
    if names := info.get("extras"):
        if not isinstance(names, list) or not all(
            isinstance(n, str) and n.isidentifier() for n in names
        ):
            raise UserError(f"{folder}: extras: expected a list of names, found {names!r}")
        load_weights(Path(folder) / EXTRAS, model.extend(*names).extras)
