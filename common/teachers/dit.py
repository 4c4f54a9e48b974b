"""Class-conditional transformer on pixels: the teacher mnist and others by recipes/pretrain.py."""

import copy

import torch
import torch.nn as nn

from common.errors import UserError
from common.model import Model, layers_at


class DiT(Model):
    """`DiTTransformer2DModel` of diffusers: pixels in [-1, 1], labels, times in [0, 1].

    The network sees the times as 0..1000, or as they are after `adapt`.
    """

    adapter = "dit"
    network_class = "DiTTransformer2DModel"
    dense = False  # the network sees times in [0, 1]
    qk_norm = False  # queries and keys are normalised

    @staticmethod
    def network(config):
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        return DiTTransformer2DModel.from_config(config).eval()

    def train(self, mode=True):
        # Always eval: in train mode diffusers drops labels at random inside the network, also in a
        # frozen teacher.
        return super().train(False)

    def predict(self, x, t, cond):
        if not self.dense:
            t = t * 1000
        return self.net(x, timestep=t, class_labels=cond["labels"], return_dict=False)[0]

    def expected_shape(self):
        c = self.net.config
        return (c.in_channels, c.sample_size, c.sample_size), c.num_embeds_ada_norm

    def time_embedders(self):
        return [block.norm1.emb for block in self.net.transformer_blocks], self.net.inner_dim

    def feature_layers(self, depths=(0.5,)):
        # by default the block in the middle: deeper ones turn towards the output
        return layers_at(self.net.transformer_blocks, depths)

    def to_feature_map(self, h):
        side = int(h.shape[1] ** 0.5)
        return h.transpose(1, 2).reshape(len(h), -1, side, side)

    def encode(self, labels):
        return dict(labels=torch.as_tensor(labels).to(self.device, non_blocking=True))

    def null(self, n):
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def decode(self, x):
        # EDM's rule: -1, 0, 1 -> 0, 128, 255
        return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)

    def encode_images(self, images):
        return images.float() / 127.5 - 1

    def config(self):
        config = super().config()
        if self.dense:
            config["adapted"] = ["dense", "qk_norm"] if self.qk_norm else ["dense"]
        return config

    # -- SANA-Sprint's change of a teacher, before it is trained further

    def adapt(self, qk_norm=False):
        """Makes derivatives of the network along t moderate. Returns self.

        The network sees times in [0, 1] from then on: its fastest wave turns by 1 rad over that
        range instead of 1000. qk_norm: queries and keys get RMS 1 in each head. Both change the
        output, so the network must be trained afterwards.
        """
        if self.sharding:
            raise UserError(
                "--shard: a network that is spread over processes cannot be changed; "
                "use --time native, or leave --shard out"
            )
        self.dense = True
        self.qk_norm = qk_norm
        if qk_norm:
            width = self.net.config.attention_head_dim
            for block in self.net.transformer_blocks:
                block.attn1.norm_q = nn.RMSNorm(width, eps=1e-5, device=self.device)
                block.attn1.norm_k = nn.RMSNorm(width, eps=1e-5, device=self.device)
        return self

    def fit_time(self, steps=1000, n=128):
        """After `adapt`: fits each time embedder to its former self at 1000 t. Returns self.

        Waves too fast for it are lost.
        """
        generator = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.rand(*shape, generator=generator).to(self.device)
        for embedder in self.time_embedders()[0]:
            new = embedder.timestep_embedder
            old = copy.deepcopy(new).requires_grad_(False)
            for layer in (new.linear_1, new.linear_2):
                layer.weight.data = (rand(*layer.weight.shape) * 2 - 1) / layer.in_features**0.5
                layer.bias.data.zero_()
            new.requires_grad_(True)
            opt = torch.optim.Adam(new.parameters(), lr=3e-3)
            for i in range(steps):
                opt.param_groups[0]["lr"] = 3e-3 * (1 - i / steps)
                t = (torch.arange(n, device=self.device) + rand(n)) / n
                target = old(embedder.time_proj(1000 * t))
                loss = (new(embedder.time_proj(t)) - target).square().mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
            opt.zero_grad()
        return self
