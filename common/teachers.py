"""Text-to-image and text-to-video pipelines of diffusers as teachers: SD 1.x and 2.x, SDXL, SD3 and 3.5, SANA here; FLUX.1, Qwen-Image, Z-Image, Wan in
common/teachers_flow.py. `load_teacher` of common/models.py comes here for a short name
(sdxl), a hub name (owner/name) or a folder with model_index.json; a fine-tune of any of them is its folder.

An adapter is a subclass of `Pipeline`: which schedule, how the network is called, how the pipeline turns text into tensors. Conditions are rows of a table:
condition i is prompt i, so that the scripts draw integers as they do for class labels. The table is computed once, by the pipeline's own text encoders, and
kept on disk (--cache-prompts); the encoders are gone before the network is loaded. Nothing that a folder contains is executed: only pipeline classes named
here, components of diffusers and transformers, safetensors.
"""
import gc
import hashlib
import inspect
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import schedules
from common.data import LONGEST, SHARD, read_captions
from common.models import EXTRAS, HUB, Model, load_extras, pick, stored
from common.run import ROOT, UserError, atomic, near, read_json

warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # diffusers 0.42 calls it dtype, 0.35 knows the old name only
FAULTS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError, SafetensorError)  # what diffusers raises for missing, truncated or foreign files


# ---- prompts ----------------------------------------------------------------------------------------------------------------------------


