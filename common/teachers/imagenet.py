"""Class-conditional teachers of ImageNet: DiT and SiT on the latents of a VAE, EDM on pixels.

DiT: dit-xl-256, dit-xl-512, or a folder of diffusers' DiTPipeline. facebook's own weights are older
than safetensors: diffusers reads their .bin with torch.load(weights_only=True).

SiT, with and without REPA: a folder with the published checkpoint, the VAE, and

    teacher.json   {"model": {"adapter": "sit", "weights": "SiT-XL-2-256x256.pt",
                              "vae": "stabilityai/sd-vae-ft-mse"}}

    weights      .pt or .safetensors: a state dict, or one under "ema"
    vae          a folder in this one (default "vae"), or a name on the hub
    convention   "sit" or "repa", see `SiT`; default: repa if the checkpoint has REPA's projectors
    heads        attention heads; default: those of SiT-S, B, L or XL, by the width

Everything else follows from the shapes of the tensors. Students are written in diffusers' format
(see `SiT` for reading them elsewhere).

EDM: a folder in our own format, with config.json and diffusion_pytorch_model.safetensors of a
UNet2DModel, and

    teacher.json   {"model": {"adapter": "edm", "prediction": "edm", "sigma_data": 0.5,
                              "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
                              "shape": [3, 64, 64], "classes": 1000, "time_scale": 1000}}

    time_scale   the network's time is time_scale ln(sigma) / 4: 1000 for OpenAI's networks, 1 (the
                 default) for NVIDIA's
    classes      equal to num_class_embeds: no null label, so no guidance. One fewer: the last row
                 is the null label.

NVIDIA's pickles hold code and are never read. OpenAI's edm_imagenet64_ema.pt
(github.com/openai/consistency_models, MIT) is a plain state dict of the same kind of network, and
diffusers' scripts/convert_consistency_to_diffusers.py makes a UNet2DModel of it: name the file
cd_imagenet64_edm.pt, because the script goes by names, and move the two files of its unet/ here.
(Known from reading the script, not tried.) Where a network has a linear layer on one-hot labels,
the embedding table is its transposed weight, and the null label is a row of zeros.
"""

import argparse
import re
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from common import schedules
from common.errors import UserError, describe
from common.files import load_errors, read_json
from common.model import Model
from common.schema import check
from common.teachers.configuration import VP_SCHEDULER, vp_schedule
from common.teachers.dit import DiT
from common.teachers.formats import CONVENTION, SIT
from common.teachers.hub import is_hub_name
from common.teachers.latents import load_latents
from common.teachers.pipeline import Pipeline
from common.teachers.unet import PREDICTIONS
from data.class_folders import class_folders, read_synonyms


