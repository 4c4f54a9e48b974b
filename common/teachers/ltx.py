"""LTX-Video: a transformer on 32x32x8 latents of 128 channels, one token each.

Not reproduced, since it is a matter of the solver and not of the network: its scheduler stretches
its table of sigmas to end at 0.1 (shift_terminal). Our grid has only the time shift.
"""

from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.flow import Sana
from common.teachers.video import Video

FRAME_RATE = 25  # of the pipeline's call without arguments; positions in time are in seconds


class LTXVideo(Video):
    """LTX-Video 0.9 and 0.9.1. The VAE of 0.9.1 also takes a time: 0, as in the pipeline."""

    adapter = "ltx-video"
    pipeline = "LTXPipeline"
    most_tokens = dict(tokenizer=128)
    network_class = "LTXVideoTransformer3DModel"
    expected = dict(scheduler=FLOW_SCHEDULER, network=dict(patch_size=[1], patch_size_t=[1]))
    call_defaults = (512, 704, 161)
    passes_sigmas = True
    takes_sigmas = False
    unguided = dict(guidance_scale=1.0)
    time_embedders = Sana.time_embedders
    time_layer = Sana.time_layer

    @staticmethod
    def scale(c):
        return c.spatial_compression_ratio or c.patch_size * 2 ** sum(c.spatio_temporal_scaling)

    @staticmethod
    def frame_step(c):
        return c.temporal_compression_ratio or c.patch_size_t * 2 ** sum(c.spatio_temporal_scaling)

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler, tokens=shape[1] * shape[2] * shape[3])

    @classmethod
    def embed(cls, pipe, prompts):
        text, mask, _, _ = pipe.encode_prompt(
            prompts or [""], do_classifier_free_guidance=False, device=pipe.device
        )
        return dict(text=text, mask=mask)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(128, c.caption_channels), mask=(128,))

    def predict(self, x, t, cond):
        frames, height, width = x.shape[2:]
        seconds = self.frame_step(self.vae.config) / FRAME_RATE
        out = self.net(
            x.flatten(2).transpose(1, 2),
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            timestep=t * 1000,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds, self.vae_scale, self.vae_scale),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (frames, height, width))

    def latent_stats(self):
        mean, std = (v.view(1, -1, 1, 1, 1) for v in (self.vae.latents_mean, self.vae.latents_std))
        return mean, self.vae.config.scaling_factor / std

    def from_vae(self, z):
        time = z.new_zeros(len(z)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(z, time, return_dict=False)[0]
