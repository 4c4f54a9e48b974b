"""What text-to-video pipelines share as teachers."""

import torch

from common.teachers.pipeline import Pipeline, channel_stats


class Video(Pipeline):
    """Latents [C, F, h, w], F = (frames - 1) / frame_step + 1; videos uint8 [n, 3, frames, H, W].

    A subclass sets `call_defaults`, and `made_for` where its networks are made for another size.
    """

    video = True
    at_once = 1
    call_defaults = None  # (height, width, frames) of pipe(...) without arguments
    frames_argument = "num_frames"  # of pipe(...)

    def __init__(self, net, vae, scheduler, size=None, frames=None):
        # latent_shape needs this before Module.__init__
        frames = self.made_for(net.config)[2] if frames is None else frames
        object.__setattr__(self, "frames", frames)
        super().__init__(net, vae, scheduler, size)

    @classmethod
    def made_for(cls, c):
        """(height, width, frames) without --size and --frames. c: of the network."""
        return cls.call_defaults

    @staticmethod
    def frame_step(c):
        """Frames per latent frame. c: of the VAE."""
        return c.scale_factor_temporal

    @staticmethod
    def scale(c):
        return c.scale_factor_spatial

    def latent_shape(self, c, size):
        height, width = size or self.made_for(c)[:2]
        vae = self.vae.config
        frames = (self.frames - 1) // self.frame_step(vae) + 1
        scale = self.vae_scale
        return self.latent_channels(vae), frames, height // scale, width // scale

    @property
    def image_shape(self):
        return 3, self.frames, self.shape[-2] * self.vae_scale, self.shape[-1] * self.vae_scale

    def latent_stats(self):
        return channel_stats(self.vae, self.shape)

    def call_options(self):
        options = dict(self.unguided)
        height, width, frames = self.call_defaults
        if self.image_shape[-2:] != (height, width):
            options |= dict(zip(("height", "width"), self.image_shape[-2:]))
        if self.frames != frames:
            options[self.frames_argument] = self.frames
        return options

    def to_feature_map(self, h):
        """[B, F h w, D] -> [B, D, F h, w]: the frames one below the other."""
        h = h[0] if isinstance(h, tuple) else h
        width = self.shape[3] // self.patch(self.net.config)
        return h.transpose(1, 2).reshape(len(h), h.shape[2], -1, width)

    def to_pictures(self, x):
        """First, middle and last frame, one below the other."""
        video = self.decode(x)
        shown = dict.fromkeys((0, self.frames // 2, self.frames - 1))  # without repeats
        return torch.cat([video[:, :, i] for i in shown], 2)
