"""Class-conditional transformer on pixels: the teacher mnist."""

import copy

import torch.nn as nn
import torch.utils.checkpoint

from common.errors import UserError
from common.model import Model, layers_at


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
            raise UserError(
                "--shard: a network that is spread over processes cannot be changed; use --time native, or leave --shard out"
            )
        self.dense, self.qk_norm = True, qk_norm
        for attn in [block.attn1 for block in self.net.transformer_blocks] if qk_norm else []:
            attn.norm_q, attn.norm_k = (
                nn.RMSNorm(self.net.config.attention_head_dim, eps=1e-5, device=self.device)
                for _ in range(2)
            )
        return self

    def fit_time(self, steps=1000, n=128):
        """After `adapt`: the embedders of time, fitted to what they were at 1000 times the time. Fast waves, which they cannot follow, are lost. -> self"""
        generator = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.rand(*shape, generator=generator).to(self.device)
        for embed in self.time_embedders()[0]:
            new, old = (
                embed.timestep_embedder,
                copy.deepcopy(embed.timestep_embedder).requires_grad_(False),
            )
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
        return self.net(
            x,
            timestep=t if self.dense else t * 1000,
            class_labels=cond["labels"],
            return_dict=False,
        )[0]

    def config(self):
        return super().config() | (
            dict(adapted=["dense"] + ["qk_norm"] * self.qk_norm) if self.dense else {}
        )

    def expected_shape(self):
        c = self.net.config
        return (c.in_channels, c.sample_size, c.sample_size), c.num_embeds_ada_norm

    def time_embedders(self):
        return [block.norm1.emb for block in self.net.transformer_blocks], self.net.inner_dim

    def feature_layers(
        self, depths=(0.5,)
    ):  # one: the block in the middle, since the deeper ones turn towards the output
        return layers_at(self.net.transformer_blocks, depths)

    def to_feature_map(self, h):
        side = int(h.shape[1] ** 0.5)
        return h.transpose(1, 2).reshape(len(h), -1, side, side)

    def encode(self, labels):
        return dict(labels=torch.as_tensor(labels, device=self.device))

    def null(self, n):
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def decode(self, x):
        return (
            (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)
        )  # EDM's rule: -1, 0, 1 -> 0, 128, 255

    def encode_images(self, images):
        return images.float() / 127.5 - 1
