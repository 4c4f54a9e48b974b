"""Folders and files of strangers: wherever a file is read, a pickle that runs code, a name that leads out of the folder, an archive that grows beyond measure is
refused in one line; nothing is executed, and nothing is written. Captions and their metadata.jsonl: tests/test_captions.py; images: tests/test_data.py;
flags and damaged files in general: tests/test_fuzz.py."""

import io
import json
import os
import pickle
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin

import eval as evaluation_script
from common import data, fid
from common.ema import EMA
from common.errors import RunError, UserError, explain_fault
from common.features import ClassifierExtractor
from common.files import ROOT, WEIGHTS
from common.image_folder import read_image
from common.model import EXTRAS
from common.teachers.formats import check_evaluation
from common.teachers.imagenet import read_checkpoint
from common.teachers.latents import load_latents
from common.teachers.load import load_model, load_pipeline, load_teacher
from common.teachers.prompts import embed_prompts
from controls.maps import Control
from tools.inception import load_inception
from tools.rows import prompt_kwargs

TOY, MNIST = ROOT / "assets" / "toy", ROOT / "assets" / "mnist"


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def npz(value, path):
    np.savez(
        path if str(path).endswith(".npz") else open(path, "wb"),
        **{k: np.array([value], dtype=object) for k in ("mu", "sigma", "images", "labels")},
    )


WRITERS = dict(
    pickle=lambda v, path: path.write_bytes(pickle.dumps(v)),
    torch=lambda v, path: torch.save(dict(header=v, ema=v, x=v), path),
    old_torch=lambda v, path: torch.save(
        dict(header=v), path, _use_new_zipfile_serialization=False
    ),
    npy=lambda v, path: np.save(open(path, "wb"), np.array([v], dtype=object)),
    npz=npz,
)


@pytest.fixture
def folder(tmp_path):
    """A toy teacher of a stranger."""
    shutil.copytree(TOY, tmp_path / "strange")
    return tmp_path / "strange"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- a pickle in the place of a file -------------------------------------------------------------------------------------------------------------
# name -> prepare(tmp_path, run): the file to be replaced, and what then reads it


def teacher_weights(tmp, run):
    shutil.copytree(TOY, tmp / "t")
    return tmp / "t" / WEIGHTS, lambda: load_teacher(str(tmp / "t"))


def student(tmp, extras=False, lora=None):
    teacher = load_teacher("toy")
    net = teacher.copy(lora) if lora else teacher.copy()
    net.extend("s") if extras else None
    net.save(tmp / "s", dict(method="dmd2"))
    info = json.loads((tmp / "s" / "distill.json").read_text())["model"]
    return lambda: load_model(tmp / "s", info, teacher)


def student_weights(tmp, run):
    return tmp / "s" / WEIGHTS, student(tmp)


def student_extras(tmp, run):
    return tmp / "s" / EXTRAS, student(tmp, extras=True)


def student_lora(tmp, run):
    return tmp / "s" / "pytorch_lora_weights.safetensors", student(
        tmp, lora=dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")
    )


def mnist(tmp):
    """Its folder without the big network; the evaluation does not ask for it."""
    (tmp / "m").mkdir()
    for name in ("classifier.safetensors", "stats.npz", "images.npz", "teacher.json"):
        shutil.copy(MNIST / name, tmp / "m" / name)
    found = json.loads((tmp / "m" / "teacher.json").read_text())
    return SimpleNamespace(
        folder=tmp / "m",
        shape=(1, 28, 28),
        image_shape=(1, 28, 28),
        prompts=None,
        classes=10,
        adapter="dit",
        parameters=lambda: iter([torch.zeros(1)]),
        evaluation=check_evaluation(tmp / "m" / "teacher.json", found["evaluation"]),
    )


def classifier(tmp, run):
    teacher = mnist(tmp)
    return tmp / "m" / "classifier.safetensors", lambda: ClassifierExtractor(teacher)


def statistics(tmp, run):
    teacher = mnist(tmp)
    return tmp / "m" / "stats.npz", lambda: ClassifierExtractor(teacher)


