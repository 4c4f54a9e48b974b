"""What all pipelines of diffusers share as teachers."""

import math
import warnings
from pathlib import Path

import torch

from common import schedules
from common.errors import UserError
from common.files import LOAD_ERRORS, read_json, save_weights
from common.model import EXTRAS, Model, layers_at, load_extras
from common.teachers.latents import load_latents

warnings.filterwarnings(
    "ignore", "`torch_dtype` is deprecated", FutureWarning
)  # diffusers 0.42 calls it dtype, 0.35 knows the old name only


class Pipeline(Model):
    """A network of a diffusers pipeline with its VAE and the table of its prompts. Samples are latents."""

    part, network = "transformer", None  # subfolder and diffusers class of the network
    at_once = 4  # samples that the VAE takes at a time
    since = 0, 35  # version of diffusers
    square = False  # takes no other pictures

    def __init__(self, net, vae, scheduler, size=None, prediction="flow"):
        object.__setattr__(
            self, "vae", vae
        )  # not registered as a module: optimisers, copies and checkpoints do not see it
        shape = self.latent_shape(net.config, size)
        super().__init__(net, self.make_schedule(scheduler, shape, net.config), prediction, shape)

    # -- what can be known from the configuration files alone

    @classmethod
    def networks(cls, index):
        """Subfolders of the networks that this pipeline has. index: of model_index.json."""
        return [cls.part]

    @staticmethod
    def scale(c):
        """Pixels per latent, along one side; c: the VAE's configuration."""
        return 2 ** (
            len(
                c.encoder_block_out_channels
                if hasattr(c, "encoder_block_out_channels")
                else c.block_out_channels
            )
            - 1
        )

    @classmethod
    def patch(cls, c):
        """Latents that the network takes together, along one side; c: its configuration."""
        p = getattr(c, "patch_size", 2)
        return p[-1] if isinstance(p, (list, tuple)) else p

    @classmethod
    def check(cls, name, c, vae, size, frames, guidance):
        """UserError if the flags ask for what this teacher cannot. c, vae: configurations; size: [height, width]."""
        if frames is not None and not cls.video:
            raise UserError(
                f"--frames {frames}: expected a text-to-video teacher, found {cls.pipeline}"
            )
        if frames is not None and (frames < 1 or (frames - 1) % vae.scale_factor_temporal):
            raise UserError(
                f"--frames {frames}: expected a multiple of {vae.scale_factor_temporal}, plus 1, for this teacher"
            )
        if guidance is not None and not getattr(c, "guidance_embeds", False):
            raise UserError(
                f"--embedded-guidance {guidance:g}: expected a teacher that is told its guidance scale, such as FLUX.1-dev, found {name}; --cfg is for all"
            )
        if size is None:
            return
        unit, flag = (
            cls.scale(vae) * cls.patch(c),
            f"--size {'x'.join(map(str, dict.fromkeys(size)))}",
        )
        most = getattr(c, "pos_embed_max_size", None) or math.inf
        if min(size) < 1 or any(n % unit for n in size):
            raise UserError(f"{flag}: expected a multiple of {unit} pixels for this teacher")
        if max(size) > most * unit:
            raise UserError(
                f"{flag}: expected at most {most * unit} pixels along a side for this teacher"
            )
        if cls.square and size[0] != size[1]:
            raise UserError(
                f"{flag}: expected a square, the network of this teacher knows no other pictures"
            )

    # -- loading

    @classmethod
    def text_pipeline(cls, folder, dtype):
        """The pipeline without network and VAE: for `text`."""
        import diffusers

        empty = [
            k for k, v in read_json(Path(folder) / "model_index.json").items() if v == [None, None]
        ]
        without = dict.fromkeys([cls.part, "vae", *cls.without, *empty])
        return getattr(diffusers, cls.pipeline).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, **without
        )

    without = ()  # further components that are not loaded
    pickles = False  # .bin files (weights only, no code) where there are no safetensors

    @classmethod
    def load_net(cls, folder, dtype, sub=None):
        import diffusers

        sub = cls.part if sub is None else sub
        return getattr(diffusers, cls.network).from_pretrained(
            folder, **(dict(subfolder=sub) if sub else {}), torch_dtype=dtype, use_safetensors=True
        )

    def load_student(self, folder, info):
        """A student of this teacher from its folder (`save`)."""
        try:
            student = self.with_network(self.load_net(folder, torch.float32, ""))
        except LOAD_ERRORS as e:
            raise UserError(
                f"{folder}: expected a network {self.network} as diffusers saves it: {' '.join(str(e).split())[:200]}"
            ) from None
        load_extras(folder, info, student)
        student.folder = Path(folder)
        return student

    def assembled(self, folder, index, dtype, nets):
        """This model, or several as one where the pipeline has several networks, `nets`. index: of model_index.json."""
        return self

    def attach(self, folder, table, prompts):
        self.folder, self.table, self.prompts, self.classes = folder, table, prompts, len(prompts)

    # -- conditions

    @classmethod
    def text(cls, pipe, prompts):
        """Prompts (list), or None: the null prompt as this pipeline has it -> dict of tensors [n, ...]."""
        raise NotImplementedError

    def encode(
        self, labels
    ):  # the numbers themselves go along: they tell whose sample it is (Routed)
        return dict(
            self.table.rows(torch.as_tensor(labels).cpu(), self.device),
            labels=torch.as_tensor(labels, device=self.device),
        )

    def null(self, n):
        return self.table.nulls(n, self.device) | dict(
            labels=torch.full((n,), self.classes, device=self.device)
        )

    # -- latents and pixels

    built_for = None  # pixels that the pipeline makes by default, if its network's configuration does not say it

    def latent_shape(self, c, size):
        """size: [height, width] of the picture in pixels, or None for what the network was built for."""
        size = size or self.built_for
        return (
            c.in_channels,
            *((c.sample_size,) * 2 if size is None else (n // self.vae_scale for n in size)),
        )

    @property
    def vae_scale(self):
        return self.scale(self.vae.config)

    @property
    def image_shape(self):
        return 3, self.shape[-2] * self.vae_scale, self.shape[-1] * self.vae_scale

    def latent_stats(self):
        """(shift, scale): latents are (encoder output - shift) * scale."""
        c = self.vae.config
        return getattr(c, "shift_factor", None) or 0.0, c.scaling_factor

    @torch.no_grad()
    def decode(self, x):
        """Latents -> uint8 images [n, 3, H, W], `at_once` at a time."""
        vae = self.vae.to(x.device)
        shift, scale = self.latent_stats()
        images = [
            self.from_vae((part / scale + shift).to(vae.dtype)) for part in x.split(self.at_once)
        ]
        return ((torch.cat(images).float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @torch.no_grad()
    def encode_images(self, images):
        if images.is_floating_point():  # latents already, of the cache (common/data.py)
            return images
        vae = self.vae.to(images.device)
        shift, scale = self.latent_stats()
        out = []
        for part in images.split(self.at_once):
            out.append((self.to_vae(part.to(vae.dtype) / 127.5 - 1).float() - shift) * scale)
        return torch.cat(out)

    def load_image_folder(self, folder, say=print):
        """--data FOLDER -> Images of latents, with the captions as conditions."""
        files, first = self.captioned
        labels = torch.arange(len(files)) + first
        return load_latents(folder, self, files, labels, [], say)

    def from_vae(self, z):
        return self.vae.decode(z, return_dict=False)[0]

    def to_vae(self, y):
        z = self.vae.encode(y, return_dict=False)[0]
        return z if torch.is_tensor(z) else z.mode()  # AutoencoderDC gives the latents themselves

    # -- the network

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.transformer_blocks, depths)

    def to_feature_map(self, h):
        """Output of a block, image tokens [B, h w, D] or a map -> [B, D, h, w]. Blocks of joint attention give (text tokens, image tokens)."""
        h = h[-1] if isinstance(h, tuple) else h
        if h.ndim == 4:
            return h
        height, width = self.shape[-2:]
        side = round((h.shape[1] * height / width) ** 0.5)
        return h.transpose(1, 2).reshape(len(h), -1, side, h.shape[1] // side)

    def save_net(self, folder):
        if self.lora:
            return super().save_net(folder)
        self.net.save_pretrained(folder, safe_serialization=True)
        if self.extras:
            save_weights(Path(folder) / EXTRAS, self.extras.state_dict())

    def config(self):
        return dict(super().config(), image=list(self.image_shape))


def vp_schedule(scheduler):
    if (
        scheduler.get("beta_schedule") not in ("scaled_linear", "linear")
        or scheduler.get("trained_betas")
        or scheduler.get("rescale_betas_zero_snr")
    ):
        raise UserError(
            f"scheduler: expected beta_schedule linear or scaled_linear without rescaling, found {scheduler.get('beta_schedule')!r}"
        )
    return schedules.VP(
        scheduler["num_train_timesteps"],
        scheduler["beta_start"],
        scheduler["beta_end"],
        scheduler["beta_schedule"],
    )


def flow_schedule(scheduler, tokens=None):
    """Flow with the pipeline's time shift. Dynamic shifting: exp(mu), mu linear in the number of image tokens."""
    if scheduler.get("use_dynamic_shifting") and tokens:  # "linear" shifts by mu itself
        a, b = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - a) / (b - a)
        return schedules.Flow(mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))
    return schedules.Flow(float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0))


def channel_stats(vae, shape):
    """(shift, scale) of autoencoders with numbers for each channel; shape: of a sample."""
    side = [1] * (len(shape) - 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(1, -1, *side)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(1, -1, *side)
    return mean, 1 / std
