"""Teachers, students and critics: one class, `Model`, around a network of diffusers (an MLP for the toy).

`model(x_t, alpha, sigma, cond)` is the clean-sample estimate x0 for any (alpha, sigma); see common/schedules.py, "the equal-SNR view". An adapter,
i.e. a subclass, says how one architecture is called: `predict`, `encode`, `null`, `decode`, `encode_images`, `sites`.
Only safetensors and JSON are read; nothing that a file contains is executed.
"""
import contextlib
import copy
import inspect
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import lora, schedules
from common.run import ROOT, UserError, atomic, near, read_json, write_json
from common.schedules import equal_snr, expand, to_x0
from common.toy import MLP, Mixture


WEIGHTS, EXTRAS = "diffusion_pytorch_model.safetensors", "extras.safetensors"  # the network as diffusers writes it; what `extend` added


class Stop(Exception):
    """Raised by a hook to end a forward pass after the last layer that is needed."""


class Scalar(nn.Module):
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

    def __init__(self, net, schedule, prediction, shape, classes=0, sigma_data=0.5):
        super().__init__()
        schedules.native_weight(prediction, 1.0, 1.0)  # ValueError if the prediction is unknown
        self.net, self.schedule, self.prediction, self.shape, self.classes, self.sigma_data = net, schedule, prediction, tuple(shape), classes, sigma_data
        self.dtype, self.folder, self.evaluation, self.extras, self.extra = torch.float32, None, {}, nn.ModuleDict(), None
        self.lora, self.base = None, []  # of a network with adapters: rank, alpha, targets; the weights that are not its own
        self.sharding, self.proto = None, None  # --shard (common/shard.py): what spreads modules over the processes; this model as it was, without weights

    # -- what an adapter defines

    def predict(self, x, t, cond):
        """The network's own output for its own input x [B, *shape] and time t [B] on its own schedule (float32; float64 if x is). cond: dict of tensors [B, ...]."""
        raise NotImplementedError

    def sites(self, depths=(0.5,)):
        """Modules whose outputs serve as features, in the order in which the network runs them; depths: rising shares of the network, from 0 to below 1."""
        raise NotImplementedError

    def embedders(self):
        """(modules whose output [B, width] carries the time into the network, width): what `extend` adds to."""
        raise NotImplementedError

    def hidden(self, h):
        """Output of a site as a map [B, C, H, W] (or [B, C])."""
        return h

    def encode(self, labels):
        """Labels (int64 tensor or list, [n]) or prompts (list of str) -> cond: dict of tensors [n, ...] on the model's device."""
        raise NotImplementedError

    def null(self, n):
        """cond of n unconditional samples."""
        raise NotImplementedError

    def emptied(self, cond, empty):
        """cond of n samples, the unconditional one where `empty` [n] is true."""
        null = self.null(len(empty))
        return {k: torch.where(empty.view(-1, *[1] * (v.ndim - 1)), null[k], v) if k in null else v for k, v in cond.items()}

    def fits(self):
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
    def device(self):
        return next(self.parameters()).device

    def forward(self, x_t, alpha, sigma, cond, features=False):
        """x0 estimate [B, *shape] in the dtype of x_t, for x_t = alpha x0 + sigma eps of any schedule; alpha, sigma: 0-d or [B].
        features=True: instead the list of hidden states at `sites()`, float32, and the network runs no further than the last site; a tuple: at those depths."""
        t, alpha_n, sigma_n, scale = equal_snr(self.schedule, alpha, sigma)
        x = (x_t.double() * expand(scale, x_t)).to(x_t.dtype)  # scale is exactly 1 in the network's own schedule
        t = t.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16, cache_enabled=self.sharding is None)
        with autocast, self.attention(), self.extended(cond):
            if features:
                return self.run_to_sites(x, t, cond, *[features] * (features is not True))
            out = self.predict(x, t, cond)
        return to_x0(self.prediction, out, x, alpha_n, sigma_n, self.sigma_data).to(x_t.dtype)  # float64 inside: eps / alpha amplifies rounding

    x0 = forward

    def rehearsal(self, x, cond):
        """A pass on x [n, *shape], for what it costs; cond: of one sample."""
        given = {k: v.expand(len(x), *v.shape[1:]) for k, v in cond.items()} | {name: torch.zeros(len(x), device=x.device) for name in self.extras}
        return self(x, 0.5, 0.5, given)

    def attention(self):
        """Which attention torch takes. On CPUs the backward of its fused one needs longer in bf16 than all the rest of a network; forwards it is the faster one."""
        plain = self.dtype == torch.bfloat16 and self.device.type == "cpu" and torch.is_grad_enabled()
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()

    def run_to_sites(self, x, t, cond, depths=(0.5,)):
        found, sites = [], self.sites(depths)

        def hook(module, args, out):
            found.append(self.hidden(out).float())
            if len(found) == len(sites):
                raise Stop

        handles = [site.register_forward_hook(hook) for site in sites]
        try:
            self.predict(x, t, cond)
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def extend(self, *names):
        """New scalar conditions, a second time or a guidance scale: given as cond[name], [B] numbers of order one (or [B, 2]: Scalar), from then on.
        They are added to the time embedding, by zero at first, so the network starts as it was. -> self"""
        for name in names:
            embed = Scalar(self.embedders()[1]).to(self.device)
            self.extras[name] = self.sharding(embed) if self.sharding else embed
        return self

    @contextlib.contextmanager
    def extended(self, cond, extra=None):
        if not self.extras:
            yield
            return
        outer, self.extra = self.extra, sum(embed(cond[name]) for name, embed in self.extras.items()) if extra is None else extra
        add = lambda module, args, out: out + self.extra.to(out.dtype)
        handles = [module.register_forward_hook(add) for module in self.embedders()[0]] if outer is None else []
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
        c, u = self.pair(x_t, alpha, sigma, cond)
        return u + w * (c - u)

    def pair(self, x_t, alpha, sigma, cond):
        """x0 estimates with the condition and with the null condition, in one pass of twice the batch."""
        null = self.null(len(x_t))
        both = {k: torch.cat([cond[k], null.get(k, cond[k])]) for k in cond}  # conditions of `extend` are the same in both halves
        alpha, sigma = (torch.cat([a, a]) if torch.is_tensor(a) and a.ndim else a for a in (alpha, sigma))
        return self(torch.cat([x_t, x_t]), alpha, sigma, both).chunk(2)

    def weight(self, alpha, sigma):
        """lambda [same shape as sigma] that turns a squared x0 error at (alpha, sigma) into the loss this network was trained with."""
        _, alpha_n, sigma_n, _ = equal_snr(self.schedule, alpha, sigma)
        return schedules.native_weight(self.prediction, alpha_n, sigma_n, self.sigma_data)

    def copy(self, adapters=None):
        """A twin with its own fp32 network weights, trainable; everything else is shared. adapters, what --lora says (common/lora.py): only these are its
        own, on this model's weights. A twin of a model with adapters has its own adapters on the same weights."""
        if self.sharding:
            return self.sharding.copy(self)
        if self.lora:
            twin = self.around(lora.twin(self.net, self.base).requires_grad_(True))
        elif adapters:
            net, base = lora.attach(self.net, adapters)
            twin = self.around(net.requires_grad_(True))
            twin.lora, twin.base = {k: adapters[k] for k in ("rank", "alpha", "targets")}, base
        else:
            twin = self.around(copy.deepcopy(self.net).float().requires_grad_(True))
        twin.extras = copy.deepcopy(self.extras).float().requires_grad_(True)
        return twin

    def whole(self):
        """The model itself; with --shard, by all processes, one with all weights on the host of rank 0."""
        return self.sharding.whole(self) if self.sharding else self

    def around(self, net):
        """The same model around another network of its class; everything else is shared."""
        twin = copy.copy(self)
        twin.__dict__.update({k: v.copy() for k, v in vars(self).items() if k.startswith("_") and isinstance(v, dict)})  # hooks, parameters: its own
        twin.net, twin.extras = net, nn.ModuleDict()
        return twin

    def resized(self, changes, seed=0):
        """A model like this one with a fresh network of another size. changes: ["KEY=VALUE", ...] to its configuration, values as in JSON."""
        twin, config, flag = (self.proto or self).copy(), dict(self.net_config()), f"--small {' '.join(changes)}"
        for key, _, value in (change.partition("=") for change in changes):
            if key not in config:
                raise UserError(f"{flag}: {key}: expected a key of the network's config.json{near(key, config)}")
            try:
                config[key] = json.loads(value)
            except ValueError:
                config[key] = value  # a word
        torch.manual_seed(seed)  # equal on all processes
        try:
            twin.net = self.network(config).to(self.device)
            fits = twin.fits()
        except Exception as e:  # diffusers and torch raise many kinds for a configuration that cannot be built
            raise UserError(f"{flag}: no network can be built: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
        if fits != (self.shape, self.classes):
            raise UserError(f"{flag}: expected a network for samples {list(self.shape)} of {self.classes} classes, found one for {list(fits[0])} of {fits[1]}")
        return self.sharding(twin) if self.sharding else twin

    def checkpoint_activations(self):
        """--grad-checkpoint: recompute activations in backward."""
        if not hasattr(self.net, "enable_gradient_checkpointing"):
            raise UserError(f"--grad-checkpoint: expected a network of diffusers, found {type(self.net).__name__}, which does not offer it")

        def recompute(block, *args):
            extra = self.extra  # a later call of the network will have another one by the time of the backward

            def run(*args):
                with self.attention(), self.extended(None, extra) if extra is not None else contextlib.nullcontext():
                    return block(*args)

            return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

        self.net.enable_gradient_checkpointing(recompute)

    def config(self):
        return dict(adapter=self.adapter, schedule=self.schedule.config, prediction=self.prediction, shape=list(self.shape), classes=self.classes,
                    sigma_data=self.sigma_data) | (dict(extras=list(self.extras)) if self.extras else {}) | (dict(lora=lora.config(self)) if self.lora else {})

    def save(self, folder, info, name="distill.json"):
        """Diffusers folder (config.json, *.safetensors; with adapters a LoRA file) plus `name`: what inference needs beside the weights. The JSON is written last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_net(folder)
        write_json(folder / name, dict(info, model=self.config()))

    def save_net(self, folder):
        if not self.lora:
            write_json(folder / "config.json", dict(self.net_config(), _class_name=type(self.net).__name__))
        own = {lora.FILE: lora.tensors(self)} if self.lora else {WEIGHTS: self.net.state_dict()}
        for name, tensors in (own | ({EXTRAS: self.extras.state_dict()} if self.extras else {})).items():
            save_weights(folder / name, tensors)

    def net_config(self):
        return {k: v for k, v in self.net.config.items() if not k.startswith("_") or k == "_diffusers_version"}

    def rows(self, x):
        """Pictures of samples for a grid: here one image per sample."""
        return self.decode(x)


def pick(layers, depths):
    """The layers at these shares of the depth; a shallow network has fewer of them."""
    return list(dict.fromkeys(layers[int(d * len(layers))] for d in depths))


class DiT(Model):
    """Class-conditional transformer of diffusers (`DiTTransformer2DModel`): pixels in [-1, 1], times in [0, 1] shown to the network as 0..1000."""

    adapter = "dit"

    @staticmethod
    def network(config):
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
        # eval() for good: in train mode diffusers would drop labels at random inside the network, also in a frozen teacher
        return DiTTransformer2DModel.from_config(config).eval()

    def train(self, mode=True):
        return super().train(False)

    dense, qk_norm = False, False

    def adapt(self, qk_norm=False):
        """Makes derivatives along t tame: the network is shown times in [0, 1] from then on (its fastest wave is then 1 rad instead of 1000 over the
        range), and with qk_norm queries and keys have RMS 1 in each head. Changes what the network says: it must be trained afterwards. -> self"""
        if self.sharding:
            raise UserError("--shard: a network that is spread over processes cannot be changed; use --time native, or leave --shard out")
        self.dense, self.qk_norm = True, qk_norm
        for attn in [block.attn1 for block in self.net.transformer_blocks] if qk_norm else []:
            attn.norm_q, attn.norm_k = (nn.RMSNorm(self.net.config.attention_head_dim, eps=1e-5, device=self.device) for _ in range(2))
        return self

    def fit_time(self, steps=1000, n=128):
        """After `adapt`: the embedders of time, fitted to what they were at 1000 times the time. Fast waves, which they cannot follow, are lost. -> self"""
        generator = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.rand(*shape, generator=generator).to(self.device)
        for embed in self.embedders()[0]:
            new, old = embed.timestep_embedder, copy.deepcopy(embed.timestep_embedder).requires_grad_(False)
            for layer in (new.linear_1, new.linear_2):
                layer.weight.data = (rand(*layer.weight.shape) * 2 - 1) / layer.in_features**0.5
                layer.bias.data.zero_()
            new.requires_grad_(True)
            opt = torch.optim.Adam(new.parameters(), lr=3e-3)
            for i in range(steps):
                opt.param_groups[0]["lr"] = 3e-3 * (1 - i / steps)
                t = (torch.arange(n, device=self.device) + rand(n)) / n
                loss = (new(embed.time_proj(t)) - old(embed.time_proj(1000 * t))).square().mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
            opt.zero_grad()
        return self

    def predict(self, x, t, cond):
        return self.net(x, timestep=t if self.dense else t * 1000, class_labels=cond["labels"], return_dict=False)[0]

    def config(self):
        return super().config() | (dict(adapted=["dense"] + ["qk_norm"] * self.qk_norm) if self.dense else {})

    def fits(self):
        c = self.net.config
        return (c.in_channels, c.sample_size, c.sample_size), c.num_embeds_ada_norm

    def embedders(self):
        return [block.norm1.emb for block in self.net.transformer_blocks], self.net.inner_dim

    def sites(self, depths=(0.5,)):  # one: the block in the middle, since the deeper ones turn towards the output
        return pick(self.net.transformer_blocks, depths)

    def hidden(self, h):
        side = int(h.shape[1] ** 0.5)
        return h.transpose(1, 2).reshape(len(h), -1, side, side)

    def encode(self, labels):
        return dict(labels=torch.as_tensor(labels, device=self.device))

    def null(self, n):
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def decode(self, x):
        return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)  # EDM's rule: -1, 0, 1 -> 0, 128, 255

    def encode_images(self, images):
        return images.float() / 127.5 - 1


class Toy(Model):
    """The MLP on 2-D points, EDM preconditioning. As a teacher (`exact`) it answers with the mixture's exact posterior mean, while its copies, the
    students and critics, start from the MLP that was fitted to it (`python -m common.pretrain --data toy`)."""

    adapter = "toy"

    def __init__(self, *args, exact=False, labelled=False, **kw):
        super().__init__(*args, **kw)
        self.mixture, self.exact, self.labelled = Mixture(), exact, labelled

    @staticmethod
    def network(config):
        return MLP(**{k: v for k, v in config.items() if not k.startswith("_")})

    def forward(self, x_t, alpha, sigma, cond, features=False):
        if self.exact and not features:
            return self.mixture.x0(x_t, alpha, sigma, cond["labels"])
        return super().forward(x_t, alpha, sigma, cond, features)

    x0 = forward

    def predict(self, x, t, cond):
        c_in = (t**2 + self.sigma_data**2).rsqrt()
        return self.net((x * c_in[:, None]).to(self.net.inp.weight.dtype), t, cond["labels"])

    def fits(self):
        return (2,), self.net.config["classes"]

    def embedders(self):
        return [self.net.label], self.net.config["width"]

    def sites(self, depths=(0.5,)):
        return pick(self.net.hidden, depths)

    def encode(self, labels):
        labels = torch.as_tensor(labels, device=self.device)
        return dict(labels=labels if self.labelled else torch.full_like(labels, self.classes))

    def null(self, n):
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def copy(self, adapters=None):
        twin = super().copy(dict(adapters, targets=adapters["targets"] or ["inp", "hidden.0", "hidden.1"]) if adapters else None)
        twin.exact = False
        return twin

    def decode(self, x):
        return self.rows(x)

    def encode_images(self, images):
        return images

    def net_config(self):
        return self.net.config

    def config(self):
        return dict(super().config(), labelled=self.labelled)

    def rows(self, x, size=128, extent=1.6):
        """One picture of all points: log-density histogram, uint8 [1, 1, size, size]."""
        ij = ((x.detach().cpu().float() / extent + 1) / 2 * size).floor().long()
        ij = ij[((ij >= 0) & (ij < size)).all(1)]
        count = torch.bincount((size - 1 - ij[:, 1]) * size + ij[:, 0], minlength=size * size).reshape(1, 1, size, size)
        return 255 - (count.float().log1p() / count.float().log1p().max().clamp(min=1e-6) * 255).to(torch.uint8)


class Routed(nn.Module):
    """Several Models as one: every sample goes to the one expert that is responsible for it. What is not said here (schedule, encode, decode, ...) is
    answered by the first expert, so that it can stand wherever a Model does.

    by = "level": table holds falling values of sigma / alpha, one fewer than experts; expert i is for table[i] < sigma / alpha <= table[i-1].
    by = "label": table[label] is the expert of that label; the null label goes to expert 0.
    """

    def __init__(self, experts, by, table):
        super().__init__()
        self.experts, self.by, self.table = nn.ModuleList(experts), by, list(table)
        self.folder = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("experts")[0], name)

    def __setattr__(self, name, value):
        if name == "dtype":
            for expert in self.experts:
                expert.dtype = value
        else:
            super().__setattr__(name, value)

    def route(self, n, alpha, sigma, cond):
        """Expert of each of n samples: int64 [n]."""
        if self.by == "label":
            return torch.tensor([*self.table, 0], device=cond["labels"].device)[cond["labels"]]
        ratio = torch.as_tensor(sigma, dtype=torch.float64) / torch.as_tensor(alpha, dtype=torch.float64)
        return sum(((ratio <= b).long() for b in self.table), torch.zeros_like(ratio, dtype=torch.int64)).expand(n)

    def forward(self, x_t, alpha, sigma, cond, features=False):
        which = self.route(len(x_t), alpha, sigma, cond)
        out, used = None, which.unique().tolist()
        if len(used) == 1 and not (self.sharding and self.by == "label"):
            return self.experts[used[0]](x_t, alpha, sigma, cond, features)
        for i in range(len(self.experts)) if self.sharding else used:
            rows = (which == i).to(x_t.device)
            if i not in used:  # --shard: all processes ask every expert, for nothing if none of their samples is its own
                self.experts[i](x_t[:1], *(torch.as_tensor(a).flatten()[0] for a in (alpha, sigma)), {k: v[:1] for k, v in cond.items()})
                continue
            part = lambda a: a[rows.to(a.device)] if torch.is_tensor(a) and a.ndim else a
            y = self.experts[i](part(x_t), part(alpha), part(sigma), {k: part(v) for k, v in cond.items()}, features)
            y = y if features else [y]
            out = [a.new_zeros(len(x_t), *a.shape[1:]) for a in y] if out is None else out
            out = [a.index_put((rows,), b) for a, b in zip(out, y)]
        return out if features else out[0]

    x0, guided, pair = forward, Model.guided, Model.pair

    def copy(self, adapters=None):
        return Routed([e.copy(adapters) for e in self.experts], self.by, self.table)

    def whole(self):
        return Routed([e.whole() for e in self.experts], self.by, self.table)

    def checkpoint_activations(self):
        for expert in self.experts:
            expert.checkpoint_activations()

    def extend(self, *names):
        for expert in self.experts:
            expert.extend(*names)
        return self

    def config(self):
        return dict(adapter="routed", by=self.by, table=self.table, experts=[e.config() for e in self.experts])

    def save(self, folder, info, name="distill.json"):
        self.save_net(Path(folder))
        write_json(Path(folder) / name, dict(info, model=self.config()))

    def save_net(self, folder):
        for i, expert in enumerate(self.experts):
            (folder / f"expert-{i}").mkdir(parents=True, exist_ok=True)
            expert.save_net(folder / f"expert-{i}")

    def at_level(self, ratio):
        """The expert for sigma / alpha = ratio; of experts by label none is, so all."""
        return self.experts[self.route(1, 1.0, ratio, {})] if self.by == "level" else self


ADAPTERS = {cls.adapter: cls for cls in (DiT, Toy)}
NETWORKS = {"dit": "DiTTransformer2DModel", "toy": "MLP"}
HUB = {  # short names of pipelines on the Hugging Face hub; common/teachers.py
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sana-0.6b": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image",
    "wan2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "dit-xl-256": "facebook/DiT-XL-2-256",
    "dit-xl-512": "facebook/DiT-XL-2-512",
}
EMBEDDED = {"toy": "toy", "toy-cond": "toy", "mnist": "mnist", "emoji": "emoji", "emoji-flow": "emoji-flow"}


def load_model(folder, info, teacher=None):
    """Model from a folder of our own format: config.json, diffusion_pytorch_model.safetensors, and `info`, the dict under "model" of its JSON.
    teacher: of a student; needed for pipelines, whose VAE and prompts are the teacher's.

    UserError, one line, if a file is missing, truncated, not safetensors, of another class, or holds other tensors than the configuration asks for.
    """
    folder = Path(folder)
    if info.get("adapter") == "routed":
        return load_routed(folder, info, teacher)
    if "lora" in info:
        return load_lora(folder, info, teacher)
    if info.get("adapter") == "controlled":
        from common.adapters import load_controlled  # a generator of any method and its control
        return load_controlled(folder, info, teacher)
    if getattr(teacher, "adapter", None) == info.get("adapter") and hasattr(teacher, "load_net"):
        return teacher.load_student(folder, info)
    if info.get("adapter") == "edm":
        import common.teachers_class  # noqa: F401  adds it to ADAPTERS
    if info.get("adapter") not in list(ADAPTERS):  # a list, since the value may be unhashable
        raise UserError(f"{folder}: adapter: expected one of {', '.join(ADAPTERS)}, found {info.get('adapter')!r}")
    config, cls = read_json(folder / "config.json", "teacher file"), ADAPTERS[info["adapter"]]
    if config.get("_class_name") != NETWORKS[cls.adapter]:
        raise UserError(f"{folder / 'config.json'}: _class_name: expected {NETWORKS[cls.adapter]}, found {config.get('_class_name')!r}")
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: expected the weights as safetensors, found no such file")
    try:
        net = cls.network(config)
        schedule = schedules.from_config(info["schedule"])
        model = cls(net, schedule, info["prediction"], info["shape"], int(info["classes"]), sigma_data=float(info["sigma_data"]),
                    **{k: info[k] for k in getattr(cls, "fields", ()) if k in info})
    except Exception as e:  # diffusers and torch raise many kinds for a configuration that cannot be built
        raise UserError(f"{folder}: configuration not usable: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    for key, p in inspect.signature(type(net).__init__).parameters.items():  # diffusers builds what then fails in its first pass
        if p.annotation in (int, float) and not isinstance(value := config.get(key, p.default), (int, float)):
            raise UserError(f"{folder / 'config.json'}: {key}: expected {p.annotation.__name__}, found {str(value)[:80]!r}")
    if (model.shape, model.classes) != model.fits():
        raise UserError(f"{folder}: shape and classes: expected {model.fits()}, as in config.json, found {(model.shape, model.classes)}")
    if not 0 < model.sigma_data < float("inf"):
        raise UserError(f"{folder}: sigma_data: expected a positive number, found {model.sigma_data}")
    if (adapted := info.get("adapted")) is not None:
        if not hasattr(cls, "adapt") or adapted not in (["dense"], ["dense", "qk_norm"]):
            raise UserError(f"{folder}: adapted: expected none, dense or dense and qk_norm, found {adapted!r}")
        model.adapt("qk_norm" in adapted)
    load_weights(path, net)
    load_extras(folder, info, model)
    model.folder = folder
    if cls is Toy:
        model.labelled = info.get("labelled") is True  # toy and toy-cond share a network
    return model


def load_lora(folder, info, teacher):
    """A student whose weights are its teacher's with adapters."""
    spec, number = info["lora"], lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0
    names = spec.get("targets") if isinstance(spec, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names) or not number(spec.get("rank")):
        raise UserError(f"{folder}: lora: expected rank and targets, found {str(spec)[:80]}")
    if teacher is None:
        raise UserError(f"{folder}: a LoRA: expected its teacher, whose weights it needs, found none")
    kind = lambda c: [c.get(k) for k in ("adapter", "prediction", "adapted")]
    if kind(info) != kind(teacher.config()):
        raise UserError(f"{folder}: a LoRA: expected a teacher of its kind, {kind(info)}, found {kind(teacher.config())}")
    student = teacher.copy(dict(rank=spec["rank"], alpha=spec["rank"], targets=names, seed=0, flag=f"{folder}: lora: rank"))
    load_weights(folder / lora.FILE, student.net, lora.key(student.part))
    load_extras(folder, info, student)
    student.folder = folder
    return student


def save_weights(path, tensors):
    with atomic(path) as f:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, f.name, metadata={"format": "pt"})