def images(tmp, run):
    teacher = mnist(tmp)
    return tmp / "m" / "images.npz", lambda: data.load_images(None, teacher, lambda *a: None)


def reference(tmp, run):
    return tmp / "ref.npz", lambda: fid.load_stats(tmp / "ref.npz")


def inception(tmp, run):
    return tmp / "inception.pth", lambda: load_inception(tmp / "inception.pth", force=True)


def checkpoint(tmp, run):
    r, net = run(), torch.nn.Linear(2, 2)
    r.save(0, dict(net=net))
    path = r.checkpoints()[0]
    r.lock.close()

    def load():
        r = run("--resume")
        try:
            r.resume(dict(net=net))
        finally:
            r.lock.close()

    return path, load


def embeddings(tmp, run):
    cls = type(
        "Fake",
        (),
        dict(
            text_pipeline=lambda folder, dtype: SimpleNamespace(to=lambda device: None),
            embed=lambda pipe, prompts: dict(text=torch.ones(len(prompts or [0]), 3)),
        ),
    )
    load = lambda: embed_prompts(
        cls, tmp, ["a", "b"], "cpu", torch.float32, tmp / "cache", lambda *a: None, lambda fn: fn()
    )
    load()
    return next((tmp / "cache").glob("*/00000.safetensors")), load


def latents(tmp, run):
    from PIL import Image

    (tmp / "set" / "class").mkdir(parents=True)
    (tmp / "vae").mkdir()
    Image.new("RGB", (16, 16)).save(tmp / "set" / "class" / "0.png")
    vae = SimpleNamespace(dtype=torch.float32)
    teacher = SimpleNamespace(
        shape=(4, 2, 2),
        image_shape=(3, 16, 16),
        vae=vae,
        vae_folder=tmp / "vae",
        folder=tmp,
        cache=tmp / "cache",
        classes=3,
        device="cpu",
        encode_images=lambda x: torch.zeros(len(x), 4, 2, 2),
    )
    files = [tmp / "set" / "class" / "0.png"]
    labels = torch.zeros(1, dtype=torch.int64)
    load = lambda: load_latents(tmp / "set", teacher, files, labels, ["class"], lambda *a: None)
    load()
    return next((tmp / "cache").glob("*/00000.safetensors")), load


def noise_pairs(tmp, run):
    r, teacher = run(), load_teacher("toy")
    load = lambda: Pairs(r, teacher, 3, 1.0)
    load()
    return next(r.out.glob("pairs-*/*.safetensors")), load


def sit(tmp, run):
    return tmp / "sit.pt", lambda: read_checkpoint(tmp / "sit.pt")


