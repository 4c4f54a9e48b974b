"""A small trainable network beside a frozen generator, which is thereby told of a condition: ControlNet and what corresponds to it elsewhere.

Each branch is a copy of the generator's first layers that reads the condition and adds to the frozen network through layers of zeros: at first the
output is the generator's, bit for bit. Branches see what the network is called with, by hooks, so the generator may be the student of any method, whatever
that method does around its network. Gradients pass through the frozen network to the branch.
"""
import contextlib
import copy
import hashlib
import inspect
import math
from pathlib import Path

import torch
import torch.nn as nn

from common import metrics, models
from common.controls import Control
from common.run import ImageNoise, UserError, read_json, write_json
from common.students import network_of, read_student, sampler_of


# ---- branches ---------------------------------------------------------------------------------------------------------------------------


def zero(layer):
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def hint(control, width, scale=1, patch=1, tokens=False):
    """Network that reads the condition: a class -> [B, width]; a map -> [B, width, H, W] in the sizes of the latent, or [B, T, width]."""
    if control.classes:
        return nn.Embedding(control.classes, width)
    layers, c = [nn.Conv2d(control.channels, 16, 3, padding=1), nn.SiLU()], 16
    for _ in range(round(math.log2(scale))):
        layers += [nn.Conv2d(c, min(2 * c, width), 3, 2, 1), nn.SiLU()]
        c = min(2 * c, width)
    layers += [nn.Conv2d(c, width, patch, patch)]
    return nn.Sequential(*layers, nn.Flatten(2)) if tokens else nn.Sequential(*layers)


def twin(module):
    return copy.deepcopy(module).float().requires_grad_(True)


