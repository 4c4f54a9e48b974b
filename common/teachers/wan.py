"""Wan 2.1 and 2.2: text to video."""

import torch

from common.model import layers_at
from common.routed import ByLevel
from common.teachers.pipeline import Pipeline, channel_stats, flow_schedule


class Wan(Pipeline):
    """Wan text to video: samples are latents [C, F, h, w], F = (frames - 1) / 4 + 1. Videos are uint8 [n, 3, frames, H, W]. Wan 2.2 A14B has an expert for high
    noise and one for low noise: `ByLevel` at boundary_ratio of its pipeline, one w for both."""

    adapter = "wan"
    pipeline = "WanPipeline"
    network = "WanTransformer3DModel"
    video = True
    at_once = 1
    without, since = ("transformer_2",), (0, 37)  # older ones need a further package for text
    built_for = 480, 832

    def __init__(self, net, vae, scheduler, size=None, frames=81):
        object.__setattr__(self, "frames", frames)
        super().__init__(net, vae, scheduler, size)

    def latent_shape(self, c, size):
        channels, h, w = super().latent_shape(c, size)
        return channels, (self.frames - 1) // self.vae.config.scale_factor_temporal + 1, h, w

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def networks(cls, index):
        one = index.get("boundary_ratio") is None or index.get("transformer_2", [None, None]) == [
            None,
            None,
        ]
        return [cls.part] if one else [cls.part, "transformer_2"]

    def assembled(self, folder, index, dtype, nets):
        if len(nets) == 1:
            return self
        s = float(index["boundary_ratio"])
        edge = torch.nextafter(
            torch.tensor(s / (1 - s), dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        )  # the first expert has t = s as well
        model = ByLevel(
            [self, self.with_network(self.load_net(folder, dtype, nets[1]))], [float(edge)]
        )
        model.folder = self.folder
        return model

    @classmethod
    def text(cls, pipe, prompts):
        return dict(
            text=pipe.encode_prompt(
                prompts or [""],
                do_classifier_free_guidance=False,
                max_sequence_length=512,
                device=pipe.device,
            )[0]
        )

    def predict(self, x, t, cond):
        return self.net(
            x, timestep=t * 1000, encoder_hidden_states=cond["text"].to(x.dtype), return_dict=False
        )[0]

    def time_embedders(self):
        return [
            self.net.condition_embedder.time_embedder
        ], self.net.condition_embedder.time_embedder.linear_2.out_features

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.blocks, depths)

    def to_feature_map(self, h):  # [B, F h w, D]: a map of the frames one below the other
        return h.transpose(1, 2).reshape(
            len(h), h.shape[2], -1, self.shape[3] // self.net.config.patch_size[2]
        )

    @staticmethod
    def scale(c):
        return c.scale_factor_spatial

    @property
    def image_shape(self):
        return 3, self.frames, self.shape[-2] * self.vae_scale, self.shape[-1] * self.vae_scale

    def latent_stats(self):
        return channel_stats(self.vae, self.shape)

    def to_pictures(self, x):
        """First, middle and last frame, one below the other."""
        video = self.decode(x)
        return torch.cat(
            [video[:, :, i] for i in dict.fromkeys((0, self.frames // 2, self.frames - 1))], 2
        )