PLACES = [
    teacher_weights,
    student_weights,
    student_extras,
    student_lora,
    classifier,
    statistics,
    images,
    reference,
    inception,
    checkpoint,
    embeddings,
    latents,
    noise_pairs,
    sit,
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_a_pickle_is_not_executed(place, run, tmp_path, capsys):  # noqa: F811
    path, load = place(tmp_path, run)
    marker, tree = tmp_path / "executed", lambda: sorted(str(p) for p in tmp_path.rglob("*"))
    for name, write in WRITERS.items():
        write(Bomb(marker), path)
        before = tree()
        with pytest.raises((UserError, RunError)) as e:
            load()
        assert not marker.exists() and tree() == before, name
        assert (
            "\n" not in str(e.value)
            and len(str(e.value)) < 600
            and (path.name in str(e.value) or str(path.parent)[-20:] in str(e.value))
        ), (name, str(e.value))
    assert "Traceback" not in capsys.readouterr().err
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()  # the bomb is live


# ---- names that lead out ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["classifier", "reference", "images"])
@pytest.mark.parametrize(
    "value", ["../secret", "/etc/passwd", "a/../../b", "", 5, ["stats.npz"], None, "a\0b"]
)
def test_teacher_json_names_files_of_its_folder(key, value, folder):
    edit(folder / "teacher.json", evaluation={key: value})
    with pytest.raises(
        UserError, match=f"--teacher .*evaluation.{key}: expected a file in this folder"
    ):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(names="ten"), "names: expected a list of names"),
        (dict(names=[]), "names"),
        (dict(names=[1]), "names"),
        (dict(protocol=3), "protocol: expected text"),
        (dict(measured={}), "measured: expected a list"),
        (dict(measured=[{}]), "measured"),
        (dict(measured=[dict(nfe=1, cfg="1", protocol="x")]), "measured"),
        (dict(measured=[dict(nfe=1, cfg=1, protocol="x", fd="low")]), "measured"),
    ],
)
def test_evaluation_is_checked_before_training(changes, says, folder):
    """All of it is used at the end of a run, when a mistake is dear."""
    edit(folder / "teacher.json", evaluation=changes)
    with pytest.raises(UserError, match=f"evaluation.{says}"):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    "changes",
    [dict(weights="../sit.pt"), dict(weights="/sit.pt"), dict(vae="../vae"), dict(vae="/vae")],
)
def test_sit_names_files_of_its_folder(changes, tmp_path):
    (tmp_path / "t").mkdir()
    for name in ("sit.pt", "t/sit.pt"):
        torch.save({}, tmp_path / name)
    (tmp_path / "vae").mkdir()
    (tmp_path / "t" / "teacher.json").write_text(
        json.dumps(dict(model=dict(adapter="sit", weights="sit.pt") | changes))
    )
    with pytest.raises(UserError, match="(weights|vae): expected a file in this folder"):
        load_teacher(str(tmp_path / "t"))


def test_a_student_does_not_say_where_we_write(tmp_path):
    """distill.json holds the flags of a training; eval.py takes its prompts and sizes, but writes embeddings only where its own user says."""
    args = evaluation_script.parse_args([str(tmp_path)])
    text = prompt_kwargs(
        args,
        dict(
            flags=dict(
                cache_prompts=str(tmp_path / "elsewhere"),
                prompts=5,
                size="x",
                frames=[1],
                embedded_guidance="y",
            )
        ),
    )
    assert text == dict(prompts=None, size=None, frames=None, guidance=None, cache=None)
    assert prompt_kwargs(args, dict(flags=dict(prompts="p.txt", size=64)))["prompts"] == "p.txt"


# ---- pipelines --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "component",
    [
        ["evil", "Class"],
        ["evil_module", "Class"],
        ["os", "system"],
        ["diffusers.loaders", "X"],
        ["transformers", "AutoModel"],
        ["transformers", "AutoTokenizer"],
        ["transformers"],
        ["transformers", None],
        ["transformers", ["CLIPTextModel"]],
        [["transformers"], "CLIPTextModel"],
        {"evil_module": 1, "Class": 2},
        "ev",
        [],
        [None, "X"],
    ],
    ids=str,
)
def test_foreign_modules_of_a_pipeline(component, tmp_path, monkeypatch):
    """model_index.json may name any module and class; code that lies there is not imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    home = tmp_path / "pipe"
    (home / "text_encoder").mkdir(parents=True)
    (home / "text_encoder" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (home / "model_index.json").write_text(
        json.dumps(dict(_class_name="StableDiffusionPipeline", text_encoder=component))
    )
    with pytest.raises(
        UserError, match="text_encoder: expected a component of diffusers or transformers"
    ):
        load_pipeline(str(home), prompts=["x"])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_code_that_is_called_like_a_library(library, tmp_path):
    """diffusers looks for <part>/<library>.py first, whatever the library is called."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / f"{library}.py").write_text("1 / 0")
    (tmp_path / "model_index.json").write_text(
        json.dumps(
            dict(_class_name="StableDiffusionPipeline", unet=[library, "UNet2DConditionModel"])
        )
    )
    with pytest.raises(UserError, match="code of a folder is never run"):
        load_pipeline(str(tmp_path), prompts=["x"])


