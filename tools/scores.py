"""Scores of images for prompts, and DINOv2's features, by models of transformers.

A model is a folder as transformers saves it (config.json, safetensors, preprocessor_config.json,
the tokenizer's files), or the name of one on the hub, OWNER/REPOSITORY. No code of it is run.
c is the cosine of the projected features of an image and of its prompt:

    clip_score  100 c                    (arXiv 2104.08718; some papers print c)
    pickscore   exp(logit_scale) c       (arXiv 2305.01569): transformers' logits_per_image
    hps         100 c, HPSv2.1           (arXiv 2306.09341 prints percent)

ImageReward is not here: its weights are a pickle for a BLIP of its own (docs/evaluate.md).
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from common.errors import UserError, first_line, require
from common.features import Extractor
from common.files import hash_files, read_json, set_weights
from common.teachers.hub import is_hub_name
from common.teachers.load import silence_libraries
from tools.measure import to_square
from training.report import to_image

KEYS = dict(clip="clip_score", pickscore="pickscore", hps="hps")  # flag -> name in a result
FILES = ["*.json", "*.txt", "model*.safetensors"]  # of a hub name


# ---- scores --------------------------------------------------------------------------------------


class Scores:
    """The scores that the flags --clip, --pickscore and --hps ask for."""

    def __init__(self, args, device):
        self.side = args.square  # of the images that are scored; None: as they are
        self.all = []
        for flag, key in KEYS.items():
            name = getattr(args, flag)
            if name:
                prefix = args.clip_prefix if flag == "clip" else None
                self.all.append(TextScore(f"--{flag}", name, key, device, prefix))

    def __call__(self, images, prompts):
        """uint8 [n, C, H, W], list of n str -> float64 [n, number of scores], on the CPU."""
        if self.side:
            images = to_square(images, self.side)
        return torch.stack([score(images, prompts) for score in self.all], 1)

    def means(self, values):
        """float64 [n, number of scores] -> the entries of a result."""
        return {score.key: mean for score, mean in zip(self.all, values.mean(0).tolist())}

    def protocol(self):
        square = f"square{self.side}-lanczos " if self.side else ""
        return square + "; ".join(score.protocol for score in self.all)


class TextScore:
    """One score, by a CLIP model. protocol: the model, a hash of its weights, resize and scale."""

    def __init__(self, flag, name, key, device, prefix=None):
        folder = local_folder(flag, name)
        check_kind(flag, folder, "clip")
        import transformers

        weights = sorted(folder.glob("HPS*.pt")) if key == "hps" else []
        if weights:  # as published; the folder has the rest of CLIP ViT-H-14
            model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
            set_weights(weights[-1], model, from_open_clip(read_published(flag, weights[-1])))
        else:
            model = load_model(flag, folder, transformers.CLIPModel)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = load(flag, folder, transformers.AutoTokenizer)
        self.processor = load_processor(flag, folder)
        self.device = device
        self.key = key
        self.prefix = f"{prefix} " if prefix else ""
        self.scale = model.logit_scale.exp().item() if key == "pickscore" else 100.0
        self.whole = key == "hps"  # the long side is shrunk, and nothing is cut off
        how = "bicubic-long-side-padded" if self.whole else resize_name(self.processor)
        self.protocol = f"{key} {model_name(folder, weights)} {how} x{self.scale:g}"
        if prefix:
            self.protocol += f" prefix={prefix!r}"

    @torch.no_grad()
    def __call__(self, images, prompts):
        """uint8 [n, C, H, W], list of n str -> float64 [n], on the CPU."""
        image = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        image = F.normalize(self.model.visual_projection(image), dim=1)
        tokens = self.tokenizer(
            [self.prefix + prompt for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        text = self.model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
        text = F.normalize(self.model.text_projection(text), dim=1)
        return self.scale * (image * text).sum(1).double().cpu()

    def pixels(self, images):
        """uint8 [n, C, H, W] -> the network's input, as the folder's processor makes it."""
        pictures = as_pictures(images)
        options = {}
        if self.whole:
            side = self.model.config.vision_config.image_size
            pictures = [fit_whole(picture, side) for picture in pictures]
            options = dict(do_resize=False, do_center_crop=False)
        return process(self.processor, pictures, **options).to(self.device)


def fit_whole(picture, side):
    """HPSv2's resize: the long side becomes `side`, the rest of the square is black."""
    scale = side / max(picture.size)
    small = picture.resize([round(scale * length) for length in picture.size], Image.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


# ---- features ------------------------------------------------------------------------------------


class DinoExtractor(Extractor):
    """Class token of DINOv2 behind its last norm. Images become 224 x 224 by a bicubic resize.

    These are the features of FD-DINOv2 (dgm-eval, arXiv 2306.04675: ViT-L/14). No images are cut.
    """

    side = 224

    def __init__(self, name, device):
        folder = local_folder("--dino", name)
        check_kind("--dino", folder, "dinov2", "dinov2_with_registers")
        import transformers

        self.net = load_model("--dino", folder, transformers.AutoModel)
        self.net.eval().requires_grad_(False).to(device)
        self.processor = load_processor("--dino", folder)
        self.device = device
        self.dims = self.net.config.hidden_size
        self.protocol = f"{model_name(folder)} bicubic-{self.side}x{self.side}"

    @torch.no_grad()
    def __call__(self, images):
        options = dict(
            do_resize=True,
            size=dict(height=self.side, width=self.side),
            resample=Image.BICUBIC,
            do_center_crop=False,
        )
        pixels = process(self.processor, as_pictures(images), **options)
        output = self.net(pixel_values=pixels.to(self.device))
        return output.pooler_output.float().cpu(), None


class NoFeatures(Extractor):
    """For models that bring no metric: their samples have scores only."""

    dims = 0
    protocol = "no features"

    def __init__(self, device):
        self.device = device

    def __call__(self, images):
        return torch.zeros(len(images), 0), None


# ---- images --------------------------------------------------------------------------------------


def as_pictures(images):
    """uint8 [n, C, H, W] -> list of RGB pictures of pillow."""
    return [to_image(image).convert("RGB") for image in images]


def process(processor, pictures, **options):
    """List of pictures -> float32 [n, 3, h, w]: resized, cut, normalised as `processor` says."""
    return processor(images=pictures, return_tensors="pt", **options)["pixel_values"]


def resize_name(processor):
    """'bicubic-short224-crop224': what a processor does, for the protocol."""
    name = ""
    if processor.do_resize:
        size = dict(processor.size)
        sides = f"short{size['shortest_edge']}" if "shortest_edge" in size else by_sides(size)
        name = f"{Image.Resampling(processor.resample).name.lower()}-{sides}"
    if getattr(processor, "do_center_crop", False):
        name += f"-crop{by_sides(dict(processor.crop_size))}"
    return name or "as-is"


def by_sides(size):
    return f"{size['height']}x{size['width']}"


# ---- loading -------------------------------------------------------------------------------------


def local_folder(flag, name):
    """A folder; or what a hub name stands for, downloaded once."""
    try:
        silence_libraries()
    except ImportError as e:
        raise UserError(f"{flag}: expected transformers (requirements.txt): {e}") from None
    if Path(name).is_dir():
        return Path(name)
    expected = f"{flag} {name}: expected a folder as transformers saves it, or OWNER/REPOSITORY"
    # out/clip is a mistyped folder where there is a folder out/, and no name on the hub
    is_path = not is_hub_name(name) or Path(name).parent.is_dir()
    require(not is_path, f"{expected}, found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise UserError(f"{expected}: {first_line(e)[:200]}") from None


def check_kind(flag, folder, *kinds):
    found = read_json(folder / "config.json", flag).get("model_type")
    require(
        found in kinds,
        f"{flag} {folder}: expected a model of the type {' or '.join(kinds)}, found {found!r}",
    )


def load_model(flag, folder, cls):
    """A network from safetensors. UserError: weights are missing, which would be random."""
    options = dict(use_safetensors=True, output_loading_info=True)
    model, info = load(flag, folder, cls, **options)
    missing = sorted(info["missing_keys"])
    require(not missing, f"{flag} {folder}: expected all weights, {missing[:1]} is missing")
    return model


def load(flag, folder, cls, **options):
    """cls.from_pretrained, without any code of the folder."""
    options |= dict(local_files_only=True, trust_remote_code=False)
    try:
        return cls.from_pretrained(folder, **options)
    except Exception as e:  # transformers raises many kinds for folders of other things
        reason = f"{type(e).__name__}: {first_line(e)[:200]}"
        raise UserError(f"{flag} {folder}: expected a {cls.__name__}: {reason}") from None


def load_processor(flag, folder):
    """The folder's image processor, on pillow: its other form, on torchvision, rounds otherwise."""
    import transformers

    return load(flag, folder, transformers.AutoImageProcessor, use_fast=False)


def model_name(folder, weights=()):
    """Name and hash of a model. On the hub's cache the folder is a revision of its repository."""
    name = folder.resolve().name
    if folder.parent.name == "snapshots":
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return f"{name}-{hash_files(weights or sorted(folder.rglob('*.safetensors')))[:12]}"


# ---- HPSv2's file --------------------------------------------------------------------------------


def read_published(flag, path):
    """The state dict in HPS_v2.1_compressed.pt. Anything but plain tensors is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as e:  # torch raises many types here
        raise UserError(
            f"{flag} {path}: expected HPSv2's checkpoint of plain tensors, found something else "
            f"({type(e).__name__})"
        ) from None


# Names in open_clip and in transformers, for the image's encoder and for the text's
RENAMED = {
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}


def from_open_clip(tensors):
    """State dict of open_clip's CLIP -> that of transformers' CLIPModel, in float32."""
    found = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue  # causal, of a constant shape
        tensor = tensor.float()
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T.contiguous()  # open_clip multiplies from the right
        for old, new in RENAMED.items():
            name = re.sub(old, new, name)
        if ".attn.in_proj_" in name:  # query, key and value in one tensor
            for letter, part in zip("qkv", tensor.chunk(3)):
                found[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
        else:
            found[name] = tensor
    return found
