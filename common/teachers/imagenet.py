"""Class-conditional teachers beside mnist: DiT and SiT on the latents of a VAE, EDM on pixels. `load_teacher` of common/models.py comes here.

dit-xl-256, dit-xl-512, or a folder of diffusers' `DiTPipeline`. facebook's own weights are older than safetensors: a .bin is read by diffusers with
    torch.load(weights_only=True).
SiT, with and without REPA: a folder with the checkpoint as it was published, the VAE, and teacher.json. Called sit-xl-256, it finds its preset.
    sit-xl-256/teacher.json   {"model": {"adapter": "sit", "weights": "SiT-XL-2-256x256.pt", "vae": "stabilityai/sd-vae-ft-mse"}}
    weights: .pt or .safetensors, a state dict or one under "ema"; vae: a folder in this one (default "vae") or a name on the hub;
    convention: "sit" or "repa" (default: repa if the checkpoint has projectors), see `SiT`; heads: default by width, those of S, B, L and XL.
    Everything else is in the shapes of the tensors. The student is written in diffusers' format (`SiT`: what its reader must know).
EDM: a folder in our own format, config.json and diffusion_pytorch_model.safetensors of a `UNet2DModel`, and teacher.json
    edm-imagenet64/teacher.json   {"model": {"adapter": "edm", "schedule": {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0}, "prediction": "edm",
                                   "shape": [3, 64, 64], "classes": 1000, "sigma_data": 0.5, "time_scale": 1000}}
    NVIDIA's pickles hold code and are never read. OpenAI's edm_imagenet64_ema.pt (github.com/openai/consistency_models, MIT) is a plain state dict of the
    same kind of network. diffusers' scripts/convert_consistency_to_diffusers.py makes a UNet2DModel of it: call the file cd_imagenet64_edm.pt, since the
    script goes by names, and move the two files of the unet/ that it writes into the folder. (Read in the script; the weights were not at hand here.)
    time_scale: the network is shown time_scale ln(sigma) / 4. OpenAI's sees 1000 of it, NVIDIA's 1 (the default).
    classes: as many as num_class_embeds: no null label, so no guidance. One fewer: the last row is the null label. Weights of a linear layer on one-hot
    labels are the transposed table, and its null, all zeros, is a row of zeros.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from common import schedules
from common.data import check_classes
from common.errors import UserError
from common.files import LOAD_ERRORS, is_local_name
from common.image_folder import class_folders
from common.model import Model, load_extras
from common.teachers.dit import DiT
from common.teachers.latents import load_latents
from common.teachers.pipeline import Pipeline, vp_schedule


class ClassDiT(Pipeline, DiT):
    """DiT on latents: eps on the VP schedule of its pipeline, the learned variance left out. Labels 0..999 take the place of prompts, the null is 1000.
    Guidance moves all channels, as in DiTPipeline; the original code moves the first three of four, for reproducibility of its paper."""

    adapter, pipeline = "dit-latent", "DiTPipeline"
    text, pickles, square = (
        None,
        True,
        True,
    )  # no prompts; .bin weights where there are no safetensors
    network, encode, null = staticmethod(DiT.network), DiT.encode, DiT.null

    def __init__(self, net, vae, scheduler, size=None):
        c, kinds = net.config, dict(epsilon="eps", v_prediction="v", sample="x0", flow="flow")
        super().__init__(
            net, vae, scheduler, size, kinds[scheduler.get("prediction_type", "epsilon")]
        )
        if c.out_channels not in (None, c.in_channels, 2 * c.in_channels):
            raise ValueError(
                f"out_channels: expected {c.in_channels}, or {2 * c.in_channels} with a learned variance, found {c.out_channels}"
            )
        self.classes = c.num_embeds_ada_norm

    def make_schedule(self, scheduler, shape, c):
        return vp_schedule(scheduler)

    @classmethod
    def load_net(cls, folder, dtype, sub=None):
        from diffusers import DiTTransformer2DModel

        where = dict(subfolder=cls.part) if sub is None else {}
        return DiTTransformer2DModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=None if sub is None else True, **where
        )

    def load_student(self, folder, info):
        try:
            student = self.with_network(self.load_net(folder, torch.float32, ""))
        except LOAD_ERRORS as e:
            raise UserError(
                f"{folder}: expected a DiTTransformer2DModel as diffusers saves it: {' '.join(str(e).split())[:200]}"
            ) from None
        if student.expected_shape() != self.expected_shape():
            raise UserError(
                f"{folder}: expected a network for {self.expected_shape()}, samples and classes of the teacher, found {student.expected_shape()}"
            )
        if info.get("adapted") not in (None, ["dense"]):
            raise UserError(f"{folder}: adapted: expected none or dense, found {info['adapted']!r}")
        student.dense = student.dense or info.get("adapted") == ["dense"]
        load_extras(folder, info, student)
        student.folder = Path(folder)
        return student

    def attach(self, folder, table=None, prompts=None):
        self.folder = folder

    def load_image_folder(self, folder, say=print):
        """--data FOLDER -> Images of latents, one subfolder per class."""
        files, labels, names = class_folders(folder)
        check_classes(folder, names, self)
        return load_latents(folder, self, files, labels, names, say)

    def predict(self, x, t, cond):
        return self.call(x, t / self.schedule.T if self.dense else t, cond)

    def call(self, x, t, cond):
        return self.net(x, timestep=t, class_labels=cond["labels"], return_dict=False)[0][
            :, : self.shape[0]
        ]


class SiT(ClassDiT):
    """SiT on latents: a linear flow whose times are shown to the network unscaled, in [0, 1].

    convention "sit":  the network runs from noise at 0 to data at 1 and says data - noise;    flow (common/schedules.py): -net(x, 1 - t)
    convention "repa": from data at 0 to noise at 1, noise - data;                             flow: net(x, t)
    DiTTransformer2DModel represents SiT exactly, with two changes that config.json cannot hold in full: norm_eps 1e-6, and time waves 10000^(-i / 128)
    instead of 10000^(-i / 127) (`network`). Whoever loads the student in plain diffusers makes the second change too. Each block has its own copy of the
    embedders there; as in mnist, they are trained apart (75M more parameters for XL)."""

    adapter, pipeline, dense = "sit", None, True

    def __init__(self, net, vae, convention):
        super().__init__(net, vae, dict(prediction_type="flow"))
        self.convention = convention

    def make_schedule(self, scheduler, shape, c):
        return schedules.Flow()

    @staticmethod
    def network(config):
        return sit_time_waves(DiT.network(config))

    @classmethod
    def load_net(cls, folder, dtype, sub=None):
        return sit_time_waves(super().load_net(folder, dtype, sub))

    def load_student(self, folder, info):
        student = super().load_student(folder, info)
        if info.get("convention") not in ("sit", "repa"):
            raise UserError(
                f"{folder}: convention: expected sit or repa, found {info.get('convention')!r}"
            )
        student.convention = info["convention"]  # its own, whatever this teacher's is
        return student

    def predict(self, x, t, cond):
        return -self.call(x, 1 - t, cond) if self.convention == "sit" else self.call(x, t, cond)

    def config(self):
        return super().config() | dict(convention=self.convention)


def sit_time_waves(net):
    from diffusers.models.embeddings import Timesteps

    for block in net.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return net


HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # SiT-S, B, L, XL


def read_checkpoint(path):
    """State dict of a .safetensors or of a .pt, which may keep it under "ema". Nothing in it is executed."""
    if not Path(path).is_file():
        raise UserError(
            f"{path}: expected the weights of SiT, found no such file (teacher.json: weights)"
        )
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # the training scripts store their flags beside the weights
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or a forbidden file
        raise UserError(
            f"{path}: expected tensors that can be read without running code: {type(e).__name__}: {' '.join(str(e).split())[:120]}"
        ) from None
    state = state.get("ema", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()
    ):
        raise UserError(f'{path}: expected a state dict of SiT, or one under "ema"')
    return dict(state)


def sit_network(path, heads=None):
    """-> DiTTransformer2DModel with the weights of a SiT checkpoint, whether it has REPA's projectors."""
    sit = read_checkpoint(path)
    projectors = [k for k in sit if k.startswith("projectors.")]
    for k in projectors:  # used in training only
        del sit[k]
    early = len({k.split(".")[1] for k in sit if k.startswith("blocks.")})
    for k in [
        k for k in sit if k.startswith("decoder_blocks.")
    ]:  # REPA's first files name the blocks after the projectors anew
        sit[re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + early}", k)] = (
            sit.pop(k)
        )
    try:
        depth = len({k.split(".")[1] for k in sit if k.startswith("blocks.")})
        (width, channels, patch, _), classes = (
            sit["x_embedder.proj.weight"].shape,
            len(sit["y_embedder.embedding_table.weight"]) - 1,
        )
        pos, out = sit.pop("pos_embed"), len(sit["final_layer.linear.weight"]) // patch**2
        heads = heads or HEADS.get(width)
        if heads not in range(1, width + 1) or width % heads:
            raise UserError(
                f"{path}: heads: expected, in teacher.json, the number of attention heads for a width of {width}, found {heads}"
            )
        net = SiT.network(
            dict(
                num_attention_heads=heads,
                attention_head_dim=width // heads,
                in_channels=channels,
                out_channels=out,
                num_layers=depth,
                sample_size=round(pos.shape[1] ** 0.5) * patch,
                patch_size=patch,
                num_embeds_ada_norm=classes,
                norm_eps=1e-6,
            )
        )
        net.load_state_dict(diffusers_names(sit, depth))
        if sit:
            raise UserError(
                f"{path}: {len(sit)} tensors that SiT does not have, the first is {sorted(sit)[0]}"
            )
        if (net.pos_embed.pos_embed - pos).abs().max() > 1e-4:
            raise UserError(
                f"{path}: pos_embed: expected the sines and cosines of SiT, found others"
            )
    except KeyError as e:
        raise UserError(f"{path}: tensor {e.args[0]} of SiT is missing") from None
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as e:
        raise UserError(
            f"{path}: expected the shapes of SiT: {' '.join(str(e).split())[:200]}"
        ) from None
    return net, bool(projectors)