def read_prompts(path):
    """Lines of a UTF-8 text file, empty ones left out. UserError: not readable, no prompt, a line that is no prompt."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"--prompts {path}: {e.strerror}") from None
    prompts = []
    for i, line in enumerate(lines, 1):
        if len(line) > 4 * LONGEST:
            raise UserError(f"--prompts {path}: line {i}: expected a prompt of at most {LONGEST} characters, found {len(line)} bytes")
        try:
            prompts.append(line.decode().strip())
        except UnicodeDecodeError:
            raise UserError(f"--prompts {path}: line {i}: expected UTF-8 text") from None
    prompts = [p for p in prompts if p]
    if not prompts:
        raise UserError(f"--prompts {path}: expected one prompt per line, found an empty file")
    return prompts


class Table:
    """Embeddings of prompts: parts, a list of dicts of tensors [<= SHARD, ...], memory-mapped files where they come from the cache; null, one row each."""

    def __init__(self, parts, null):
        self.parts, self.null = parts, null

    def rows(self, index, device):
        """index: int64 [n] -> dict of tensors [n, ...]."""
        index = index.tolist()
        return {k: torch.stack([self.parts[i // SHARD][k][i % SHARD] for i in index]).to(device) for k in self.null}

    def append(self, other):
        """Takes the rows of another table in, behind its own -> number of the first of them. Numbers between may have no row."""
        same_length([*self.parts, *other.parts, self.null])
        self.parts += other.parts
        return SHARD * (len(self.parts) - len(other.parts))

    def nulls(self, n, device):
        return {k: v.expand(n, *v.shape[1:]).to(device) for k, v in self.null.items()}


def same_length(parts):
    """Zero-pads the second dimension of every tensor whose length differs between parts (encoders that do not pad to a fixed one)."""
    for k in parts[0]:
        longest = max(p[k].shape[1] if p[k].ndim > 1 else 0 for p in parts)
        for p in parts:
            if p[k].ndim > 1 and p[k].shape[1] < longest:
                p[k] = torch.cat([p[k], p[k].new_zeros(len(p[k]), longest - p[k].shape[1], *p[k].shape[2:])], 1)


def fingerprint(folder):
    """What changes when the text encoders of a local folder do: names, sizes and times of their files."""
    files = sorted(p for p in Path(folder).glob("t*/*") if p.parent.name.startswith(("text_encoder", "tokenizer")))
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@torch.no_grad()
def embed(cls, folder, prompts, device, dtype, cache, say, once):
    """Table of the prompts, from the cache if it has them. `once`: runs a function on rank 0 while the others wait (Run.once)."""
    key = hashlib.sha256(json.dumps([cls.__name__, str(folder), fingerprint(folder), str(dtype), prompts]).encode()).hexdigest()[:16]
    home = Path(cache or ROOT / "out" / "prompts") / f"{Path(str(folder)).name}-{key}"

    def compute():
        if (home / "done.json").is_file():
            say(f"prompts: {len(prompts)} embeddings read from {home}")
            return
        say(f"prompts: encoding {len(prompts)} into {home}")
        try:
            pipe = cls.text_pipeline(folder, dtype).to(device)
        except FAULTS as e:
            raise UserError(f"--teacher {folder}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
        parts = [{k: v.cpu() for k, v in cls.text(pipe, prompts[i:i + 16]).items()} for i in range(0, len(prompts), 16)]
        null = {k: v[:1].cpu() for k, v in cls.text(pipe, None).items()}
        del pipe
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        same_length([*parts, null])
        home.mkdir(parents=True, exist_ok=True)
        whole = {k: torch.cat([p[k] for p in parts]) for k in null}
        for i in range(0, len(prompts), SHARD):
            write(home / f"{i // SHARD:05d}.safetensors", {k: v[i:i + SHARD] for k, v in whole.items()})
        write(home / "null.safetensors", null)
        with atomic(home / "done.json") as f:
            f.write(json.dumps(dict(prompts=len(prompts))).encode())

    try:
        once(compute)
        parts = [load_file(home / f"{i // SHARD:05d}.safetensors") for i in range(0, len(prompts), SHARD)]
        return Table(parts, load_file(home / "null.safetensors"))
    except (OSError, SafetensorError) as e:
        raise UserError(f"--cache-prompts {home}: expected to read and write embeddings there, found: {str(e).splitlines()[0]}; delete it to encode again") from None


def write(path, tensors):
    with atomic(path) as f:
        save_file({k: v.contiguous() for k, v in tensors.items()}, f.name)


# ---- what all pipelines share ---------------------------------------------------------------------------------------------------------------


class Pipeline(Model):
    """A network of a diffusers pipeline with its VAE and the table of its prompts. Samples are latents."""

    part, network = "transformer", None  # subfolder and diffusers class of the network
    video, at_once = False, 4  # samples are videos; how many the VAE takes at a time
    since = 0, 35  # version of diffusers
    square = False  # takes no other pictures
    settings = ()  # what the network is told beside time and text: names of attributes; flags, and kept with a student

    def __init__(self, net, vae, scheduler, size=None, prediction="flow"):
        object.__setattr__(self, "vae", vae)  # not registered as a module: optimisers, copies and checkpoints do not see it
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
        return 2 ** (len(c.encoder_block_out_channels if hasattr(c, "encoder_block_out_channels") else c.block_out_channels) - 1)

    @classmethod
    def patch(cls, c):
        """Latents that the network takes together, along one side; c: its configuration."""
        p = getattr(c, "patch_size", 2)
        return p[-1] if isinstance(p, (list, tuple)) else p

    @classmethod
    def check(cls, name, c, vae, size, frames, guidance):
        """UserError if the flags ask for what this teacher cannot. c, vae: configurations; size: [height, width]."""
        if frames is not None and not cls.video:
            raise UserError(f"--frames {frames}: expected a text-to-video teacher, found {cls.pipeline}")
        if frames is not None and (frames < 1 or (frames - 1) % vae.scale_factor_temporal):
            raise UserError(f"--frames {frames}: expected a multiple of {vae.scale_factor_temporal}, plus 1, for this teacher")
        if guidance is not None and not getattr(c, "guidance_embeds", False):
            raise UserError(f"--embedded-guidance {guidance:g}: expected a teacher that is told its guidance scale, such as FLUX.1-dev, found {name}; --cfg is for all")
        if size is None:
            return
        unit, flag = cls.scale(vae) * cls.patch(c), f"--size {'x'.join(map(str, dict.fromkeys(size)))}"
        most = getattr(c, "pos_embed_max_size", None) or math.inf
        if min(size) < 1 or any(n % unit for n in size):
            raise UserError(f"{flag}: expected a multiple of {unit} pixels for this teacher")
        if max(size) > most * unit:
            raise UserError(f"{flag}: expected at most {most * unit} pixels along a side for this teacher")
        if cls.square and size[0] != size[1]:
            raise UserError(f"{flag}: expected a square, the network of this teacher knows no other pictures")

    # -- loading

    @classmethod
    def text_pipeline(cls, folder, dtype):
        """The pipeline without network and VAE: for `text`."""
        import diffusers
        empty = [k for k, v in read_json(Path(folder) / "model_index.json").items() if v == [None, None]]
        without = dict.fromkeys([cls.part, "vae", *cls.without, *empty])
        return getattr(diffusers, cls.pipeline).from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **without)

    without = ()  # further components that are not loaded
    pickles = False  # .bin files (weights only, no code) where there are no safetensors

    @classmethod
    def load_net(cls, folder, dtype, sub=None):
        import diffusers
        sub = cls.part if sub is None else sub
        return getattr(diffusers, cls.network).from_pretrained(folder, **(dict(subfolder=sub) if sub else {}), torch_dtype=dtype, use_safetensors=True)

    def load_student(self, folder, info):
        """A student of this teacher from its folder (`save`)."""
        try:
            student = self.around(self.load_net(folder, torch.float32, ""))
        except FAULTS as e:
            raise UserError(f"{folder}: expected a network {self.network} as diffusers saves it: {' '.join(str(e).split())[:200]}") from None
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

    def encode(self, labels):  # the numbers themselves go along: they tell whose sample it is (Routed)
        return dict(self.table.rows(torch.as_tensor(labels).cpu(), self.device), labels=torch.as_tensor(labels, device=self.device))

    def null(self, n):
        return self.table.nulls(n, self.device) | dict(labels=torch.full((n,), self.classes, device=self.device))

    # -- latents and pixels

    built_for = None  # pixels that the pipeline makes by default, if its network's configuration does not say it

    def latent_shape(self, c, size):
        """size: [height, width] of the picture in pixels, or None for what the network was built for."""
        size = size or self.built_for
        return (c.in_channels, *((c.sample_size,) * 2 if size is None else (n // self.vae_scale for n in size)))

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
        images = [self.from_vae((part / scale + shift).to(vae.dtype)) for part in x.split(self.at_once)]
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

    def from_vae(self, z):
        return self.vae.decode(z, return_dict=False)[0]

    def to_vae(self, y):
        z = self.vae.encode(y, return_dict=False)[0]
        return z if torch.is_tensor(z) else z.mode()  # AutoencoderDC gives the latents themselves

    # -- the network

    def sites(self, depths=(0.5,)):
        return pick(self.net.transformer_blocks, depths)

    def hidden(self, h):
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
            write(Path(folder) / EXTRAS, {k: v.detach().cpu() for k, v in self.extras.state_dict().items()})

    def config(self):
        return dict(super().config(), image=list(self.image_shape))


def vp(scheduler):
    if scheduler.get("beta_schedule") not in ("scaled_linear", "linear") or scheduler.get("trained_betas") or scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"scheduler: expected beta_schedule linear or scaled_linear without rescaling, found {scheduler.get('beta_schedule')!r}")
    return schedules.VP(scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"])


def flow(scheduler, tokens=None):
    """Flow with the pipeline's time shift. Dynamic shifting: exp(mu), mu linear in the number of image tokens."""
    if scheduler.get("use_dynamic_shifting") and tokens:  # "linear" shifts by mu itself
        a, b = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - a) / (b - a)
        return schedules.Flow(mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))
    return schedules.Flow(float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0))


