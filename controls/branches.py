"""Branches: what nct.py puts beside a frozen generator's network.

A small trainable network beside a frozen generator, which is thereby told of a condition: ControlNet and what corresponds to it elsewhere.

Each branch is a copy of the generator's first layers that reads the condition and adds to the frozen network through layers of zeros: at first the
output is the generator's, bit for bit. Branches see what the network is called with, by hooks, so the generator may be the student of any method, whatever
that method does around its network. Gradients pass through the frozen network to the branch.
"""

import contextlib
import copy
import math

import torch.nn as nn

from common.errors import UserError


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
            raise UserError(
                f"--blocks {blocks}: expected a number from 1 to {total}, the generator's blocks"
            )
        width = net.config.num_attention_heads * net.config.attention_head_dim
        self.first, self.behind = (
            total - blocks,
            blocks / total,
        )  # behind: share of the frozen network that gradients pass through
        self.blocks = twin(net.transformer_blocks[self.first :])
        for name, p in self.blocks[-1].named_parameters():
            p.requires_grad_(
                not ("to_add_out" in name or "ff_context" in name)
            )  # joint attention: text tokens that nobody reads any more
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
            args, kwargs = (
                ((h, *args[1:]), kwargs) if args else (args, kwargs | dict(hidden_states=h))
            )
            new = self.blocks[i](
                *args,
                **(kwargs | dict(encoder_hidden_states=now["text"]) if joint and i else kwargs),
            )
            now["text"], now["h"] = new if joint else (None, new)
            more = self.outs[i](now["h"])
            return (out[0], out[1] + more) if joint else out + more

        hook = lambda i: net.transformer_blocks[self.first + i].register_forward_hook(
            lambda m, args, kwargs, out: after(i, args, kwargs, out), with_kwargs=True
        )
        return hooked(*map(hook, range(len(self.blocks))))


class UNetBranch(nn.Module):
    """ControlNet for `UNet2DModel`, which has none in diffusers: copies of the down blocks and the middle, a 1x1 convolution of zeros for each skip."""

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        if blocks is not None:
            raise UserError(
                "--blocks: expected a transformer, found UNet2DModel, whose down blocks are all copied"
            )
        if net.mid_block is None:
            raise UserError(
                "--generator: expected a UNet2DModel with a middle block, found one without"
            )
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
                now["skip"] = (
                    dict(skip_sample=kwargs["skip_sample"]) if "skip_sample" in kwargs else {}
                )
                skips.append(now["h"])
            new = self.down[i](
                hidden_states=now["h"],
                temb=now["temb"],
                **now["skip"] if hasattr(self.down[i], "skip_conv") else {},
            )
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

        hook = lambda i: net.down_blocks[i].register_forward_hook(
            lambda m, args, kwargs, out: down(i, kwargs), with_kwargs=True
        )
        return hooked(
            *map(hook, range(len(self.down))),
            net.mid_block.register_forward_hook(mid),
            *[b.register_forward_pre_hook(up) for b in net.up_blocks],
        )