def diffusers_names(sit, depth):
    """The tensors of a SiT under diffusers' names; taken out of `sit`."""
    new, table = {}, sit.pop("y_embedder.embedding_table.weight")
    for kind in ("weight", "bias"):
        take = lambda name: sit.pop(f"{name}.{kind}")
        new |= {
            f"pos_embed.proj.{kind}": take("x_embedder.proj"),
            f"proj_out_1.{kind}": take("final_layer.adaLN_modulation.1"),
            f"proj_out_2.{kind}": take("final_layer.linear"),
        }
        t1, t2 = take("t_embedder.mlp.0"), take("t_embedder.mlp.2")
        for i in range(depth):
            old, block = f"blocks.{i}.", f"transformer_blocks.{i}."
            q, k, v = take(old + "attn.qkv").chunk(3)
            parts = {
                "norm1.emb.timestep_embedder.linear_1": t1,
                "norm1.emb.timestep_embedder.linear_2": t2,
                "norm1.linear": take(old + "adaLN_modulation.1"),
                "attn1.to_q": q,
                "attn1.to_k": k,
                "attn1.to_v": v,
                "attn1.to_out.0": take(old + "attn.proj"),
                "ff.net.0.proj": take(old + "mlp.fc1"),
                "ff.net.2": take(old + "mlp.fc2"),
            }
            new |= {f"{block}{name}.{kind}": v for name, v in parts.items()} | {
                f"{block}norm1.emb.class_embedder.embedding_table.weight": table
            }
    return new