# ---- UNets: eps or v prediction on the discrete VP schedule --------------------------------------------------------------------------------


class SD15(Pipeline):
    """Stable Diffusion 1.x, 2.x. Null: the empty prompt."""

    adapter, pipeline, part, network = "sd15", "StableDiffusionPipeline", "unet", "UNet2DConditionModel"
    without = ("safety_checker", "feature_extractor", "image_encoder",)

    def __init__(self, net, vae, scheduler, size=None):
        kinds = dict(epsilon="eps", v_prediction="v", sample="x0")
        super().__init__(net, vae, scheduler, size, kinds[scheduler.get("prediction_type", "epsilon")])

    def make_schedule(self, scheduler, shape, c):
        return vp(scheduler)

    @classmethod
    def text(cls, pipe, prompts):
        return dict(text=pipe.encode_prompt(prompts or [""], pipe.device, 1, False)[0])

    def predict(self, x, t, cond):
        return self.net(x, t, encoder_hidden_states=cond["text"].to(x.dtype), return_dict=False)[0]

    def embedders(self):
        return [self.net.time_embedding], self.net.time_embedding.linear_2.out_features

    def sites(self, depths=(0.5,)):  # one, whatever the depths: the bottleneck
        return [self.net.mid_block]


class SDXL(SD15):
    """SDXL: two text encoders, pooled embedding, size and crop as numbers. Null: zeros (force_zeros_for_empty_prompt), as its pipeline has it."""

    adapter, pipeline = "sdxl", "StableDiffusionXLPipeline"
    without = ("feature_extractor", "image_encoder",)

    @classmethod
    def text(cls, pipe, prompts):
        text, null, pooled, null_pooled = pipe.encode_prompt(prompts or [""], device=pipe.device, do_classifier_free_guidance=True)
        return dict(text=text, pooled=pooled) if prompts else dict(text=null, pooled=null_pooled)

    def predict(self, x, t, cond):
        h, w = self.image_shape[1:]
        ids = x.new_tensor([[h, w, 0, 0, h, w]]).expand(len(x), 6)  # original size, crop, target size
        added = dict(text_embeds=cond["pooled"].to(x.dtype), time_ids=ids)
        return self.net(x, t, encoder_hidden_states=cond["text"].to(x.dtype), added_cond_kwargs=added, return_dict=False)[0]