class ClassDiT(Pipeline, DiT):
    """DiT on latents. Labels 0..999 take the place of prompts; the null label is 1000.

    As in DiTPipeline, guidance acts on all channels, and the learned variance is not used. (The
    original code guides three of the four channels, to reproduce the numbers of its paper.)
    """

    adapter = "dit-latent"
    pipeline = "DiTPipeline"
    network_class = "DiTTransformer2DModel"
    expected = dict(scheduler=VP_SCHEDULER)
    takes_prompts = False
    square = True
    encode = DiT.encode
    null = DiT.null

    def __init__(self, net, vae, scheduler, size=None, prediction=None):
        prediction = prediction or PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
        super().__init__(net, vae, scheduler, size, prediction)
        self.classes = net.config.num_embeds_ada_norm

    @classmethod
    def output_channels(cls, c):
        return [c.in_channels, 2 * c.in_channels, None]  # with or without a learned variance

    def make_schedule(self, scheduler, shape, c):
        return vp_schedule(scheduler)

    def latent_stats(self):
        return 0.0, self.vae.config.scaling_factor  # shift_factor is not used by this pipeline

    def attach(self, folder, table=None, prompts=None, negative=None):
        self.folder = folder

    def load_student(self, folder, info):
        student = super().load_student(folder, info)
        if student.expected_shape() != self.expected_shape():
            raise UserError(
                f"{folder}: expected a network for {self.expected_shape()}, samples and classes of "
                f"the teacher, found {student.expected_shape()}"
            )
        adapted = info.get("adapted")
        if adapted not in (None, ["dense"]):
            raise UserError(f"{folder}: adapted: expected none or dense, found {adapted!r}")
        student.dense = student.dense or adapted == ["dense"]
        return student

    def load_image_folder(self, folder, say=print):
        """--data FOLDER -> Images of latents, one subfolder per class."""
        notes = Counter()
        files, labels, names = class_folders(folder, self, say, notes)
        return load_latents(folder, self, files, labels, names, say, notes=notes)

    def class_names(self):
        """Names of teacher.json, or those that DiT's pipeline has in model_index.json."""
        path = self.folder / "model_index.json"
        if self.evaluation.get("names") or not path.is_file():
            return super().class_names()
        return read_synonyms(read_json(path).get("id2label"), self.classes, path)

    def predict(self, x, t, cond):
        return self.call(x, t / self.schedule.T if self.dense else t, cond)

    def call(self, x, t, cond):
        out = self.net(x, timestep=t, class_labels=cond["labels"], return_dict=False)[0]
        return out[:, : self.shape[0]]  # without the learned variance


class SiT(ClassDiT):
    """SiT on latents: a linear flow, whose times are given to the network unscaled, in [0, 1].

    convention "sit":  t runs from noise (0) to data (1), output data - noise:  u = -net(x, 1 - t)
    convention "repa": t runs from data (0) to noise (1), output noise - data:  u = net(x, t)

    u: velocity of schedules.Flow. DiTTransformer2DModel represents SiT exactly with norm_eps 1e-6
    and the frequencies 10000^(-i / 128) in the time embedding, instead of 10000^(-i / 127).
    config.json has no entry for the latter: to use a student in plain diffusers, do as
    `sit_time_waves` does. Each block has its own copy of the embedders, which are trained apart, as
    in mnist (75M more parameters for XL).
    """

    adapter = "sit"
    pipeline = None
    dense = True

    def __init__(self, net, vae, convention):
        super().__init__(net, vae, {}, prediction="flow")
        self.convention = convention

    def make_schedule(self, scheduler, shape, c):
        return schedules.Flow()

    @staticmethod
    def network(config):
        return sit_time_waves(DiT.network(config))

    @classmethod
    def load_net(cls, folder, dtype, part=""):
        return sit_time_waves(super().load_net(folder, dtype, part))

    def load_student(self, folder, info):
        student = super().load_student(folder, info)
        check(info, f"{folder}: ", required=dict(convention=CONVENTION))
        student.convention = info["convention"]  # may differ from this teacher's
        return student

    def predict(self, x, t, cond):
        if self.convention == "sit":
            return -self.call(x, 1 - t, cond)
        return self.call(x, t, cond)

    def config(self):
        return super().config() | dict(convention=self.convention)


def sit_time_waves(net):
    """Gives a DiTTransformer2DModel the frequencies of SiT's time embedding -> net."""
    from diffusers.models.embeddings import Timesteps

    for block in net.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return net


# ---- SiT's published checkpoints -----------------------------------------------------------------

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # width -> attention heads of SiT-S, B, L, XL


