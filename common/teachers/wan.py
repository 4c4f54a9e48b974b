"""Wan 2.1 and 2.2: text to video.

Not reproduced, since it is a matter of the solver and not of the network: the UniPC scheduler of
Wan's pipeline rounds times down to integers.
"""

import torch

from common.model import layers_at
from common.routed import ByLevel
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.pipeline import Pipeline, channel_stats


class Wan(Pipeline):
    """Wan: latents [C, F, h, w], F = (frames - 1) / 4 + 1; videos uint8 [n, 3, frames, H, W].

    Wan 2.2 A14B has one network for high noise and one for low noise: a ByLevel that changes at the
    pipeline's boundary_ratio, with one w for both.
    """

    adapter = "wan"
    lora_names = "wan"
    pipeline = "WanPipeline"
    most_tokens = dict(tokenizer=512)
    network_class = "WanTransformer3DModel"
    expected = dict(scheduler=dict(FLOW_SCHEDULER, use_dynamic_shifting=[False]))
    without = ("transformer_2",)
    since = (0, 37)  # older versions need a further package for text
    video = True
    at_once = 1
    built_for = (480, 832)
    takes_sigmas = False
    unguided = dict(guidance_scale=1.0)
    second_network = "transformer_2"

    def __init__(self, net, vae, scheduler, size=None, frames=81):
        object.__setattr__(self, "frames", frames)  # latent_shape needs it before Module.__init__
        super().__init__(net, vae, scheduler, size)

    def latent_shape(self, c, size):
        channels, h, w = super().latent_shape(c, size)
        return channels, (self.frames - 1) // self.vae.config.scale_factor_temporal + 1, h, w

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def networks(cls, index):
        absent = [None, None]
        if index.get("boundary_ratio") is None or index.get("transformer_2", absent) == absent:
            return [cls.part]
        return [cls.part, "transformer_2"]

    def call_options(self):
        options = super().call_options()
        if self.frames != 81:  # the pipeline's default
            options["num_frames"] = self.frames
        return options

    def with_experts(self, folder, index, dtype):
        parts = self.networks(index)
        if len(parts) == 1:
            return self
        # The first expert has t >= s, so the change is just below sigma / alpha of t = s.
        s = float(index["boundary_ratio"])
        ratio = torch.tensor(s / (1 - s), dtype=torch.float64)
        boundary = torch.nextafter(ratio, torch.zeros_like(ratio))
        second = self.with_network(self.load_net(folder, dtype, parts[1]))
        second.read_weights = self.weights_of(folder, parts[1])
        model = ByLevel([self, second], [float(boundary)])
        model.folder = self.folder
        return model

    @classmethod
    def embed(cls, pipe, prompts):
        text, _ = pipe.encode_prompt(
            prompts or [""],
            do_classifier_free_guidance=False,
            max_sequence_length=512,
            device=pipe.device,
        )
        return dict(text=text)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.text_dim))

    def predict(self, x, t, cond):
        text = cond["text"].to(x.dtype)
        return self.net(x, timestep=t * 1000, encoder_hidden_states=text, return_dict=False)[0]

    def time_embedders(self):
        embedder = self.net.condition_embedder.time_embedder
        return [embedder], embedder.linear_2.out_features

    def time_layer(self):
        return self.net.condition_embedder.time_embedder.linear_2

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.blocks, depths)

    def to_feature_map(self, h):
        """[B, F h w, D] -> [B, D, F h, w]: the frames one below the other."""
        width = self.shape[3] // self.net.config.patch_size[2]
        return h.transpose(1, 2).reshape(len(h), h.shape[2], -1, width)

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
        shown = dict.fromkeys((0, self.frames // 2, self.frames - 1))  # without repeats
        return torch.cat([video[:, :, i] for i in shown], 2)