def load_weights(path, module, key=lambda name: name):
    """The tensors of a safetensors file into a module, all of them and no others. key: name in the file of the module's tensor `name`."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: expected a safetensors file, found something else or half of one ({str(e).splitlines()[0]})") from None
    expected = {key(k): tuple(v.shape) for k, v in module.state_dict().items()}
    for k, shape in expected.items():
        if k not in tensors:
            raise UserError(f"{path}: tensor {k} is missing")
        if tuple(tensors[k].shape) != shape:
            raise UserError(f"{path}: tensor {k}: expected shape {list(shape)}, found {list(tensors[k].shape)}")
    if extra := sorted(set(tensors) - set(expected)):
        raise UserError(f"{path}: {len(extra)} tensors that the configuration does not know, the first is {extra[0]}")
    module.load_state_dict({k: tensors[key(k)] for k in module.state_dict()})


def load_extras(folder, info, model):
    """What a student has beside its network's weights, if the folder's `info` says so: numbers it is told, conditions that `extend` added."""
    for name in getattr(model, "settings", ()):
        if name in info:
            if isinstance(info[name], bool) or not isinstance(info[name], (int, float)) or not 0 <= info[name] < math.inf:
                raise UserError(f"{folder}: {name}: expected a number >= 0, found {info[name]!r}")
            setattr(model, name, info[name])
    if names := info.get("extras"):
        if not isinstance(names, list) or not all(isinstance(n, str) and n.isidentifier() for n in names):
            raise UserError(f"{folder}: extras: expected a list of names, found {names!r}")
        load_weights(Path(folder) / EXTRAS, model.extend(*names).extras)


def load_routed(folder, info, teacher=None, inner=True):
    """inner: its experts may be such themselves, those of msd and phased_dmd on a teacher of several. teacher: of each expert its own, whose weights a LoRA needs."""
    experts, by, table = info.get("experts"), info.get("by"), info.get("table")
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    if not isinstance(experts, list) or not experts or not all(isinstance(e, dict) and (e.get("adapter") != "routed" or inner) for e in experts):
        raise UserError(f"{folder}: experts: expected a list of models, found {str(experts)[:80]}")
    fine = isinstance(table, list) and all(number(v) for v in table)
    if by == "level":
        fine = fine and len(table) == len(experts) - 1 and table == sorted(table, reverse=True)
    else:
        fine = fine and by == "label" and all(isinstance(v, int) and 0 <= v < len(experts) for v in table)
    if fine:
        part = lambda i: teacher.at_level(table[i - 1] if i else math.inf) if by == "level" and isinstance(teacher, Routed) else teacher  # at its noisy end
        one = lambda i, e: load_routed(folder / f"expert-{i}", e, teacher, False) if e.get("adapter") == "routed" else load_model(folder / f"expert-{i}", e, part(i))
        models = [one(i, e) for i, e in enumerate(experts)]
        fine = by == "level" or len(table) == models[0].classes
    if not fine or any((m.shape, m.classes) != (models[0].shape, models[0].classes) for m in models):
        raise UserError(f"{folder}: expected by and table that route to {len(experts)} experts of one shape, found {by!r}, {str(table)[:80]}")
    model = Routed(models, by, table)
    model.folder = folder
    return model


def stored(folder):
    """Parameters in the safetensors files of a diffusers folder, from the headers alone."""
    index, count = Path(folder) / f"{WEIGHTS}.index.json", 0
    old = Path(folder) / "diffusion_pytorch_model.bin"  # older than safetensors (facebook/DiT): in fp32
    if old.is_file() and not index.is_file() and not (Path(folder) / WEIGHTS).is_file():
        return old.stat().st_size // 4
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else [WEIGHTS]
    for path in [Path(folder) / name for name in names]:
        with safe_open(path, "pt") as f:
            count += sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())
    return count


def inside(name):
    """Is this the name of a file in the folder that holds the JSON which names it? The folder may be somebody else's."""
    return isinstance(name, str) and bool(name) and "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts


