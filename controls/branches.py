"""Branches: trainable networks that feed a condition into a frozen generator (ControlNet and kin).

A branch reads the condition and adds to activations of the frozen network through layers that start
at zero, so at first the output equals the generator's, bit for bit. Branches attach to the network
by forward hooks, so they work inside the sampler of any method. Gradients flow through the frozen
network to the branch.
"""

import contextlib
import copy
import functools
import json
import math

import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError
from common.files import WEIGHTS, load_weights

# ---- parts ---------------------------------------------------------------------------------------


def zero(module):
    """Sets all parameters to zero. -> module"""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def trainable_copy(module):
    return copy.deepcopy(module).float().requires_grad_(True)


def make_hint(control, width, scale=1, patch=1):
    """Network that embeds the condition. Labels -> [B, width]; a map -> [B, width, H, W] in the
    size of the latent, divided by `patch`.
    """
    if control.classes:
        return nn.Embedding(control.classes, width)
    c = 16
    layers = [nn.Conv2d(control.channels, c, 3, padding=1), nn.SiLU()]
    for _ in range(round(math.log2(scale))):  # halve from pixels down to latents
        wider = min(2 * c, width)
        layers += [nn.Conv2d(c, wider, 3, stride=2, padding=1), nn.SiLU()]
        c = wider
    layers += [nn.Conv2d(c, width, patch, stride=patch)]
    return nn.Sequential(*layers)