@contextlib.contextmanager
def hooked(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TransformerBranch(nn.Module):
    """Copies of the last blocks run on their own tokens, hint added; each adds to the output of its model through a linear layer of zeros. The last and not
    the first: there the tokens say what the generator is about to make, which the branch must compare with the condition (docs/nct.md, 4)."""

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        total = len(net.transformer_blocks)
        if not 1 <= (blocks := (total + 1) // 2 if blocks is None else blocks) <= total:
            raise UserError(f"--blocks {blocks}: expected a number from 1 to {total}, the generator's blocks")
        width = net.config.num_attention_heads * net.config.attention_head_dim
        self.first, self.behind = total - blocks, blocks / total  # behind: share of the frozen network that gradients pass through
        self.blocks = twin(net.transformer_blocks[self.first:])
        for name, p in self.blocks[-1].named_parameters():
            p.requires_grad_(not ("to_add_out" in name or "ff_context" in name))  # joint attention: text tokens that nobody reads any more
        self.hint = hint(control, width, scale, net.config.patch_size, tokens=True)
        self.outs = nn.ModuleList(zero(nn.Linear(width, width)) for _ in self.blocks)

    def attached(self, net, c):
        tokens = self.hint(c)
        tokens = tokens[:, None] if tokens.ndim == 2 else tokens.transpose(1, 2)
        now = {}

        def after(i, args, kwargs, out):
            """args, kwargs: of the frozen block i; the copy gets the same, but for its own tokens."""
            joint = isinstance(out, tuple)  # joint attention: (text tokens, image tokens)
            h = now["h"] if i else (args[0] if args else kwargs["hidden_states"]) + tokens
            args, kwargs = ((h, *args[1:]), kwargs) if args else (args, kwargs | dict(hidden_states=h))
            new = self.blocks[i](*args, **(kwargs | dict(encoder_hidden_states=now["text"]) if joint and i else kwargs))
            now["text"], now["h"] = new if joint else (None, new)
            more = self.outs[i](now["h"])
            return (out[0], out[1] + more) if joint else out + more

        hook = lambda i: net.transformer_blocks[self.first + i].register_forward_hook(lambda m, args, kwargs, out: after(i, args, kwargs, out), with_kwargs=True)
        return hooked(*map(hook, range(len(self.blocks))))


class UNetBranch(nn.Module):
    """ControlNet for `UNet2DModel`, which has none in diffusers: copies of the down blocks and the middle, a 1x1 convolution of zeros for each skip."""

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        if blocks is not None:
            raise UserError("--blocks: expected a transformer, found UNet2DModel, whose down blocks are all copied")
        if net.mid_block is None:
            raise UserError("--generator: expected a UNet2DModel with a middle block, found one without")
        c = net.config
        widths = [c.block_out_channels[0]]
        for i, w in enumerate(c.block_out_channels):
            widths += [w] * (c.layers_per_block + (i < len(c.block_out_channels) - 1))
        self.down, self.mid = twin(net.down_blocks), twin(net.mid_block)
        self.hint = hint(control, 4 * widths[0] if control.classes else widths[0], scale)
        self.outs = nn.ModuleList(zero(nn.Conv2d(w, w, 1)) for w in [*widths, widths[-1]])

    def attached(self, net, c):
        extra, skips, now = self.hint(c), [], {}

        def down(i, kwargs):
            if i == 0:
                now["h"] = kwargs["hidden_states"]
                if extra.ndim == 4:
                    now["h"] = now["h"] + extra
                now["temb"] = kwargs["temb"] + extra if extra.ndim == 2 else kwargs["temb"]
                now["skip"] = dict(skip_sample=kwargs["skip_sample"]) if "skip_sample" in kwargs else {}
                skips.append(now["h"])
            new = self.down[i](hidden_states=now["h"], temb=now["temb"], **now["skip"] if hasattr(self.down[i], "skip_conv") else {})
            now["h"] = new[0]
            if len(new) == 3:
                now["skip"] = dict(skip_sample=new[2])
            skips.extend(new[1])

        def mid(module, args, out):
            now["more"] = [layer(s) for layer, s in zip(self.outs[:-1], skips, strict=True)]
            return out + self.outs[-1](self.mid(now["h"], now["temb"]))

        def up(module, args):
            n = len(module.resnets)
            res = tuple(a + b for a, b in zip(args[1], now["more"][-n:], strict=True))
            now["more"] = now["more"][:-n]
            return (args[0], res, *args[2:])

        hook = lambda i: net.down_blocks[i].register_forward_hook(lambda m, args, kwargs, out: down(i, kwargs), with_kwargs=True)
        return hooked(*map(hook, range(len(self.down))), net.mid_block.register_forward_hook(mid), *[b.register_forward_pre_hook(up) for b in net.up_blocks])


class ControlNet(nn.Module):
    """The class of diffusers, for `UNet2DConditionModel`: Stable Diffusion and SDXL."""

    NAMES = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        if control.classes or blocks is not None:
            raise UserError(f"--{'control class' if control.classes else 'blocks'}: not for UNet2DConditionModel; its ControlNet reads pictures and copies all down blocks")
        from diffusers import ControlNetModel
        widths = (16, 32, 96, 256, 256, 256)[:1 + round(math.log2(scale))]  # each after the first halves the picture
        self.net = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=widths, conditioning_channels=control.channels).float()

    def attached(self, net, c):
        def before(module, args, kwargs):
            given = {k: kwargs[k] for k in self.NAMES if k in kwargs} | dict(encoder_hidden_states=kwargs.get("encoder_hidden_states"))
            down, mid = self.net(*args, controlnet_cond=c, return_dict=False, **given)
            return args, kwargs | dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)

        return hooked(net.register_forward_pre_hook(before, with_kwargs=True))


