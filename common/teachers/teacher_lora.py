"""--teacher-lora FILE[:SCALE]: a LoRA that becomes part of the teacher, such as a style.

diffusers reads the file, in its own form or in kohya's. scale B A is added to the weights of the
network and of the text encoders, once, when they are loaded. Everything else (students, critics,
embeddings of prompts) starts from these weights and knows nothing of the file.

What diffusers passes over in silence is refused here: files of which only a part fits, and what is
not a plain LoRA.
"""

import contextlib
import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError, describe, first_line, require
from common.files import LOAD_ERRORS, hash_files, is_local_name, read_json
from common.lora import to_diffusers
from common.schema import is_number, list_of

FLAG = "--teacher-lora"
ADAPTER = "teacher_lora"  # its name while diffusers adds it to the weights
PLAIN = re.compile(r"lora_?([AB]|up|down|linear_layer)?\b|lora[._](up|down|A|B)|\.alpha$")
NOT_PLAIN = re.compile(r"hada_|lokr_|dora_scale|lora_magnitude")


def is_record(value):
    """Is this an entry of "teacher_lora" in distill.json?"""
    return (
        isinstance(value, dict)
        and is_local_name(value.get("file"))
        and isinstance(value.get("sha256"), str)
        and is_number(value.get("scale"))
    )


RECORDS = list_of("objects of file, sha256, scale", ("an object", is_record))
HOME = "teacher_lora"  # folder of the files in that of a student


def read_teacher_loras(texts):
    """Values of --teacher-lora, or None -> list of TeacherLora. UserError: no such file, no LoRA,
    no scale."""
    return [TeacherLora(*split_scale(text)) for text in texts or ()]


def loras_of_student(home, info, texts=None):
    """The TeacherLoras of a student's teacher, as its distill.json records them.

    home: folder of the student. info: its distill.json, checked (read_student). texts: values of
    --teacher-lora; without them the files of the training are taken, or those in the student's
    folder. UserError: a file is gone, or it is another one.
    """
    path = home / "distill.json"
    records = info.get("teacher_lora", [])
    if texts:
        loras = read_teacher_loras(texts)
        check_records(f"{FLAG}: {path}", records, loras)
        return loras
    flags = info.get("flags")
    trained = flags.get("teacher_lora") if isinstance(flags, dict) else None
    known = isinstance(trained, list) and len(trained) == len(records)
    loras = []
    for i, record in enumerate(records):
        candidates = [home / file_in_student(i, record)]
        if known and isinstance(trained[i], str):
            candidates.insert(0, Path(split_scale(trained[i])[0]))
        loras.append(find_lora(path, record, candidates))
    return loras


def find_lora(path, record, candidates):
    """The first of some files that a record of `path` is of -> TeacherLora."""
    found = "no such file"
    for file in candidates:
        if not file.is_file():
            continue
        if hash_files([file]) == record["sha256"]:
            return TeacherLora(file, record["scale"])
        found = f"another file in {file}"
    raise UserError(
        f"{path}: its teacher has the LoRA {record['file']}, sha256 {record['sha256'][:12]}: "
        f"found {found}; give it as {FLAG} FILE:{record['scale']:g}"
    )


def file_in_student(number, record):
    """Where the folder of a LoRA student has the file of its teacher's LoRA, number 0, 1, ..."""
    return Path(HOME) / f"{number}-{Path(record['file']).name}"


def check_records(where, records, loras):
    """UserError unless loras are those of the records of a distill.json, in this order."""
    expected = [describe_record(record) for record in records]
    found = [lora.name_of_content() for lora in loras]
    require(
        expected == found,
        f"{where}: expected the LoRA of its training, {', '.join(expected) or 'none'}, "
        f"found {', '.join(found) or 'none'}",
    )


def describe_record(record):
    return f"sha256 {record['sha256'][:12]} at scale {record['scale']:g}"


def split_scale(text):
    """FILE or FILE:SCALE -> file, scale. A colon that no number follows belongs to the file."""
    file, _, scale = text.rpartition(":")
    try:
        scale = float(scale)
    except ValueError:
        return text, 1.0
    ok = file and math.isfinite(scale) and scale != 0
    require(ok, f"{FLAG} {text}: expected FILE or FILE:SCALE with a number other than 0")
    return file, scale