@contextlib.contextmanager
def hooked(handles):
    """Removes the hooks at the end of the `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Branch(nn.Module):
    """Base class of all branches, made as cls(net, control, scale).

    net: the frozen network. control: a `Control`. scale: pixels per latent, along one side.
    """

    copies = ""  # for an error message: why there is no choice of blocks

    def attached(self, net, c):
        """Context manager: inside of it `net` is evaluated with the conditions c [B, ...]."""
        raise NotImplementedError

    def checkpoint_activations(self):
        """--grad-checkpoint. Hooks are gone when the backward pass runs a block again."""
        raise UserError(
            "--grad-checkpoint: expected a generator of class UNet2DConditionModel and a --control "
            "that is a picture: only its ControlNet can do it"
        )

    def files(self):
        """As Model.files."""
        return {WEIGHTS: self.state_dict()}

    def load(self, folder):
        load_weights(folder / WEIGHTS, self)


# ---- branches ------------------------------------------------------------------------------------


class TransformerBranch(Branch):
    """Copies of the last blocks of a transformer, run on tokens of their own: the frozen network's
    tokens plus the hint. Each copy adds to its block's output through a zero linear layer.

    ControlNet copies the first blocks instead. In the last ones the tokens already represent what
    the generator is about to make, which has to be compared with the condition (docs/nct.md, 4).
    """

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        total = len(net.transformer_blocks)
        blocks = (total + 1) // 2 if blocks is None else blocks
        if not 1 <= blocks <= total:
            raise UserError(
                f"--blocks {blocks}: expected a number from 1 to {total}, the generator's blocks"
            )
        self.first = total - blocks
        self.blocks = trainable_copy(net.transformer_blocks[self.first :])
        for name, p in self.blocks[-1].named_parameters():
            # joint attention: nothing reads the text tokens of the last block
            if "to_add_out" in name or "ff_context" in name:
                p.requires_grad_(False)
        width = net.config.num_attention_heads * net.config.attention_head_dim
        self.hint = make_hint(control, width, scale, net.config.patch_size)
        self.outs = nn.ModuleList(zero(nn.Linear(width, width)) for _ in self.blocks)

    def attached(self, net, c):
        hint = self.hint(c)
        # one token for a label, else a token for each patch
        hint = hint[:, None] if hint.ndim == 2 else hint.flatten(2).transpose(1, 2)
        state = dict(hint=hint)
        handles = [
            block.register_forward_hook(
                functools.partial(self.after_block, i, state), with_kwargs=True
            )
            for i, block in enumerate(net.transformer_blocks[self.first :])
        ]
        return hooked(handles)

    def after_block(self, i, state, block, args, kwargs, out):
        """Forward hook of a frozen block: runs copy i on the same inputs but its own tokens."""
        joint = isinstance(out, tuple)  # joint attention: (text tokens, image tokens)
        if i == 0:
            tokens = args[0] if args else kwargs["hidden_states"]
            state["tokens"] = tokens + state["hint"]
        if args:
            args = (state["tokens"], *args[1:])
        else:
            kwargs = kwargs | dict(hidden_states=state["tokens"])
        if joint and i > 0:
            kwargs = kwargs | dict(encoder_hidden_states=state["text"])

        new = self.blocks[i](*args, **kwargs)
        state["text"], state["tokens"] = new if joint else (None, new)
        added = self.outs[i](state["tokens"])
        return (out[0], out[1] + added) if joint else out + added


class UNetBranch(Branch):
    """ControlNet for `UNet2DModel`, which has none in diffusers: copies of the down blocks and the
    middle block, and a zero 1x1 convolution for each skip connection and the middle.
    """

    copies = "whose down blocks are all copied"

    def __init__(self, net, control, scale):
        super().__init__()
        if net.mid_block is None:
            raise UserError(
                "--generator: expected a UNet2DModel with a middle block, found one without"
            )
        levels = net.config.block_out_channels
        widths = [levels[0]]  # channels of the skips: of conv_in, then of each level
        for i, width in enumerate(levels):
            has_downsampler = i < len(levels) - 1
            widths += [width] * (net.config.layers_per_block + has_downsampler)
        self.down = trainable_copy(net.down_blocks)
        self.mid = trainable_copy(net.mid_block)
        # a map is added to the activations of conv_in, a label to the time embedding
        self.hint = make_hint(control, 4 * levels[0] if control.classes else levels[0], scale)
        self.outs = nn.ModuleList(zero(nn.Conv2d(w, w, 1)) for w in [*widths, widths[-1]])

    def attached(self, net, c):
        hint = self.hint(c)
        h = temb = skip_sample = None  # inputs of the next copy; skip_sample: of "Skip" blocks only
        skips = []  # outputs of the copies
        residuals = []  # to be added to the frozen network's skips, taken from the end

        def after_down(i, block, args, kwargs, out):
            nonlocal h, temb, skip_sample
            if i == 0:
                h, temb = kwargs["hidden_states"], kwargs["temb"]
                if hint.ndim == 4:
                    h = h + hint
                else:
                    temb = temb + hint
                skip_sample = kwargs.get("skip_sample")
                skips.append(h)
            copied = self.down[i]
            more = dict(skip_sample=skip_sample) if hasattr(copied, "skip_conv") else {}
            h, outputs, *rest = copied(hidden_states=h, temb=temb, **more)
            if rest:
                skip_sample = rest[0]
            skips.extend(outputs)

        def after_mid(block, args, out):
            residuals.extend(layer(s) for layer, s in zip(self.outs[:-1], skips, strict=True))
            return out + self.outs[-1](self.mid(h, temb))

        def before_up(block, args):
            x, frozen_skips, *rest = args
            n = len(block.resnets)
            added = residuals[-n:]
            del residuals[-n:]
            return (x, tuple(a + b for a, b in zip(frozen_skips, added, strict=True)), *rest)

        handles = [
            block.register_forward_hook(functools.partial(after_down, i), with_kwargs=True)
            for i, block in enumerate(net.down_blocks)
        ]
        handles.append(net.mid_block.register_forward_hook(after_mid))
        handles += [block.register_forward_pre_hook(before_up) for block in net.up_blocks]
        return hooked(handles)


class ControlNet(Branch):
    """diffusers' ControlNet, for `UNet2DConditionModel`: Stable Diffusion and SDXL."""

    copies = "whose ControlNet copies all down blocks"
    SHARED = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")  # inputs of both

    def __init__(self, net, control, scale):
        super().__init__()
        if control.classes:
            raise UserError(
                "--control class: not for UNet2DConditionModel; its ControlNet reads pictures"
            )
        from diffusers import ControlNetModel

        widths = (16, 32, 96, 256, 256, 256)  # each after the first halves the picture
        self.net = ControlNetModel.from_unet(
            net,
            conditioning_embedding_out_channels=widths[: 1 + round(math.log2(scale))],
            conditioning_channels=control.channels,
        ).float()

    def attached(self, net, c):
        def before(module, args, kwargs):
            shared = {k: kwargs[k] for k in self.SHARED if k in kwargs}
            shared.setdefault("encoder_hidden_states", None)
            down, mid = self.net(*args, controlnet_cond=c, return_dict=False, **shared)
            residuals = dict(
                down_block_additional_residuals=down, mid_block_additional_residual=mid
            )
            return args, kwargs | residuals

        return hooked([net.register_forward_pre_hook(before, with_kwargs=True)])

    def checkpoint_activations(self):
        self.net.enable_gradient_checkpointing()

    def files(self):
        config = json.loads(self.net.to_json_string())  # as diffusers writes it
        return {"config.json": config, WEIGHTS: self.net.state_dict()}

    def load(self, folder):
        load_weights(folder / WEIGHTS, self.net)


class MLPBranch(Branch):
    """For the toy's MLP: a copy of the hidden layers; each adds to its layer's activations."""

    copies = "whose hidden layers are all copied"

    def __init__(self, net, control, scale):
        super().__init__()
        width = net.config["width"]
        self.hidden = trainable_copy(nn.ModuleList([net.inp, *net.hidden]))
        self.hint = make_hint(control, width)
        self.outs = nn.ModuleList(zero(nn.Linear(width, width)) for _ in self.hidden)

    def attached(self, net, c):
        h = None  # activations of the copies

        def after_inp(layer, args, out):
            nonlocal h
            unlabelled = net.label.weight[-1]
            h = F.silu(self.hidden[0](args[0]) + unlabelled + self.hint(c))

        def before(i, layer, args):
            nonlocal h
            added = self.outs[i](h)
            if i < len(net.hidden):
                h = F.silu(self.hidden[i + 1](h))
            return (args[0] + added,)

        handles = [net.inp.register_forward_hook(after_inp)]
        for i, layer in enumerate([*net.hidden, net.out]):
            handles.append(layer.register_forward_pre_hook(functools.partial(before, i)))
        return hooked(handles)
