"""FLUX.2: text to image, on whitened latents of 2 x 2.

Samples are what the pipelines denoise: squares of 2 x 2 latents as channels, shifted and scaled by
the statistics of the autoencoder's batch norm. A sample's pixel is a token of the network.

The pipelines compute the time shift from the number of tokens and of steps. Ours is that of 50
steps, their default, for all numbers of steps: it sets the levels of a training, and a student's
scheduler has the grid that it was trained with.
"""

import torch
import torch.nn.functional as F

from common.model import layers_at
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.pipeline import Pipeline

STEPS = 50  # of the pipelines


class Flux2Klein(Pipeline):
    """FLUX.2-klein base, guided by the empty prompt. The networks without "base" in their names
    are few-step students, which their pipeline does not guide (is_distilled)."""

    adapter = "flux2-klein"
    pipeline = "Flux2KleinPipeline"
    most_tokens = dict(tokenizer=512)
    network_class = "Flux2Transformer2DModel"
    expected = dict(scheduler=FLOW_SCHEDULER, network=dict(guidance_embeds=[False]))
    since = (0, 37)
    built_for = (1024, 1024)
    passes_sigmas = True
    shift_of_steps = True
    unguided = dict(guidance_scale=1.0)

    @staticmethod
    def scale(c):
        return 2 * Pipeline.scale(c)

    @staticmethod
    def latent_channels(c):
        return 4 * c.latent_channels

    def make_schedule(self, scheduler, shape, c):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return flow_schedule(scheduler, mu=compute_empirical_mu(shape[-1] * shape[-2], STEPS))

    @classmethod
    def embed(cls, pipe, prompts):
        text, _ = pipe.encode_prompt(prompts or [""], device=pipe.device)
        return dict(text=text)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.joint_attention_dim))

    def predict(self, x, t, cond):
        h, w = x.shape[-2:]
        text = cond["text"].to(x.dtype)
        pixels = torch.zeros(h, w, 4, device=x.device)  # (unused, row, column, unused)
        pixels[..., 1] = torch.arange(h, device=x.device)[:, None]
        pixels[..., 2] = torch.arange(w, device=x.device)
        words = torch.zeros(text.shape[1], 4, device=x.device)
        words[:, 3] = torch.arange(text.shape[1], device=x.device)
        out = self.net(
            x.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=t,
            guidance=self.guidance_input(x),
            img_ids=pixels.view(-1, 4),
            txt_ids=words,
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (h, w))

    def guidance_input(self, x):
        return None

    def time_embedders(self):
        return [self.net.time_guidance_embed], self.net.inner_dim

    def time_layer(self):
        return self.net.time_guidance_embed.timestep_embedder.linear_2

    def feature_layers(self, depths=(0.5,)):
        blocks = [*self.net.transformer_blocks, *self.net.single_transformer_blocks]
        return layers_at(blocks, depths)

    def to_feature_map(self, h):
        if torch.is_tensor(h):  # of a single block: the text, then the image
            h = h[:, -self.shape[-2] * self.shape[-1] :]
        return super().to_feature_map(h)

    def latent_stats(self):
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1), 1 / std.view(1, -1, 1, 1)

    def from_vae(self, z):
        return super().from_vae(F.pixel_shuffle(z, 2))

    def to_vae(self, images):
        return F.pixel_unshuffle(super().to_vae(images), 2)


class Flux2(Flux2Klein):
    """FLUX.2-dev, distilled from guidance: the scale is an input, as of FLUX.1-dev (see Flux), by
    default 4.0. Its pipeline has no other guidance; here w other than 1 guides on top of it, by the
    empty prompt."""

    adapter = "flux2"
    pipeline = "Flux2Pipeline"
    expected = dict(scheduler=FLOW_SCHEDULER, network=dict(guidance_embeds=[True]))
    since = (0, 36)
    unguided = {}
    settings = ("guidance",)
    guidance = 4.0

    @classmethod
    def text_pipeline(cls, folder, dtype):
        # The folder's processor needs torchvision, for images. Text needs its tokenizer alone.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer", trust_remote_code=False)
        return super().text_pipeline(folder, dtype, tokenizer=tokenizer)

    def guidance_input(self, x):
        return torch.full((len(x),), float(self.guidance), device=x.device)

    def config(self):
        return super().config() | dict(guidance=self.guidance)

    def call_options(self):
        return super().call_options() | dict(guidance_scale=self.guidance)