class ControlNet(nn.Module):
    """The class of diffusers, for `UNet2DConditionModel`: Stable Diffusion and SDXL."""

    NAMES = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")

    def __init__(self, net, control, scale, blocks=None):
        super().__init__()
        if control.classes or blocks is not None:
            raise UserError(
                f"--{'control class' if control.classes else 'blocks'}: not for UNet2DConditionModel; its ControlNet reads pictures and copies all down blocks"
            )
        from diffusers import ControlNetModel

        widths = (16, 32, 96, 256, 256, 256)[
            : 1 + round(math.log2(scale))
        ]  # each after the first halves the picture
        self.net = ControlNetModel.from_unet(
            net, conditioning_embedding_out_channels=widths, conditioning_channels=control.channels
        ).float()

    def attached(self, net, c):
        def before(module, args, kwargs):
            given = {k: kwargs[k] for k in self.NAMES if k in kwargs} | dict(
                encoder_hidden_states=kwargs.get("encoder_hidden_states")
            )
            down, mid = self.net(*args, controlnet_cond=c, return_dict=False, **given)
            return args, kwargs | dict(
                down_block_additional_residuals=down, mid_block_additional_residual=mid
            )

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

        found = [
            name.removesuffix(".processor")
            for name in getattr(net, "attn_processors", {})
            if not name.endswith("attn1.processor")
        ]
        width = getattr(net.config, "cross_attention_dim", None)
        if (
            type(net).__name__ != "UNet2DConditionModel"
            or not isinstance(width, int)
            or not found
            or not all(n.endswith("attn2") for n in found)
            or net.encoder_hid_proj
        ):
            raise UserError(
                f"--control image: expected a generator of class UNet2DConditionModel that reads a prompt by cross-attention, found {type(net).__name__}"
                + (
                    " without, or with other layers there"
                    if type(net).__name__ == "UNet2DConditionModel"
                    else ""
                )
            )
        if blocks is not None:
            raise UserError(
                "--blocks: expected a transformer, found UNet2DConditionModel, all of whose cross-attentions read the image"
            )
        self.names = found
        self.image_proj = ImageProjection(
            image_embed_dim=control.embedding,
            cross_attention_dim=width,
            num_image_text_embeds=self.TOKENS,
        )
        self.ip_adapter = nn.ModuleDict()
        for i, name in enumerate(found):
            attn = net.get_submodule(name)
            self.ip_adapter[str(2 * i + 1)] = layer = IPAdapterAttnProcessor2_0(
                attn.to_k.out_features, width, num_tokens=(self.TOKENS,)
            )
            layer.to_k_ip[0].weight.data.copy_(attn.to_k.weight)
            zero(layer.to_v_ip)

    @staticmethod
    def key(name):
        """Name in the file of the tensor `name`."""
        return name.replace("image_embeds", "proj").replace("_ip.0.", "_ip.")

    def attached(self, net, c):
        tokens, attns = [self.image_proj(c)], [net.get_submodule(name) for name in self.names]
        before = [attn.processor for attn in attns]

        def reader(
            layer,
        ):  # a function and no module: the frozen network's own tensors stay as they are
            return lambda attn, h, encoder_hidden_states=None, attention_mask=None, temb=None: (
                layer(attn, h, (encoder_hidden_states, tokens), attention_mask, temb)
            )

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
            raise UserError(
                "--blocks: expected a transformer, found the toy's MLP, whose hidden layers are all copied"
            )
        self.hidden, width = twin(nn.ModuleList([net.inp, *net.hidden])), net.config["width"]
        self.hint = hint(control, width)
        self.outs = nn.ModuleList(zero(nn.Linear(width, width)) for _ in self.hidden)

    def attached(self, net, c):
        now = {}

        def first(module, args, out):
            now["h"] = nn.functional.silu(
                self.hidden[0](args[0]) + net.label.weight[-1] + self.hint(c)
            )

        def later(i, args):
            more = self.outs[i](now["h"])
            if i < len(net.hidden):
                now["h"] = nn.functional.silu(self.hidden[i + 1](now["h"]))
            return (args[0] + more,)

        readers = [*net.hidden, net.out]
        return hooked(
            net.inp.register_forward_hook(first),
            *[
                m.register_forward_pre_hook(lambda m, args, i=i: later(i, args))
                for i, m in enumerate(readers)
            ],
        )


def make_branch(net, control, scale=1, blocks=None):
    kinds = dict(UNet2DConditionModel=ControlNet, UNet2DModel=UNetBranch, MLP=MLPBranch)
    cls = (
        IPAdapter
        if control.embedding
        else kinds.get(
            type(net).__name__, TransformerBranch if hasattr(net, "transformer_blocks") else None
        )
    )
    if cls is None:
        raise UserError(
            f"--generator: expected a UNet or transformer of diffusers, found {type(net).__name__}"
        )
    return cls(net, control, scale, blocks).eval()
