"""IP-Adapter (arXiv 2308.06721): the branch of an image prompt, --control image."""

import contextlib

import torch.nn as nn

from common.errors import UserError
from common.files import load_weights
from controls.branches import Branch, zero


class IPAdapter(Branch):
    """For a condition that is a vector and a `UNet2DConditionModel`, from diffusers' layers.

    The vector becomes a few tokens, which each cross-attention reads after the prompt, through
    keys and values of their own. Values start at zero, keys as copies of the text's.
    Attributes have the names in an IP-Adapter's file, where cross-attentions have odd numbers.
    """

    copies = "all of whose cross-attentions read the image"
    FILE = "ip_adapter.safetensors"
    TOKENS = 4  # the number in files that diffusers loads

    def __init__(self, net, control, scale):
        super().__init__()
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
        from diffusers.models.embeddings import ImageProjection

        self.names = cross_attentions(net)
        width = net.config.cross_attention_dim
        self.image_proj = ImageProjection(
            image_embed_dim=control.embedding,
            cross_attention_dim=width,
            num_image_text_embeds=self.TOKENS,
        )
        self.ip_adapter = nn.ModuleDict()
        for i, name in enumerate(self.names):
            to_k = net.get_submodule(name).to_k
            layer = IPAdapterAttnProcessor2_0(to_k.out_features, width, num_tokens=(self.TOKENS,))
            layer.to_k_ip[0].weight.data.copy_(to_k.weight)
            zero(layer.to_v_ip)
            self.ip_adapter[str(2 * i + 1)] = layer

    @contextlib.contextmanager
    def attached(self, net, c):
        tokens = [self.image_proj(c)]

        def processor(layer):
            # a function: a module would become part of the frozen network and of its state_dict
            def process(attn, h, encoder_hidden_states=None, attention_mask=None, temb=None):
                return layer(attn, h, (encoder_hidden_states, tokens), attention_mask, temb)

            return process

        attentions = [net.get_submodule(name) for name in self.names]
        before = [attn.processor for attn in attentions]
        for attn, layer in zip(attentions, self.ip_adapter.values(), strict=True):
            attn.processor = processor(layer)
        try:
            yield
        finally:
            for attn, old in zip(attentions, before):
                attn.processor = old

    @staticmethod
    def file_key(name):
        """Name in an IP-Adapter's file of this module's tensor `name`."""
        return name.replace("image_embeds", "proj").replace("_ip.0.", "_ip.")

    def files(self):
        """As Model.files."""
        return {self.FILE: {self.file_key(k): v for k, v in self.state_dict().items()}}

    def load(self, folder):
        load_weights(folder / self.FILE, self, self.file_key)


def cross_attentions(net):
    """Names of the layers of a `UNet2DConditionModel` that read the prompt. UserError for another
    network, or one whose layers an IP-Adapter does not fit.
    """
    kind = type(net).__name__
    found = kind
    if kind == "UNet2DConditionModel":
        names = [name.removesuffix(".processor") for name in net.attn_processors]
        names = [name for name in names if not name.endswith("attn1")]  # attn1: self-attention
        width = net.config.cross_attention_dim
        is_standard = isinstance(width, int) and not net.encoder_hid_proj
        if names and is_standard and all(name.endswith("attn2") for name in names):
            return names
        found = f"{kind} without, or with other layers there"
    raise UserError(
        "--control image: expected a generator of class UNet2DConditionModel that reads a prompt "
        f"by cross-attention, found {found}"
    )