def evaluation(path, found):
    """What teacher.json says under "evaluation", checked before anything is trained."""
    from common.metrics import summary

    def prints(row):
        try:
            return bool(summary(dict(row, method=f"teacher w={row['cfg']:g}")))
        except (TypeError, ValueError, KeyError):
            return False

    kinds = dict(protocol=("text", lambda v: isinstance(v, str)), names=("a list of names", lambda v: isinstance(v, list) and v and all(isinstance(n, str) for n in v)),
                 measured=("a list of results", lambda v: isinstance(v, list) and all(map(prints, v))),
                 kinds=("a list of names", lambda v: isinstance(v, list) and v and all(isinstance(n, str) for n in v)),
                 groups=("a number below that of the names for each kind", lambda v: isinstance(v, list) and len(v) == len(found.get("kinds", ())) and all(
                     type(i) is int and 0 <= i < len(found.get("names", ())) for i in v)),
                 stages=("a number from 1 to 5", lambda v: type(v) is int and 1 <= v <= 5),
                 **dict.fromkeys(("classifier", "reference", "images", "labels"), ("a file in this folder", inside)))
    if not isinstance(found, dict):
        raise UserError(f"--teacher {path}: expected an object under \"evaluation\", found {type(found).__name__}")
    for key, value in found.items():
        expected, fine = kinds.get(key, ("", lambda v: True))
        if not fine(value):
            raise UserError(f"--teacher {path}: evaluation.{key}: expected {expected}, found {str(value)[:80]!r}")
    return found