class TeacherLora:
    """path: a safetensors file. scale: factor on its update. sha256: of the file."""

    def __init__(self, path, scale):
        self.path = Path(path)
        self.scale = scale
        self.flag = f"{FLAG} {path}"  # in messages
        found = "a folder" if self.path.is_dir() else "no such file"
        require(self.path.is_file(), f"{self.flag}: expected a LoRA file, found {found}")
        ok = self.path.suffix == ".safetensors"
        require(
            ok, f"{self.flag}: expected a .safetensors file, found {self.path.suffix or 'none'}"
        )
        self.sha256 = hash_files([self.path])
        self.check_names()

    def check_names(self):
        """UserError for what is no safetensors file, and for other things than LoRA factors."""
        try:
            with safe_open(self.path, "pt") as f:
                names = sorted(f.keys())
        except (SafetensorError, OSError, ValueError) as e:
            raise UserError(
                f"{self.flag}: expected a safetensors file, found: {first_line(e)}"
            ) from None
        others = [name for name in names if NOT_PLAIN.search(name) or not PLAIN.search(name)]
        require(
            names and not others,
            f"{self.flag}: expected pairs of LoRA factors (lora_A and lora_B, or lora_down and "
            f"lora_up), found {len(others)} of {len(names)} tensors that are something else"
            f"{f', the first is {others[0]}' if others else ''}",
        )

    def record(self):
        """What distill.json and run.jsonl say of it."""
        return dict(file=self.path.name, sha256=self.sha256, scale=self.scale)

    def name_of_content(self):
        """Short text that changes when the file's content or the scale does."""
        return describe_record(self.record())

    def argument(self):
        """The value of the flag."""
        return f"{self.path}:{self.scale:g}"

    def read(self, cls, folder):
        """Reads the file by diffusers, for the pipeline in a folder. cls: its teacher class.

        UserError: the pipeline takes no LoRA files, diffusers cannot read this one, or a part of it
        is for layers that the pipeline does not have. No weights of the pipeline are loaded.
        """
        import diffusers
        from diffusers.utils import convert_unet_state_dict_to_peft

        self.cls = cls
        self.pipeline = getattr(diffusers, cls.pipeline)
        self.part = cls.part
        config = read_json(Path(folder) / cls.part / "config.json", "--teacher")
        reader = getattr(self.pipeline, "lora_state_dict", None)
        require(
            reader is not None,
            f"{self.flag}: expected a teacher whose pipeline takes LoRA files, "
            f"found {cls.pipeline}",
        )
        options = dict(weight_name=self.path.name, use_safetensors=True, local_files_only=True)
        options["return_lora_metadata"] = True  # may hold alpha
        if "return_alphas" in inspect.signature(reader).parameters:
            options["return_alphas"] = True
        if cls.part == "unet":  # kohya counts the blocks of SDXL in another way
            options["unet_config"] = SimpleNamespace(**dict(layers_per_block=2) | config)
        with lora_errors(self.flag, cls.pipeline):
            tensors, *alphas, metadata = reader(str(self.path.absolute().parent), **options)
        self.alphas = alphas[0] if alphas else None
        self.metadata = metadata
        own = {k: v for k, v in tensors.items() if k.startswith(f"{cls.part}.")}
        if not any(".lora_A." in name for name in own):  # older names, which kohya's become
            tensors = {k: v for k, v in tensors.items() if k not in own}
            tensors |= convert_unet_state_dict_to_peft(own)
        self.tensors = {name: v.float() for name, v in tensors.items()}
        self.check_fit(cls, config, folder)

    def parts(self):
        """Names of the pipeline's parts that the file changes."""
        return sorted({name.split(".")[0] for name in self.tensors})

    @property
    def changes_text(self):
        return any(part.startswith("text_encoder") for part in self.parts())

    def of_part(self, part):
        return {k: v for k, v in self.tensors.items() if k.split(".")[0] == part}

    def check_fit(self, cls, config, folder):
        """UserError unless the teacher has all layers of the file, in the same sizes."""
        import diffusers

        index = read_json(Path(folder) / "model_index.json", "--teacher")
        known = [part for part in self.pipeline._lora_loadable_modules if index.get(part)]
        known = [part for part in known if part == cls.part or part.startswith("text_encoder")]
        names = layers_of(self.tensors)
        foreign = [name for name in names if name.split(".")[0] not in known]
        with torch.device("meta"):  # shapes only
            net = getattr(diffusers, cls.network_class).from_config(config)
        self.layers = [name for name, _ in net.named_modules()]
        layers = {f"{cls.part}.{name}": layer for name, layer in net.named_modules()}
        foreign += [n for n in names if n.startswith(f"{cls.part}.") and n not in layers]
        require(
            not foreign,
            f"{self.flag}: expected a LoRA of this {cls.pipeline}, found {len(foreign)} of "
            f"{len(names)} layers that it does not have, the first is {(foreign or [0])[0]}",
        )
        for name in names:
            if name in layers:
                self.check_shape(name, layers[name])

    def check_shape(self, name, layer):
        weight = getattr(layer, "weight", None)
        found = {side: self.tensors.get(f"{name}.lora_{side}.weight") for side in "AB"}
        complete = all(v is not None for v in found.values())
        require(complete, f"{self.flag}: expected two factors for layer {name}, found one")
        shape = [found["B"].shape[0], *found["A"].shape[1:]]
        expected = None if weight is None else list(weight.shape)
        require(
            shape == expected,
            f"{self.flag}: expected factors for the weight {expected} of layer {name}, "
            f"found some for {shape}",
        )

    # ---- weights

    def add_to_network(self, net):
        """Adds the update to the weights of the pipeline's network."""
        self.insert(net)
        self.add(net)
        net.unload_lora()

    def insert(self, net):
        """Puts the factors beside the layers of the network, as peft's adapters."""
        load = getattr(self.pipeline, f"load_lora_into_{self.part}")
        options = {self.part: net, "adapter_name": ADAPTER, "metadata": self.metadata}
        if "network_alphas" in inspect.signature(load).parameters:
            options["network_alphas"] = self.alphas
        with lora_errors(self.flag, self.pipeline.__name__):
            load(self.of_part(self.part), **options)
        self.check_arrival(net, self.part)

    def add_to_text_encoders(self, pipe):
        """Adds the update to the weights of the text encoders of a pipeline of diffusers."""
        self.insert_into_text_encoders(pipe)
        for part in self.parts():
            if part != self.part:
                self.add(getattr(pipe, part))
        pipe.unload_lora_weights()

    def insert_into_text_encoders(self, pipe):
        for part in self.parts():
            if part == self.part:
                continue
            encoder = getattr(pipe, part)
            with lora_errors(self.flag, self.pipeline.__name__):
                self.pipeline.load_lora_into_text_encoder(
                    self.of_part(part),
                    network_alphas=self.alphas,
                    text_encoder=encoder,
                    prefix=part,
                    adapter_name=ADAPTER,
                    metadata=self.metadata,
                )
            self.check_arrival(encoder, part)

    def check_arrival(self, model, part):
        """UserError if diffusers has left out a part of the file: it may do so without a word."""
        expected = len(self.of_part(part))
        arrived = sum(len(layer.lora_A) + len(layer.lora_B) for layer in adapted(model))
        require(
            arrived == expected,
            f"{self.flag}: expected {expected} factors for {type(model).__name__}, "
            f"of which {arrived} fit",
        )

    def add(self, model):
        """Adds scale B A to each weight, in float32 whatever the weights are."""
        for layer in adapted(model):
            weight = layer.get_base_layer().weight
            update = self.scale * layer.get_delta_weight(ADAPTER)
            weight.data = (weight.data.float() + update).to(weight.dtype)

    # ---- files

    def factors(self, folder):
        """{name of a layer in a LoRA file: (A, B)} in float32, with alpha and scale in B.

        folder: of the pipeline.
        """
        net = self.cls.load_net(folder, torch.float32, self.part)
        self.insert(net)
        found = self.factors_of(net, self.part)
        if self.changes_text:
            pipe = self.cls.text_pipeline(folder, torch.float32)
            self.insert_into_text_encoders(pipe)
            for part in self.parts():
                if part != self.part:
                    encoder = getattr(pipe, part)
                    # CLIP's layers have this in front of their names in files of all versions
                    prefix = part if hasattr(encoder, "text_model") else f"{part}.text_model"
                    found |= self.factors_of(encoder, prefix)
        return found

    def factors_of(self, model, prefix):
        found = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A") and ADAPTER in layer.lora_A:
                a = layer.lora_A[ADAPTER].weight.detach().float()
                b = layer.lora_B[ADAPTER].weight.detach().float()
                found[f"{prefix}.{name}"] = a, self.scale * layer.scaling[ADAPTER] * b
        return found


