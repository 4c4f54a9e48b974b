"""Files of weights in the folders of pipelines: which ones there are, and which are loaded.

Names are those of diffusers and transformers: STEM[.VARIANT].safetensors, or .bin; several files
are listed in STEM.safetensors.index[.VARIANT].json. A variant is fp16, bf16, non_ema, ...
"""

import math
import re
from pathlib import Path

from safetensors import safe_open

from common.errors import UserError
from common.files import is_local_name, read_json

STEM = "(?:diffusion_pytorch_model|pytorch_model|model)"  # of networks; of text encoders
NAME = re.compile(
    rf"{STEM}(?:\.(?P<before>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<after>\w+))?\.(?P<kind>safetensors|bin)"
)
OTHER_FORMATS = (".msgpack", ".onnx", ".ckpt", ".pt", ".h5", ".gguf", ".xml")
LFS = b"version https://git-lfs"  # the first words of a pointer file


class Weights:
    """Files of one component, in the form that is loaded.

    names: of the files. variant: None or text. pickled: .bin files, which torch reads as weights
    only, so that no code in them is run.
    """

    def __init__(self, folder, names, variant, pickled):
        self.folder = folder
        self.names = names
        self.variant = variant
        self.pickled = pickled

    def options(self):
        """Arguments of from_pretrained."""
        return dict(variant=self.variant, use_safetensors=not self.pickled)

    def count_parameters(self):
        """Number of parameters, from the headers of the files or from their size."""
        if self.pickled:
            width = 2 if self.variant in ("fp16", "bf16") else 4
            return sum((self.folder / name).stat().st_size for name in self.names) // width
        count = 0
        for name in self.names:
            with safe_open(self.folder / name, "pt") as f:
                count += sum(math.prod(f.get_slice(key).get_shape()) for key in f.keys())
        return count


def find_weights(folder, name):
    """-> Weights of a component's folder. name: of --teacher.

    safetensors before .bin, files without a variant before those with one. UserError: there are
    none, one that an index lists is missing, or a file is only a pointer of Git LFS.
    """
    folder = Path(folder)
    groups = {}
    for path in sorted(folder.glob("*")):
        match = NAME.fullmatch(path.name)
        if match:
            variant = match["before"] or match["after"]
            groups.setdefault((match["kind"] == "bin", variant or ""), []).append(path.name)
    if not groups:
        others = [path.name for path in folder.glob("*") if path.suffix in OTHER_FORMATS]
        found = f"{min(others)}, a format that diffusers does not load" if others else "none"
        raise UserError(
            f"--teacher {name}: {folder}: expected weights (.safetensors, or .bin), found {found}"
        )
    pickled, variant = min(groups)
    names = groups[pickled, variant]
    kind = "bin" if pickled else "safetensors"
    for index in folder.glob(
        f"*.{kind}.index.{variant}.json" if variant else f"*.{kind}.index.json"
    ):
        names = files_of_index(index)
    for file in names:
        check_file(folder / file, name)
    return Weights(folder, names, variant or None, pickled)


def files_of_index(path):
    """Names of the files that hold the tensors of an index."""
    table = read_json(path, "--teacher").get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else [None]
    if not all(map(is_local_name, names)):
        raise UserError(f"--teacher {path}: weight_map: expected names of files in this folder")
    return sorted(set(names))


def check_file(path, name):
    if not path.is_file():
        raise UserError(
            f"--teacher {name}: {path}: expected weights, found no file, or a link to none; is the "
            "download complete?"
        )
    with open(path, "rb") as f:
        start = f.read(len(LFS))
    if start == LFS:
        raise UserError(
            f"--teacher {name}: {path}: expected weights, found a pointer of Git LFS; run "
            "`git lfs pull` there"
        )


def text_options(cls, folder, index):
    """Arguments of the pipeline's from_pretrained, for the weights of its text encoders."""
    found = [
        find_weights(Path(folder) / part, folder)
        for part in sorted(index)
        if part.startswith("text_encoder") and index[part] not in (None, [None, None])
    ]
    variants = {weights.variant for weights in found} - {None}
    if len(variants) > 1:
        raise UserError(
            f"--teacher {folder}: text encoders: expected weights of one variant, found only "
            f"{' and '.join(sorted(variants))}"
        )
    forms = {not weights.pickled for weights in found}
    return dict(
        variant=variants.pop() if variants else None,
        use_safetensors=forms.pop() if len(forms) == 1 else None,  # None: each as it is
    )