def load_teacher(name, device="cpu", dtype=torch.float32, text=None, budget=lambda **sizes: None, place=None):
    """--teacher NAME or a folder -> frozen Model. `.evaluation` says how its samples are measured (files relative to `.folder`).
    text: for pipelines, arguments of common.teachers.load_pipeline (prompts, cache, size, frames, guidance, say, once, data). budget: told the sizes before anything
    big is loaded. place: puts the model on the device (Run.place)."""
    place = place or (lambda model: model.to(device))
    folder = ROOT / "assets" / EMBEDDED[name] if name in EMBEDDED else Path(name)
    here = os.path.isdir(folder)  # unlike Path.is_dir, False also for a name that no file can have
    if here and (folder / "model_index.json").is_file() or not here and (name in HUB or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)):
        from common.teachers_class import load_pipeline  # diffusers' pipelines take seconds to import
        teacher = load_pipeline(str(folder) if here else name, device, dtype, **(text or {}), budget=budget, place=place)
        if here and (folder / "teacher.json").is_file():
            teacher.evaluation = evaluation(folder / "teacher.json", read_json(folder / "teacher.json", "--teacher").get("evaluation", {}))
        return teacher
    if not here:
        raise UserError(f"--teacher {name}: expected {', '.join([*EMBEDDED, *HUB])}, a hub name or a folder{near(name, [*EMBEDDED, *HUB])}")
    if not (folder / "teacher.json").is_file():
        hint = "it is a student of this project; give its teacher" if (folder / "distill.json").is_file() else "no teacher.json in it"
        raise UserError(f"--teacher {name}: expected a teacher folder (teacher.json, or model_index.json of a diffusers pipeline), found: {hint}")
    if wrong := [k for k in ("prompts", "size", "frames", "guidance") if (text or {}).get(k) is not None]:
        raise UserError(f"--{wrong[0].replace('guidance', 'embedded-guidance')}: expected a teacher that is a pipeline of diffusers, found {name}, whose teacher.json says all")
    info = read_json(folder / "teacher.json", "--teacher")
    if not isinstance(info.get("model"), dict):
        raise UserError(f"--teacher {folder / 'teacher.json'}: expected an object under \"model\", found {type(info.get('model')).__name__}")
    if info["model"].get("adapter") == "sit":
        from common.teachers_class import load_sit
        teacher = load_sit(folder, info["model"], dtype, (text or {}).get("cache"))
    else:
        teacher = load_model(folder, info["model"])
    budget(network=sum(p.numel() for p in teacher.parameters()), width=4)
    teacher.evaluation = evaluation(folder / "teacher.json", info.get("evaluation", {}))
    if teacher.adapter == "toy":
        teacher.exact, teacher.labelled = True, name == "toy-cond"
    teacher.dtype = dtype
    return place(teacher.requires_grad_(False))