@pytest.mark.parametrize(
    "name",
    [["StableDiffusionPipeline"], {}, None, 5, "DiffusionPipeline", "../StableDiffusionPipeline"],
    ids=str,
)
def test_other_classes_of_pipelines(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(dict(_class_name=name)))
    with pytest.raises(UserError, match="expected one of the pipelines"):
        load_pipeline(str(tmp_path), prompts=["x"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pipelines_with_pickles_and_remote_code(tmp_path):
    """A whole tiny pipeline: every file of weights in turn as a pickle under the old name, and configurations that point at code."""
    from helpers import pipelines

    pipelines.sd15(tmp_path / "good")
    marker = tmp_path / "executed"

    def refused(home):
        with pytest.raises(UserError) as e:
            load_pipeline(
                str(home), prompts=["x"], cache=tmp_path / f"cache-{home.name}", say=lambda *a: None
            )
        assert "\n" not in str(e.value) and not marker.exists(), str(e.value)

    for i, path in enumerate(sorted((tmp_path / "good").rglob("*.safetensors"))):
        home = tmp_path / f"bad-{i}"
        shutil.copytree(tmp_path / "good", home)
        path = home / path.relative_to(tmp_path / "good")
        path.unlink()
        for old in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.bin"):
            torch.save(dict(x=Bomb(marker)), path.parent / old)
        refused(home)
        WRITERS["pickle"](Bomb(marker), path)
        refused(home)
    home = tmp_path / "remote"
    shutil.copytree(tmp_path / "good", home)
    code = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
    for part in ("text_encoder", "tokenizer", "unet", "vae", "."):
        (home / part / "modeling_evil.py").write_text(code)
    auto = {k: "modeling_evil.Evil" for k in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    edit(home / "text_encoder" / "config.json", auto_map=auto)
    edit(
        home / "tokenizer" / "tokenizer_config.json",
        auto_map=dict(auto, AutoTokenizer=["modeling_evil.Evil", "modeling_evil.Evil"]),
    )
    edit(home / "unet" / "config.json", auto_map=auto)
    load_pipeline(
        str(home), prompts=["x"], cache=tmp_path / "cache-remote", say=lambda *a: None
    )  # its classes are named, so nobody looks at the code
    assert not marker.exists()


@pytest.mark.slow
def test_a_depth_estimator_with_a_pickle(tmp_path):
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        fusion_hidden_size=8,
        neck_hidden_sizes=[8, 8, 8, 8],
        backbone_out_indices=[0, 1, 2, 3],
    )
    DPTForDepthEstimation(config).save_pretrained(tmp_path / "depth")
    (tmp_path / "depth" / "model.safetensors").unlink()
    torch.save(dict(x=Bomb(tmp_path / "executed")), tmp_path / "depth" / "pytorch_model.bin")
    generator = SimpleNamespace(adapter="dit", image_shape=(3, 32, 32), classes=0)
    with pytest.raises(UserError, match="--control-model"):
        Control("depth", generator, None, 4, str(tmp_path / "depth"))
    edit(
        tmp_path / "depth" / "config.json",
        auto_map=dict(AutoModelForDepthEstimation="evil.Evil"),
        model_type="evil",
    )
    (tmp_path / "depth" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(UserError, match="--control-model"):
        Control("depth", generator, None, 4, str(tmp_path / "depth"))
    assert not (tmp_path / "executed").exists()


# ---- archives and pictures ------------------------------------------------------------------------------------------------------------------------


def zeros(path, mb):
    """An .npz of zeros that is a thousandth of its size on disk."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name in ("images", "mu"):
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, dict(descr="|u1", fortran_order=False, shape=(mb, 1024, 1024))
            )
            with z.open(f"{name}.npy", "w", force_zip64=True) as f:
                f.write(head.getvalue())
                for _ in range(mb):
                    f.write(bytes(2**20))


def test_archives_that_grow(tmp_path):
    zeros(tmp_path / "bomb.npz", 130)  # twice
    assert (tmp_path / "bomb.npz").stat().st_size < 2**19
    for load in (data.load_npz, fid.load_stats):
        with pytest.raises(UserError, match="ValueError"):
            load(tmp_path / "bomb.npz")
    zeros(tmp_path / "small.npz", 1)  # just zeros
    with pytest.raises(UserError, match="expected an .npz with arrays images and labels .KeyError"):
        data.load_npz(tmp_path / "small.npz")
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as z:  # its header promises 2^60 bytes
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, dict(descr="|u1", fortran_order=False, shape=(2**60,))
        )
        z.writestr("images.npy", head.getvalue())
        z.writestr("mu.npy", head.getvalue())
    for load in (data.load_npz, fid.load_stats):
        with pytest.raises(UserError):
            load(tmp_path / "lie.npz")


def test_pictures_that_are_programs(tmp_path, monkeypatch):
    """PostScript in a .png: pillow would hand it to ghostscript."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) show\nshowpage\n%%EOF\n"
    )
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("ghostscript was asked")
    )
    for size in (None, 8):
        with pytest.raises(ValueError, match="UnidentifiedImageError"):
            read_image(tmp_path / "a.png", 3, size)


def test_names_that_are_no_text(scripts, tmp_path):
    """A file's name need not be UTF-8; naming the skipped file on the terminal must not end the run."""
    (tmp_path / "set" / "0").mkdir(parents=True)
    open(os.fsencode(tmp_path / "set" / "0") + b"/\xff.png", "w").close()
    p = scripts.start(
        "dmd2.py",
        "--teacher",
        "toy",
        "--gan",
        "--data",
        tmp_path / "set",
        "--batch",
        8,
        "--smoke",
        "--out",
        tmp_path / "run",
        PYTHONIOENCODING="utf-8",
    )
    assert (
        p.wait() == 2 and "Traceback" not in p.err and "found none readable (1 skipped)" in p.err
    ), p.err


# ---- a crafted checkpoint -------------------------------------------------------------------------------------------------------------------


def parts():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    net.copy = lambda: torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    opt.zero_grad()
    return dict(student=net, opt_g=opt, ema=EMA(net, 100))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("it"),
        lambda c: c.update(it=-1),
        lambda c: c.update(it="2"),
        lambda c: c.update(it=torch.ones(2)),
        lambda c: c.update(seconds="long"),
        lambda c: c.update(seconds=float("nan")),
        lambda c: c.update(log_bytes=-5),
        lambda c: c.pop("skipped"),
        lambda c: c.update(state=[]),
        lambda c: c.update(state=None),
        lambda c: c.update(header=torch.zeros(5)),
        lambda c: c.update(header=torch.ones(3, 2)),
        lambda c: c["state"].update(opt_g=dict(state=3, param_groups=4)),
        lambda c: c["state"].update(ema=5),
        lambda c: c["state"]["ema"].pop("images"),
        lambda c: c["state"]["opt_g"]["state"][0].update(exp_avg=torch.zeros(5, 5)),
        lambda c: c["state"]["opt_g"]["state"][0].pop("exp_avg_sq"),
        lambda c: c["state"]["opt_g"]["state"][1].update(step=torch.ones(2)),
        lambda c: c["state"]["opt_g"]["state"][0].update(exp_avg="x"),
        lambda c: c["state"]["student"].update(weight=torch.zeros(2, 3).bool().tolist()),
    ],
)
def test_a_crafted_checkpoint_is_refused(change, run, capsys):  # noqa: F811
    r = run()
    r.save(1, parts())
    path = r.checkpoints()[0]
    r.lock.close()
    payload = torch.load(path, weights_only=True)
    change(payload)
    torch.save(payload, path)
    with pytest.raises(UserError, match="--resume") as e:
        run("--resume").resume(parts())
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_what_is_no_mistake_of_the_code():
    """Faults that get one line instead of a traceback, and others that do not."""
    assert "lower --batch" in explain_fault(MemoryError()) and "lower --batch" in explain_fault(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert "lower --batch" in explain_fault(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    ) and "--deterministic" in explain_fault(
        RuntimeError("x does not have a deterministic implementation")
    )
    assert "another process" in explain_fault(
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
        )
    )
    assert (
        "No space left" in explain_fault(OSError(28, "No space left on device", "x"))
        and explain_fault(RuntimeError("shapes cannot be multiplied")) is None
        and explain_fault(RuntimeError("")) is None
    )