def load_sit(folder, info, dtype=torch.float32, cache=None):
    """Model of a folder whose teacher.json has adapter "sit" (`info`: what it says under "model")."""
    weights, vae, convention, heads = (
        info.get(k) for k in ("weights", "vae", "convention", "heads")
    )
    for name, value, kind in (
        ("weights", weights, str),
        ("vae", vae or "", str),
        ("heads", heads or 0, int),
    ):
        if not isinstance(value, kind):
            raise UserError(
                f"--teacher {folder / 'teacher.json'}: {name}: expected {dict(str='a name', int='a number')[kind.__name__]}, found {value!r}"
            )
    if not is_local_name(weights) or not is_local_name(vae or "vae"):
        raise UserError(
            f"--teacher {folder / 'teacher.json'}: weights, vae: expected names in this folder, found {weights!r}, {vae!r}"
        )
    if convention not in (None, "sit", "repa"):
        raise UserError(
            f"--teacher {folder / 'teacher.json'}: convention: expected sit or repa, found {convention!r}"
        )
    net, repa = sit_network(folder / weights, heads)
    vae = vae or "vae"
    if not (here := folder / vae).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", vae):
        raise UserError(
            f"--teacher {folder}: vae: expected a folder of an AutoencoderKL there or a name on the hub, found {vae!r}"
        )
    from diffusers import AutoencoderKL

    try:
        coder = AutoencoderKL.from_pretrained(
            here if here.is_dir() else vae, torch_dtype=dtype, use_safetensors=True
        )
        model = SiT(
            net.to(dtype),
            coder.eval().requires_grad_(False),
            convention or ("repa" if repa else "sit"),
        )
    except LOAD_ERRORS as e:
        raise UserError(
            f"--teacher {folder}: vae {vae}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        ) from None
    model.folder, model.cache, model.vae_folder = folder, cache, here
    return model


class EDMUNet(Model):
    """UNet2DModel with the preconditioning of EDM: D(x; sigma) = c_skip x + c_out F(c_in x; time_scale ln(sigma) / 4). Pixels in [-1, 1]."""

    adapter, fields = "edm", ("time_scale",)
    decode, encode_images = DiT.decode, DiT.encode_images

    def __init__(self, *args, time_scale=1.0, **kw):
        super().__init__(*args, **kw)
        self.time_scale = float(time_scale)
        if (
            self.schedule.config["name"] != "edm"
            or self.prediction != "edm"
            or not 0 < self.time_scale < float("inf")
        ):
            raise ValueError(
                f"expected schedule edm, prediction edm, time_scale > 0, found {self.schedule.config['name']}, {self.prediction}, {time_scale}"
            )

    @staticmethod
    def network(config):
        from diffusers import UNet2DModel

        if config.get("class_embed_type") is not None or config.get("mid_block_type", "") is None:
            raise ValueError(
                f"class_embed_type: expected null, and a mid_block_type, found {config.get('class_embed_type')}, {config.get('mid_block_type')}"
            )
        return UNet2DModel.from_config(config).eval()

    def predict(self, x, t, cond):
        c_in = (t**2 + self.sigma_data**2).rsqrt()
        labels = cond["labels"] if self.net.config.num_class_embeds else None
        return self.net(
            x * c_in[:, None, None, None].to(x.dtype),
            self.time_scale * t.log() / 4,
            labels,
            return_dict=False,
        )[0]

    def expected_shape(self):
        c, n = self.net.config, self.net.config.num_class_embeds or 0
        return (
            c.in_channels,
            c.sample_size,
            c.sample_size,
        ), self.classes if self.classes == n - 1 else n

    def time_embedders(self):
        return [self.net.time_embedding], self.net.time_embedding.linear_2.out_features

    def feature_layers(self, depths=(0.5,)):  # one, whatever the depths: the bottleneck
        return [self.net.mid_block]

    def encode(self, labels):
        return dict(labels=torch.as_tensor(labels, device=self.device))

    def null(self, n):
        if self.classes and self.net.config.num_class_embeds == self.classes:
            raise UserError(
                "--cfg: expected 1, the plain conditional: this teacher has no null label to guide away from (common/teachers_class.py)"
            )
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def config(self):
        return super().config() | dict(time_scale=self.time_scale)