# ---- transformers: flow matching --------------------------------------------------------------------------------------------------------------


class SD3(Pipeline):
    """Stable Diffusion 3 and 3.5. A missing third encoder (T5) is zeros, as in the pipeline."""

    adapter, pipeline, network = "sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    without = ("feature_extractor", "image_encoder",)

    def make_schedule(self, scheduler, shape, c):
        return flow(scheduler, shape[-1] * shape[-2] // c.patch_size**2)

    @classmethod
    def text_pipeline(cls, folder, dtype):
        pipe = super().text_pipeline(folder, dtype)
        config = read_json(Path(folder) / cls.part / "config.json")
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config), dtype=dtype)  # the stand-in of a missing T5 asks for a dimension
        return pipe

    @classmethod
    def text(cls, pipe, prompts):
        prompts = prompts or [""]
        text, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, device=pipe.device, do_classifier_free_guidance=False)
        return dict(text=text, pooled=pooled)

    def predict(self, x, t, cond):
        return self.net(x, encoder_hidden_states=cond["text"].to(x.dtype), pooled_projections=cond["pooled"].to(x.dtype), timestep=t * 1000, return_dict=False)[0]

    def embedders(self):
        return [self.net.time_text_embed], self.net.inner_dim


class Sana(Pipeline):
    """SANA: linear-attention transformer on a 32x autoencoder, Gemma embeddings with a mask. No complex human instruction."""

    adapter, pipeline, network = "sana", "SanaPipeline", "SanaTransformer2DModel"

    def make_schedule(self, scheduler, shape, c):
        return flow(scheduler)

    @classmethod
    def text(cls, pipe, prompts):
        text, mask, _, _ = pipe.encode_prompt(prompts or [""], False, device=pipe.device, complex_human_instruction=None)
        return dict(text=text, mask=mask)

    def predict(self, x, t, cond):
        t = t * 1000 * getattr(self.net.config, "timestep_scale", 1.0)
        out = self.net(x, encoder_hidden_states=cond["text"].to(x.dtype), encoder_attention_mask=cond["mask"], timestep=t, return_dict=False)[0]
        return out[:, :self.shape[0]]  # a learned variance is left out

    def embedders(self):
        c = self.net.config
        return [self.net.time_embed.emb.timestep_embedder], c.num_attention_heads * c.attention_head_dim


from common.teachers_flow import Flux, QwenImage, Wan, ZImage  # noqa: E402  here, since they are subclasses of Pipeline

PIPELINES = {cls.pipeline: cls for cls in (SD15, SDXL, SD3, Sana, Flux, QwenImage, ZImage, Wan)}


# ---- loading ----------------------------------------------------------------------------------------------------------------------------------


def read_index(name, folder):
    """model_index.json, checked: a supported pipeline, components of diffusers and transformers only."""
    index = read_json(Path(folder) / "model_index.json", "--teacher")
    if index.get("_class_name") not in list(PIPELINES):  # a list, since the value may be unhashable
        raise UserError(f"--teacher {name}: expected one of the pipelines {', '.join(PIPELINES)}, found {index.get('_class_name')!r}"
                        f"{near(index.get('_class_name'), PIPELINES)}")
    for part, value in index.items():
        if part.startswith("_") or value == [None, None] or not (isinstance(value, list) or isinstance(value, (str, dict)) and len(value) == 2 and part != "id2label"):
            continue  # diffusers takes anything of length two for a library and a class of it
        library, kind = value if isinstance(value, list) and len(value) == 2 else (None, None)
        # a class of transformers called Auto... looks for code in the folder, and older versions of diffusers run <part>/<library>.py
        code = library == "transformers" and str(kind).startswith("Auto") or (Path(folder) / part / f"{library}.py").exists()
        if library not in ("diffusers", "transformers") or not isinstance(kind, str) or code:
            raise UserError(f"--teacher {name}: {part}: expected a component of diffusers or transformers, found {value}; code of a folder is never run")
    return index