class IPAdapter(nn.Module):
    """The layers of diffusers for a condition that is a vector, in `UNet2DConditionModel`: a few tokens made of it, which every cross-attention reads through
    keys and values of its own, beside the prompt. Values are zero at first; keys those of the text, as the tokens are normed. Attributes are named like the
    tensors of an IP-Adapter's file, where cross-attentions have odd numbers (`key`)."""

    FILE, TOKENS = "ip_adapter.safetensors", 4  # diffusers reads four

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
        from diffusers.models.embeddings import ImageProjection
        found = [name.removesuffix(".processor") for name in getattr(net, "attn_processors", {}) if not name.endswith("attn1.processor")]
        width = getattr(net.config, "cross_attention_dim", None)
        if type(net).__name__ != "UNet2DConditionModel" or not isinstance(width, int) or not found or not all(n.endswith("attn2") for n in found) or net.encoder_hid_proj:
            raise UserError(f"--control image: expected a generator of class UNet2DConditionModel that reads a prompt by cross-attention, found {type(net).__name__}"
                            + (" without, or with other layers there" if type(net).__name__ == "UNet2DConditionModel" else ""))
        if blocks is not None:
            raise UserError("--blocks: expected a transformer, found UNet2DConditionModel, all of whose cross-attentions read the image")
        self.names = found
        self.image_proj = ImageProjection(image_embed_dim=control.embedding, cross_attention_dim=width, num_image_text_embeds=self.TOKENS)
        self.ip_adapter = nn.ModuleDict()
        for i, name in enumerate(found):
            attn = net.get_submodule(name)
            self.ip_adapter[str(2 * i + 1)] = layer = IPAdapterAttnProcessor2_0(attn.to_k.out_features, width, num_tokens=(self.TOKENS,))
            layer.to_k_ip[0].weight.data.copy_(attn.to_k.weight)
            zero(layer.to_v_ip)

    @staticmethod
    def key(name):
        """Name in the file of the tensor `name`."""
        return name.replace("image_embeds", "proj").replace("_ip.0.", "_ip.")

    def attached(self, net, c):
        tokens, attns = [self.image_proj(c)], [net.get_submodule(name) for name in self.names]
        before = [attn.processor for attn in attns]

        def reader(layer):  # a function and no module: the frozen network's own tensors stay as they are
            return lambda attn, h, encoder_hidden_states=None, attention_mask=None, temb=None: layer(attn, h, (encoder_hidden_states, tokens), attention_mask, temb)

        for attn, layer in zip(attns, self.ip_adapter.values(), strict=True):
            attn.processor = reader(layer)

        @contextlib.contextmanager
        def there():
            try:
                yield
            finally:
                for attn, processor in zip(attns, before):
                    attn.processor = processor

        return there()


class MLPBranch(nn.Module):
    """For the toy: a copy of the hidden layers, which adds to each hidden activation."""

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        if blocks is not None:
            raise UserError("--blocks: expected a transformer, found the toy's MLP, whose hidden layers are all copied")
        self.hidden, width = twin(nn.ModuleList([net.inp, *net.hidden])), net.config["width"]
        self.hint = hint(control, width)
        self.outs = nn.ModuleList(zero(nn.Linear(width, width)) for _ in self.hidden)

    def attached(self, net, c):
        now = {}

        def first(module, args, out):
            now["h"] = nn.functional.silu(self.hidden[0](args[0]) + net.label.weight[-1] + self.hint(c))

        def later(i, args):
            more = self.outs[i](now["h"])
            if i < len(net.hidden):
                now["h"] = nn.functional.silu(self.hidden[i + 1](now["h"]))
            return (args[0] + more,)

        readers = [*net.hidden, net.out]
        return hooked(net.inp.register_forward_hook(first), *[m.register_forward_pre_hook(lambda m, args, i=i: later(i, args)) for i, m in enumerate(readers)])


def make_branch(net, control, scale=1, blocks=None):
    kinds = dict(UNet2DConditionModel=ControlNet, UNet2DModel=UNetBranch, MLP=MLPBranch)
    cls = IPAdapter if control.embedding else kinds.get(type(net).__name__, TransformerBranch if hasattr(net, "transformer_blocks") else None)
    if cls is None:
        raise UserError(f"--generator: expected a UNet or transformer of diffusers, found {type(net).__name__}")
    return cls(net, control, scale, blocks).eval()


# ---- the generator with its branch ----------------------------------------------------------------------------------------------------------


