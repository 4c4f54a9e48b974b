"""What all diffusers pipelines share as teachers."""

import json
import math
import warnings
from collections import Counter
from pathlib import Path

import torch

from common.errors import UserError
from common.files import load_errors, load_weights, read_json
from common.model import Model, layers_at, load_extras
from common.teachers.bake import UNBAKED, name_of
from common.teachers.latents import load_latents, load_sizes
from common.teachers.sizes import Sizes, size_text
from common.teachers.weights import find_weights, text_options
from data.image_folder import image_files

# diffusers 0.42 calls this argument dtype; 0.35, which is supported as well, has only the old name.
warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)


class Pipeline(Model):
    """The network of a diffusers pipeline, its VAE and the embeddings of its prompts.

    Samples are latents [B, *shape]. A subclass is one pipeline. It sets the attributes below and
    defines `embed` (prompts to embeddings), `predict` (a call of the network), `make_schedule`,
    `time_embedders`, and what else differs from the majority.
    """

    pipeline = None  # diffusers class of the pipeline
    network_class = None  # diffusers class of the network
    part = "transformer"  # the network's subfolder
    guiders = ()  # components that guide; a student's folder has none
    without = ()  # further components that are not needed for embedding prompts
    since = (0, 35)  # version of diffusers
    takes_prompts = True
    takes_image = False  # its prompts come with an image (FromImage)
    text_needs_network = False  # `embed` depends on the network's config.json
    most_tokens = {}  # that `embed` reads, where the tokenizer of this name allows more
    built_for = None  # (height, width) in pixels, where the network's configuration has no size
    square = False  # the network takes square images only
    packed = 1  # a token of the network's input is a square of packed x packed latents
    expected = {}  # supported values of configuration keys (common/teachers/configuration.py)
    on_host = ()  # names of embeddings that `predict` reads on the host
    at_once = 4  # samples that the VAE decodes or encodes at a time
    takes_sigmas = True  # pipe(...) accepts times of the steps: sigmas, or timesteps
    passes_sigmas = False  # pipe(...) gives its scheduler 1, (n - 1) / n, ..., 1 / n
    shift_of_steps = False  # its dynamic time shift depends on the number of steps too
    unguided = {}  # arguments of pipe(...) for the conditional estimate alone
    second_network = None  # name of the pipeline's network for low noise, where it may have one

    table = None  # PromptEmbeddings
    cache = None  # folder of cached embeddings and latents; None: out/prompts
    vae_folder = None
    captioned = ([], 0)  # of --data: (image file, captions), row in `table` of the first caption

    def __init__(self, net, vae, scheduler, size=None, prediction="flow"):
        """scheduler: dict of read_scheduler. size: [height, width] in pixels; None: default."""
        # Not a registered module: optimisers, copies and checkpoints must not include the VAE.
        object.__setattr__(self, "vae", vae)
        shape = self.latent_shape(net.config, size)
        super().__init__(net, self.make_schedule(scheduler, shape, net.config), prediction, shape)

    # -- sizes

    @property
    def shape(self):
        """Of one sample, without batch; of several --size, that of the one in use."""
        return self.sizes.shape if self.sizes else self.one_shape

    @shape.setter
    def shape(self, shape):
        self.one_shape = shape

    def offer_sizes(self, sizes, scheduler):
        """Samples may have several sizes from now on, see Sizes. scheduler: of read_scheduler."""
        c = self.net.config
        shapes = [self.latent_shape(c, size) for size in sizes]
        schedules = [self.make_schedule(scheduler, shape, c) for shape in shapes]
        self.sizes = Sizes(sizes, shapes, schedules, self.schedule, scheduler)

    # -- from the configuration files alone; c: a configuration, with its fields as attributes

    @classmethod
    def networks(cls, index):
        """Subfolders of the pipeline's networks. index: contents of model_index.json."""
        return [cls.part]

    @staticmethod
    def scale(c):
        """Pixels per latent along a side. c: of the VAE."""
        if hasattr(c, "encoder_block_out_channels"):
            return 2 ** (len(c.encoder_block_out_channels) - 1)
        return 2 ** (len(c.block_out_channels) - 1)

    @classmethod
    def patch(cls, c):
        """Latents per token along a side. c: of the network."""
        patch = getattr(c, "patch_size", 2)  # UNets have none, and halve the size
        return patch[-1] if isinstance(patch, (list, tuple)) else patch

    @staticmethod
    def latent_channels(c):
        """Channels of the latents. c: of the VAE."""
        return c.latent_channels if hasattr(c, "latent_channels") else c.z_dim

    @classmethod
    def input_channels(cls, latents):
        """Channels that the network must have for latents of so many."""
        return latents * cls.packed**2

    @staticmethod
    def pixel_channels(c):
        """Channels that the VAE's configuration must have for images in colour. c: of the VAE."""
        return 3

    @classmethod
    def output_channels(cls, c):
        """Values that out_channels may have. c: of the network."""
        return [c.in_channels, None]

    @classmethod
    def check(cls, name, c, vae, size, frames, guidance):
        """UserError if --size, --frames or --embedded-guidance do not suit this teacher.

        c, vae: configurations of network and VAE. size: [height, width] or None.
        """
        if frames is not None:
            cls.check_frames(frames, vae)
        if guidance is not None and not getattr(c, "guidance_embeds", False):
            raise UserError(
                f"--embedded-guidance {guidance:g}: expected a teacher whose network takes a "
                f"guidance scale, such as FLUX.1-dev, found {name}; --cfg is for all"
            )
        if size is not None:
            cls.check_size(size, c, vae)
        elif getattr(c, "sample_size", 0) is None:
            raise UserError(
                f"--size: expected for {name}, whose {cls.part}/config.json has no sample_size"
            )

    @classmethod
    def check_frames(cls, frames, vae):
        if not cls.video:
            raise UserError(
                f"--frames {frames}: expected a text-to-video teacher, found {cls.pipeline}"
            )
        step = cls.frame_step(vae)
        if frames < 1 or (frames - 1) % step:
            raise UserError(
                f"--frames {frames}: expected a multiple of {step}, plus 1, for this teacher"
            )

    @classmethod
    def check_size(cls, size, c, vae):
        height, width = size
        flag = f"--size {size_text(size)}"
        unit = cls.scale(vae) * cls.patch(c)  # pixels of a token
        tokens = getattr(c, "pos_embed_max_size", None) or math.inf
        if min(size) < 1 or height % unit or width % unit:
            raise UserError(f"{flag}: expected a multiple of {unit} pixels for this teacher")
        if max(size) > tokens * unit:
            raise UserError(
                f"{flag}: expected at most {tokens * unit} pixels along a side for this teacher"
            )
        if cls.square and height != width:
            raise UserError(f"{flag}: expected a square, this teacher makes no other images")

    # -- loading

    @classmethod
    def network(cls, config):
        """The network of a configuration (dict), with random weights."""
        import diffusers

        return getattr(diffusers, cls.network_class).from_config(config).eval()

    @classmethod
    def text_pipeline(cls, folder, dtype, **parts):
        """The diffusers pipeline without network and VAE, for `embed`. parts: loaded already."""
        import diffusers

        index = read_json(Path(folder) / "model_index.json")
        absent = [part for part, value in index.items() if value == [None, None]]
        given = dict.fromkeys([cls.part, "vae", *cls.without, *absent]) | parts
        return getattr(diffusers, cls.pipeline).from_pretrained(
            folder, torch_dtype=dtype, **text_options(cls, folder, index), **given
        )

    @classmethod
    def load_net(cls, folder, dtype, part=""):
        """The network in the subfolder `part` of a pipeline's folder, or in a student's folder."""
        import diffusers

        options = dict(use_safetensors=True)
        if part:
            options = find_weights(Path(folder) / part, folder).options()
        return getattr(diffusers, cls.network_class).from_pretrained(
            folder,
            subfolder=part or None,
            torch_dtype=dtype,
            **options,
        )

    @classmethod
    def weights_of(cls, folder, part, loras=()):
        """Model.read_weights of a network in a pipeline's folder. loras: of TeacherLora."""

        def read():
            net = cls.load_net(folder, torch.float32, part)
            for lora in loras:
                lora.add_to_network(net)
            return net.state_dict()

        return read

    @classmethod
    def load_vae(cls, folder, dtype, vae_class):
        import diffusers

        vae = getattr(diffusers, vae_class).from_pretrained(
            folder,
            subfolder="vae",
            torch_dtype=dtype,
            **find_weights(Path(folder) / "vae", folder).options(),
        )
        return vae.eval().requires_grad_(False)

    def load_student(self, folder, info):
        """A student of this teacher from the folder that `save` wrote. info: its saved `config`."""
        with load_errors(f"{folder}: expected a {self.network_class} as diffusers saves it"):
            student = self.with_network(self.load_net(folder, torch.float32))
        unbaked = Path(folder) / UNBAKED
        if unbaked.is_file():  # the layer that was changed for plain diffusers, as it was
            layer = student.time_layer()
            name = name_of(student.net, layer)
            load_weights(unbaked, layer, lambda end: f"{name}.{end}")
        load_extras(folder, info, student)
        student.folder = Path(folder)
        return student

    def with_experts(self, folder, index, dtype):
        """This model, or a Routed of all networks of the pipeline where it has several."""
        return self

    # -- a student in plain diffusers (whole.py)

    def call_options(self):
        """Arguments of pipe(...), besides prompt and steps, that give the student's samples."""
        options = dict(self.unguided)
        if self.shape != self.latent_shape(self.net.config, None):
            options |= dict(zip(("height", "width"), self.image_shape[-2:]))
        return options

    def further_files(self):
        """{path: contents} of components that a student's folder has in place of the teacher's."""
        return {}

    def without_guidance(self, files):
        """`files` of a student with whole weights, such that the pipeline never guides it, where
        its network can say so."""
        return files

    # -- conditions

    @classmethod
    def embed(cls, pipe, prompts):
        """Embeddings of prompts (list of str; None: the null prompt): dict of tensors [n, ...].

        FromImage: list of ImagePrompt.
        """
        raise NotImplementedError

    @classmethod
    def embed_negative(cls, pipe, text):
        """Embedding of a negative prompt, as pipe(..., negative_prompt=text) makes it."""
        return cls.embed(pipe, [text])

    @classmethod
    def text_shapes(cls, c):
        """Shapes of the longest embedding that `embed` makes of one prompt: {name: shape}.

        c: configuration of the network. For --dry-run, which has no text encoders.
        """
        raise NotImplementedError

    def source_shapes(self):
        """Shapes of what a prompt's image adds to its embedding, as text_shapes."""
        return {}

    def attach(self, folder, table, prompts, negative=None):
        """Adds the prompts. table: their PromptEmbeddings. negative: of --negative-prompt."""
        if table is not None:
            table.on_host = self.on_host
        self.folder = folder
        self.table = table
        self.prompts = prompts
        self.negative = negative
        self.classes = len(prompts)

    def encode(self, labels):
        # Routed needs the labels themselves: they decide which expert a sample goes to.
        # Labels in the memory of the host cost no wait for the device.
        labels = torch.as_tensor(labels)
        cond = self.table.rows(labels.cpu(), self.device)
        return cond | dict(labels=labels.to(self.device, non_blocking=True))

    def null(self, n):
        labels = torch.full((n,), self.classes, device=self.device)
        return self.table.nulls(n, self.device) | dict(labels=labels)

    # -- latents and pixels

    def latent_shape(self, c, size):
        """Shape of a sample. c: of the network. size: [height, width] in pixels; None: default."""
        size = size or self.built_for
        if size is None:
            return c.in_channels, *self.default_size(c)
        height, width = size
        return c.in_channels, height // self.vae_scale, width // self.vae_scale

    @classmethod
    def default_size(cls, c):
        """(height, width) of the latents that the network was made for. c: of the network."""
        size = c.sample_size
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

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
        vae = self.vae.to(x.device)
        shift, scale = self.latent_stats()
        parts = [self.from_vae((y / scale + shift).to(vae.dtype)) for y in x.split(self.at_once)]
        images = torch.cat(parts).float()  # in [-1, 1]
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @torch.no_grad()
    def encode_images(self, images):
        if images.is_floating_point():
            return images  # latents, read from the cache
        vae = self.vae.to(images.device)
        shift, scale = self.latent_stats()
        latents = []
        for part in images.split(self.at_once):
            output = self.to_vae(part.to(vae.dtype) / 127.5 - 1)
            latents.append((output.float() - shift) * scale)
        return torch.cat(latents)

    def from_vae(self, z):
        """Decoder: images in [-1, 1]."""
        return self.vae.decode(z, return_dict=False)[0]

    def to_vae(self, images):
        """Encoder: the mean of the latents. images: in [-1, 1]."""
        z = self.vae.encode(images, return_dict=False)[0]
        return z if torch.is_tensor(z) else z.mode()  # AutoencoderDC returns the latents themselves

    def load_image_folder(self, folder, say=print):
        """--data FOLDER -> Images of latents, with the captions as conditions."""
        captions, first = self.captioned
        files = [path for path, _ in captions]
        counts = torch.tensor([len(texts) for _, texts in captions], dtype=torch.int64)
        labels = first + counts.cumsum(0) - counts  # row of each image's first caption
        notes = Counter()
        image_files(Path(folder), notes)  # what the folder has besides
        load = lambda: load_latents(folder, self, files, labels, [], say, counts, notes)
        return load_sizes(self, load)

    # -- the network

    def time_layer(self):
        """The last linear layer of the time embedding: its output is what `extend` adds to."""
        raise NotImplementedError

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.transformer_blocks, depths)

    def to_feature_map(self, h):
        """Output of a block, [B, D, h, w] or image tokens [B, h w, D] -> [B, D, h, w]."""
        if isinstance(h, tuple):
            h = h[-1]  # blocks of joint attention return (text tokens, image tokens)
        if h.ndim == 4:
            return h
        height, width = self.shape[-2:]
        rows = round((h.shape[1] * height / width) ** 0.5)
        return h.transpose(1, 2).reshape(len(h), -1, rows, h.shape[1] // rows)

    def config_file(self):
        return json.loads(self.net.to_json_string())  # as diffusers writes it

    def config(self):
        return super().config() | dict(image=list(self.image_shape))


def channel_stats(vae, shape):
    """(shift, scale) of VAEs with a number per channel, to broadcast over samples of `shape`."""
    ones = [1] * (len(shape) - 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(1, -1, *ones)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(1, -1, *ones)
    return mean, 1 / std