def fetch(name):
    """Folder of a hub name's files (without pickles), downloaded once by huggingface_hub; a local folder is itself."""
    if Path(name).is_dir():
        return str(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    wanted = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*.jinja"] + ["*/*.bin"] * HUB.get(name, name).startswith("facebook/DiT")  # `pickles`
    try:
        return snapshot_download(HUB.get(name, name), allow_patterns=wanted, ignore_patterns=["*.fp16.safetensors", "*/*.fp16-*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise UserError(f"--teacher {name}: not downloaded from the hub ({str(e).splitlines()[0][:200]}); give a local folder") from None


def config_of(kind, folder):
    """The configuration in a folder of diffusers class `kind`, with the defaults of the class where the file, perhaps that of an older version, is silent."""
    given = {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items() if p.default is not p.empty}
    return SimpleNamespace(**given | read_json(Path(folder) / "config.json", "--teacher"))


def load_pipeline(name, device="cpu", dtype=torch.float32, prompts=None, cache=None, size=None, frames=None, guidance=None, say=print, once=lambda fn: fn(),
                  data=None, budget=lambda **sizes: None, place=None):
    """Frozen Model of a pipeline. prompts: list of str, or a file of them; size: of the picture in pixels, [height, width] or both in one, if other than what
    the network was built for; frames: of a video, likewise; guidance: see Flux; data: folder of images, whose captions are encoded beside the prompts while
    the text encoders are here."""
    folder = fetch(name)
    index = read_index(name, folder)
    cls = PIPELINES[index["_class_name"]]
    size = [size, size] if isinstance(size, int) else size
    if prompts is not None and cls.text is None:
        raise UserError(f"--prompts: expected a teacher that takes text, found {name}, which takes labels")
    if cls.text is not None and not isinstance(prompts, list):
        own = Path(folder) / "prompts.txt"
        prompts = read_prompts(prompts or (own if own.is_file() else ROOT / "assets" / "prompts.txt"))
    captions = read_captions(data) if data and cls.text is not None else []
    import diffusers
    import transformers
    for logging in (diffusers.utils.logging, transformers.utils.logging):  # truncated prompts are normal, loading bars say nothing
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < cls.since:
        raise UserError(f"--teacher {name}: {cls.pipeline}: expected diffusers {'.'.join(map(str, cls.since))} or newer, found {diffusers.__version__}")
    try:
        config, vae = (config_of(getattr(diffusers, index[part][1]), Path(folder) / part) for part in (cls.part, "vae"))
        cls.check(name, config, vae, size, frames, guidance)
    except FAULTS as e:
        raise UserError(f"--teacher {name}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    table, first = embed(cls, folder, prompts, device, dtype, cache, say, once) if cls.text is not None else None, None
    if captions:
        first = table.append(embed(cls, folder, [text for _, text in captions], device, dtype, cache, say, once))
    scheduler = read_json(Path(folder) / "scheduler" / "scheduler_config.json", "--teacher")
    try:
        nets = cls.networks(index)
        budget(network=sum(stored(Path(folder) / part) for part in nets), vae=stored(Path(folder) / "vae"), width=dtype.itemsize, experts=len(nets))
        net = cls.load_net(folder, dtype)
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(folder, subfolder="vae", torch_dtype=dtype, use_safetensors=None if cls.pickles else True)
        model = cls(net, vae.eval().requires_grad_(False), scheduler, size, **({} if frames is None else dict(frames=frames)))
        if guidance is not None:
            model.guidance = guidance
        model.attach(Path(folder), table, prompts)
        model.cache, model.vae_folder, model.captioned = cache, Path(folder) / "vae", ([path for path, _ in captions], first)
        model = model.assembled(folder, index, dtype, nets)
    except FAULTS as e:
        raise UserError(f"--teacher {name}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    model.dtype = dtype
    return (place or (lambda model: model.to(device)))(model.requires_grad_(False))