class Controlled(nn.Module):
    """A frozen one-step generator f and a branch. `f(z, cond)` is the generator alone, `self(z, c, cond)` with condition c; what is not said here (shape,
    encode, decode, ...) the generator answers. Its weights are no parameters of this module: averages and checkpoints hold the branch only."""

    def __init__(self, generator, info, sample, control, branch, blocks=None):
        super().__init__()
        fn = inspect.unwrap(sample)  # without its no_grad
        own = dict(generator=generator, info=info, run=lambda z, cond: fn(generator, z, cond, 1, None, **info["sampler"]), control=control, blocks=blocks, folder=None)
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
        if not isinstance(self.branch, ControlNet):  # the hooks of the others would be gone when a block runs again
            raise UserError("--grad-checkpoint: expected a generator of class UNet2DConditionModel and a --control that is a picture: only its ControlNet can do it")
        self.branch.net.enable_gradient_checkpointing()
        self.generator.checkpoint_activations()

    def whole(self):
        return self

    def copy(self):
        return Controlled(self.generator, self.info, self.sample, self.control, twin(self.branch), self.blocks)

    def config(self):
        return dict(adapter="controlled", control=self.control.config(), blocks=self.blocks)

    def save(self, folder, info, name="distill.json"):
        """The branch (ControlNet or IP-Adapter as diffusers knows them), in generator/ the generator, and `name` last."""
        folder = Path(folder)
        (folder / "generator").mkdir(parents=True, exist_ok=True)
        self.generator.save(folder / "generator", {k: v for k, v in self.info.items() if k != "model"})
        if isinstance(self.branch, ControlNet):
            self.branch.net.save_pretrained(folder, safe_serialization=True)
        elif isinstance(self.branch, IPAdapter):
            models.save_weights(folder / IPAdapter.FILE, {IPAdapter.key(k): v for k, v in self.branch.state_dict().items()})
        else:
            models.save_weights(folder / models.WEIGHTS, self.branch.state_dict())
        write_json(folder / name, dict(info, model=self.config()))


def load_generator(folder, teacher, name):
    """-> Model, distill.json, `sample` of a finished one-step student of this teacher; of a pipeline's folder: its network, asked once at the noise end."""
    if (Path(folder) / "model_index.json").is_file():
        info = dict(method="dmd2", teacher=name, nfe=1, sampler=dict(steps="999"), cfg=1.0)
        return teacher, info, sampler_of(Path(folder), info)
    home, info = read_student(folder)
    if info["nfe"] != 1 or info["method"] == "nct":
        found = "one that has a control already" if info["method"] == "nct" else f"one of {info['nfe']} steps"
        raise UserError(f"--generator {folder}: expected a student of one step, found {found}")
    sample = sampler_of(home, info)
    generator = network_of(folder, home, info, teacher, name)
    if isinstance(generator, models.Routed):
        if len(generator.experts) > 1:
            raise UserError(f"--generator {folder}: expected one network, found {len(generator.experts)} experts")
        generator = generator.experts[0]
    return generator.to(teacher.device), info, sample