def load_sit(folder, info, dtype=torch.float32, cache=None):
    """Model of a folder whose teacher.json has the adapter "sit". info: its "model"."""
    check(info, f"--teacher {folder / 'teacher.json'}: ", required=SIT)
    read = partial(sit_network, folder / info["weights"], info.get("heads"))
    net, has_projectors = read()
    vae = info.get("vae") or "vae"
    is_folder = (folder / vae).is_dir()
    if not is_folder and not is_hub_name(vae):
        raise UserError(
            f"--teacher {folder}: vae: expected a folder of an AutoencoderKL there or a name on "
            f"the hub, found {vae!r}"
        )
    from diffusers import AutoencoderKL

    with load_errors(f"--teacher {folder}: vae {vae}: not loaded"):
        autoencoder = AutoencoderKL.from_pretrained(
            folder / vae if is_folder else vae, torch_dtype=dtype, use_safetensors=True
        )
        convention = info.get("convention") or ("repa" if has_projectors else "sit")
        model = SiT(net.to(dtype), autoencoder.eval().requires_grad_(False), convention)
    model.read_weights = lambda: read()[0].state_dict()
    model.folder = folder
    model.cache = cache
    model.vae_folder = folder / vae
    return model


def sit_network(path, heads=None):
    """-> DiTTransformer2DModel with the weights of a SiT checkpoint; had it REPA's projectors?"""
    sit = read_checkpoint(path)
    projectors = [name for name in sit if name.startswith("projectors.")]
    for name in projectors:
        del sit[name]  # used in REPA's training only
    rename_late_blocks(sit)
    try:
        config = sit_config(path, sit, heads)
        positions = sit.pop("pos_embed")
        net = SiT.network(config)
        net.load_state_dict(diffusers_names(sit, config["num_layers"]))
        if (net.pos_embed.pos_embed - positions).abs().max() > 1e-4:
            raise UserError(
                f"{path}: pos_embed: expected the sines and cosines of SiT, found others"
            )
    except KeyError as e:
        raise UserError(f"{path}: tensor {e.args[0]} of SiT is missing") from None
    except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError) as e:
        raise UserError(f"{path}: expected the shapes of SiT: {describe(e)}") from None
    if sit:
        raise UserError(
            f"{path}: {len(sit)} tensors that SiT does not have, the first is {min(sit)}"
        )
    return net, bool(projectors)


def read_checkpoint(path):
    """State dict of a .safetensors or .pt file, or the one under "ema". No code in it is run."""
    if not Path(path).is_file():
        raise UserError(
            f"{path}: expected the weights of SiT, found no such file (teacher.json: weights)"
        )
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # The training scripts store their flags, a Namespace, in the same file.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or a forbidden file
        raise UserError(
            f"{path}: expected tensors that can be read without running code: {describe(e, 120)}"
        ) from None
    if isinstance(state, dict):
        state = state.get("ema", state)
    if not is_state_dict(state):
        raise UserError(f'{path}: expected a state dict of SiT, or one under "ema"')
    return dict(state)


def is_state_dict(state):
    return isinstance(state, dict) and all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()
    )


def rename_late_blocks(sit):
    """REPA's first checkpoints number the blocks behind the projectors anew, as decoder_blocks."""
    early = count_blocks(sit)
    for name in list(sit):
        match = re.fullmatch(r"decoder_blocks\.(\d{1,9})(\..*)", name)
        if match:
            sit[f"blocks.{int(match[1]) + early}{match[2]}"] = sit.pop(name)


def count_blocks(sit):
    return len({name.split(".")[1] for name in sit if name.startswith("blocks.")})