def merge(tensors, loras, folder):
    """A student's LoRA file with the LoRAs of its teacher -> a file for the plain pipeline, under
    diffusers' names.

    tensors: of the student's file. loras: TeacherLoras, read. folder: of the pipeline. The update
    of a layer is the sum of theirs: B A = [B_1, B_2] [A_1; A_2].
    """
    tensors = to_diffusers(tensors, loras[0].part, loras[0].layers)
    layers = layers_of(tensors)
    pairs = {
        name: [(tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float())]
        for name in layers
    }
    for lora in loras:
        for name, pair in lora.factors(folder).items():
            pairs.setdefault(name, []).insert(0, pair)
    stacked = {
        name: (torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], 1))
        for name, found in pairs.items()
    }
    # older versions of diffusers expect one rank in all layers
    rank = max(len(a) for a, _ in stacked.values())
    merged = {}
    for name, (a, b) in stacked.items():
        missing = rank - len(a)
        merged[f"{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        merged[f"{name}.lora_B.weight"] = torch.cat(
            [b, b.new_zeros(len(b), missing, *b.shape[2:])], 1
        )
    return merged


def adapted(model):
    """The layers of a model that have factors of a TeacherLora beside them."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    return [layer for layer in layers if ADAPTER in layer.lora_A]


def layers_of(tensors):
    """Names of layers, with the part of the pipeline in front: unet.mid_block...to_q."""
    return sorted({name.split(".lora")[0] for name in tensors})


@contextlib.contextmanager
def lora_errors(flag, pipeline):
    """Raises what diffusers and peft raise for a file that they cannot use as one UserError."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the one line is ours
    try:
        yield
    except LOAD_ERRORS as e:
        raise UserError(
            f"{flag}: expected a LoRA of {pipeline} that diffusers reads, found: {describe(e)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