def weights_hash(model):
    """Of all weights of a network in memory."""
    digest = hashlib.sha256()
    for name, v in sorted(model.state_dict().items()):
        digest.update(name.encode() + v.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make(generator, info, sample, control, blocks=None):
    scale = 1 if control.shape is None else control.shape[-1] // generator.shape[-1]
    branch = make_branch(generator.net, control, scale, blocks).to(generator.device)
    return Controlled(generator, info, sample, control, branch, blocks)


def load_controlled(folder, info, teacher=None):
    """What `Controlled.save` wrote. info: "model" of its distill.json."""
    home, own = read_student(folder / "generator")
    generator = models.load_model(home, own["model"], teacher).requires_grad_(False)
    given = info.get("control")
    if not isinstance(given, dict) or not isinstance(given.get("factor"), int) or not isinstance(given.get("name"), str) \
            or not isinstance(given.get("folder") or "", str):
        raise UserError(f"{folder / 'distill.json'}: model.control: expected an object with name and factor, found {given!r}")
    if not (info.get("blocks") is None or isinstance(info["blocks"], int)):
        raise UserError(f"{folder / 'distill.json'}: model.blocks: expected a number or null, found {info['blocks']!r}")
    control = Control(given["name"], generator, teacher, given["factor"], given.get("folder"))
    model = make(generator, own, sampler_of(home, own), control, info.get("blocks"))
    if isinstance(model.branch, ControlNet):
        models.load_weights(folder / models.WEIGHTS, model.branch.net)
    elif isinstance(model.branch, IPAdapter):
        models.load_weights(folder / IPAdapter.FILE, model.branch, IPAdapter.key)
    else:
        models.load_weights(folder / models.WEIGHTS, model.branch)
    model.folder = folder
    return model


# ---- does it obey ---------------------------------------------------------------------------------------------------------------------------

GROUP = 8  # noises under one condition


@torch.no_grad()
def obedience(model, n=1000, seed=0, batch=250):
    """Conditions of samples of the generator, obeyed from other noise -> dict. error: mean distance of the condition and that of the output; chance: the
    same without control; diversity: mean distance of two outputs under one condition, spread: of two samples without control, both RMS over an image."""
    out = {k: [] for k in ("error", "chance", "diversity", "spread")}
    if hasattr(model, "prompts"):  # large pictures
        n, batch = min(n, 256), GROUP
    n = max(GROUP, n // GROUP * GROUP)
    for part in torch.arange(n).split(max(GROUP, batch // GROUP * GROUP)):
        noise = ImageNoise(seed, part.tolist(), model.device)
        first = torch.arange(len(part)) // GROUP * GROUP  # every group has the labels and the condition of its first
        cond = model.encode(part[first] // GROUP % max(model.classes, 1))
        z, other, r = noise(*model.shape), noise(*model.shape), noise(4)
        c = model.condition(other, r, cond)[first.to(model.device)]
        r = torch.special.ndtr(r)[first.to(model.device)]
        for x, error, distance in ((model(z, c, cond), "error", "diversity"), (model.f(z, cond), "chance", "spread")):
            out[error].append(model.control.error(model.control(x, r), c).double())
            group = x.double().flatten(1).view(-1, GROUP, x[0].numel())
            out[distance].append(torch.cdist(group, group).sum((1, 2)) / (GROUP * (GROUP - 1)) / x[0].numel() ** 0.5)
    means = {k: float(torch.cat(v).mean()) for k, v in out.items()}
    return dict(control=model.control.name, **means, ratio=means["error"] / max(means["chance"], 1e-12), n=n, conditions=n // GROUP, seed=seed)


def summary(r):
    """One line for people."""
    what = f"accuracy {1 - r['error']:.4g}, by chance {1 - r['chance']:.4g}" if r["control"] == "class" else f"error {r['error']:.4g}, without control {r['chance']:.4g}"
    return f"control {r['control']}: {what} (ratio {r['ratio']:.3f}); distance of two outputs {r['diversity']:.4g} under one condition, {r['spread']:.4g} without"


@torch.no_grad()
def rows(model, seed=0, n=20):
    """Rows of a picture: the condition, the sample that it is of, what another noise makes of it, and the condition of that."""
    n = 4 if hasattr(model, "prompts") else n
    noise = ImageNoise(seed, range(n), model.device)
    cond = model.encode(torch.arange(n) % max(model.classes, 1))
    z, other, r = noise(*model.shape), noise(*model.shape), torch.special.ndtr(noise(4))
    source = model.f(other, cond)
    c = model.control(source, r)
    x = model(z, c, cond)
    name = model.control.name
    if model.control.classes:
        return [(f"{name}: {c.tolist()}", model.decode(source)), (f"obeyed: {model.control(x, r).tolist()}", model.decode(x)), ("the same noise, free", model.decode(model.f(z, cond)))]
    if model.control.embedding:
        return [("condition: the look of", model.decode(source)), ("output, other noise", model.decode(x)), ("the same noise, free", model.decode(model.f(z, cond)))]
    show = lambda c: model.control.picture(c)
    return [(f"condition, {name}", show(c)), ("its source", model.decode(source)), ("output, other noise", model.decode(x)), (f"{name} of the output", show(model.control(x, r))),
            ("the same noise, free", model.decode(model.f(z, cond)))]