def sit_config(path, sit, heads):
    """Configuration of the DiTTransformer2DModel for the tensors of a SiT checkpoint."""
    width, channels, patch, _ = sit["x_embedder.proj.weight"].shape
    heads = heads or HEADS.get(width)
    if heads not in range(1, width + 1) or width % heads:
        raise UserError(
            f"{path}: heads: expected, in teacher.json, the number of attention heads for a width "
            f"of {width}, found {heads}"
        )
    return dict(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(sit["final_layer.linear.weight"]) // patch**2,
        num_layers=count_blocks(sit),
        sample_size=round(sit["pos_embed"].shape[1] ** 0.5) * patch,
        patch_size=patch,
        num_embeds_ada_norm=len(sit["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
    )


def diffusers_names(sit, depth):
    """State dict of a DiTTransformer2DModel, from the tensors of `sit`, which it removes."""
    new = {}
    labels = sit.pop("y_embedder.embedding_table.weight")
    for kind in ("weight", "bias"):

        def take(name, kind=kind):
            return sit.pop(f"{name}.{kind}")

        new[f"pos_embed.proj.{kind}"] = take("x_embedder.proj")
        new[f"proj_out_1.{kind}"] = take("final_layer.adaLN_modulation.1")
        new[f"proj_out_2.{kind}"] = take("final_layer.linear")
        time_1, time_2 = take("t_embedder.mlp.0"), take("t_embedder.mlp.2")
        for i in range(depth):
            old = f"blocks.{i}."
            q, k, v = take(old + "attn.qkv").chunk(3)
            block = {
                "norm1.emb.timestep_embedder.linear_1": time_1,
                "norm1.emb.timestep_embedder.linear_2": time_2,
                "norm1.linear": take(old + "adaLN_modulation.1"),
                "attn1.to_q": q,
                "attn1.to_k": k,
                "attn1.to_v": v,
                "attn1.to_out.0": take(old + "attn.proj"),
                "ff.net.0.proj": take(old + "mlp.fc1"),
                "ff.net.2": take(old + "mlp.fc2"),
            }
            for name, tensor in block.items():
                new[f"transformer_blocks.{i}.{name}.{kind}"] = tensor
    for i in range(depth):
        new[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = labels
    return new


# ---- EDM -----------------------------------------------------------------------------------------


class EDMUNet(Model):
    """UNet2DModel with EDM's preconditioning (Karras et al. 2022, table 1), on pixels in [-1, 1].

    D(x; sigma) = c_skip x + c_out F(c_in x; time_scale ln(sigma) / 4)
    """

    adapter = "edm"
    network_class = "UNet2DModel"
    fields = ("time_scale",)
    encode = DiT.encode
    decode = DiT.decode
    encode_images = DiT.encode_images

    def __init__(self, *args, time_scale=1.0, **kw):
        super().__init__(*args, **kw)
        self.time_scale = float(time_scale)
        if self.schedule.config["name"] != "edm" or self.prediction != "edm":
            raise ValueError(
                "expected schedule edm, prediction edm, "
                f"found {self.schedule.config['name']}, {self.prediction}"
            )

    @staticmethod
    def network(config):
        from diffusers import UNet2DModel

        embedding, middle = config.get("class_embed_type"), config.get("mid_block_type", "")
        if embedding is not None or middle is None:
            raise ValueError(
                "class_embed_type: expected null, and a mid_block_type, "
                f"found {embedding}, {middle}"
            )
        return UNet2DModel.from_config(config).eval()

    def predict(self, x, t, cond):
        c_in = (t**2 + self.sigma_data**2).rsqrt()
        x = x * c_in[:, None, None, None].to(x.dtype)
        labels = cond["labels"] if self.net.config.num_class_embeds else None
        return self.net(x, self.time_scale * t.log() / 4, labels, return_dict=False)[0]

    def expected_shape(self):
        c = self.net.config
        rows = c.num_class_embeds or 0
        classes = rows - 1 if self.classes == rows - 1 else rows  # with or without a null label
        return (c.in_channels, c.sample_size, c.sample_size), classes

    def time_embedders(self):
        embedder = self.net.time_embedding
        return [embedder], embedder.linear_2.out_features

    def feature_layers(self, depths=(0.5,)):
        return [self.net.mid_block]  # the bottleneck, whatever the depths

    def null(self, n):
        if self.classes and self.net.config.num_class_embeds == self.classes:
            raise UserError(
                "--cfg: expected 1, the plain conditional: this teacher has no null label to guide "
                "away from (common/teachers/imagenet.py)"
            )
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def config(self):
        return super().config() | dict(time_scale=self.time_scale)
