"""Folders and files of strangers. Wherever a file is read, a pickle that runs code, a name that
leads out of the folder, and an archive that grows beyond measure are refused in one line; nothing
is executed, and nothing is written.

Captions: test_captions.py. Images: test_data.py. Flags, damaged files: test_fuzz.py.
"""

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
from helpers.files import PICKLES, Bomb, edit, training_parts
from helpers.teachers import quiet
from PIL import EpsImagePlugin, Image

import eval as evaluation_script
from common import fid
from common.errors import RunError, UserError, explain_fault
from common.features import ClassifierExtractor
from common.files import ROOT, WEIGHTS
from common.model import EXTRAS
from common.teachers.formats import check_evaluation
from common.teachers.imagenet import read_checkpoint
from common.teachers.latents import load_latents
from common.teachers.load import load_model, load_pipeline, load_teacher
from common.teachers.prompts import embed_prompts
from controls.maps import Control
from data import images as data
from data.image_file import read_image
from tools.inception import load_inception
from tools.regression import Pairs
from tools.rows import prompt_kwargs

TOY, MNIST = ROOT / "assets" / "toy", ROOT / "assets" / "mnist"


# ---- a pickle in the place of a file -------------------------------------------------------------
# Each function gets an empty folder and make_run. It returns the path of the file that a pickle
# replaces, and a function that then reads it.


def teacher_weights(tmp, make_run):
    shutil.copytree(TOY, tmp / "t")
    return tmp / "t" / WEIGHTS, lambda: load_teacher(str(tmp / "t"))


def save_student(folder, student, teacher):
    """-> a function that loads the student again."""
    student.save(folder, dict(method="dmd2"))
    info = json.loads((folder / "distill.json").read_text())["model"]
    return lambda: load_model(folder, info, teacher)


def student_weights(tmp, make_run):
    teacher = load_teacher("toy")
    return tmp / WEIGHTS, save_student(tmp, teacher.copy(), teacher)


def student_extras(tmp, make_run):
    teacher = load_teacher("toy")
    return tmp / EXTRAS, save_student(tmp, teacher.copy().extend("s"), teacher)


def student_lora(tmp, make_run):
    teacher = load_teacher("toy")
    adapters = dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")
    load = save_student(tmp, teacher.copy(adapters), teacher)
    return tmp / "pytorch_lora_weights.safetensors", load


def mnist_without_network(tmp):
    """What the measurement of mnist's samples needs of it."""
    for name in ("classifier.safetensors", "stats.npz", "images.npz", "teacher.json"):
        shutil.copy(MNIST / name, tmp / name)
    info = json.loads((tmp / "teacher.json").read_text())
    return SimpleNamespace(
        folder=tmp,
        shape=(1, 28, 28),
        image_shape=(1, 28, 28),
        prompts=None,
        classes=10,
        adapter="dit",
        parameters=lambda: iter([torch.zeros(1)]),
        evaluation=check_evaluation(tmp / "teacher.json", info["evaluation"]),
    )


def classifier(tmp, make_run):
    teacher = mnist_without_network(tmp)
    return tmp / "classifier.safetensors", lambda: ClassifierExtractor(teacher)


def statistics(tmp, make_run):
    teacher = mnist_without_network(tmp)
    return tmp / "stats.npz", lambda: ClassifierExtractor(teacher)


def images(tmp, make_run):
    teacher = mnist_without_network(tmp)
    return tmp / "images.npz", lambda: data.load_images(None, teacher, quiet)


def reference(tmp, make_run):
    return tmp / "ref.npz", lambda: fid.load_stats(tmp / "ref.npz")


def inception(tmp, make_run):
    path = tmp / "inception.pth"
    return path, lambda: load_inception(path, force=True)


def checkpoint(tmp, make_run):
    net, run = torch.nn.Linear(2, 2), make_run()
    run.save(0, dict(net=net))
    (path,) = run.checkpoints()
    run.close()

    def load():
        run = make_run("--resume")
        try:
            run.resume(dict(net=net))
        finally:
            run.close()

    return path, load


class FakePipeline:
    """Embeds a prompt as three ones."""

    most_tokens = {}
    text_needs_network = False
    takes_image = False

    @classmethod
    def text_pipeline(cls, folder, dtype):
        return SimpleNamespace(to=lambda device: None)

    @classmethod
    def embed(cls, pipe, prompts):
        return dict(text=torch.ones(len(prompts or [""]), 3))


def embeddings(tmp, make_run):
    def load():
        options = ("cpu", torch.float32, tmp / "cache", quiet)
        embed_prompts(FakePipeline, tmp, ["a", "b"], *options)

    load()
    return next((tmp / "cache").glob("*/00000.safetensors")), load


def latents(tmp, make_run):
    (tmp / "set").mkdir()
    (tmp / "vae").mkdir()
    Image.new("RGB", (16, 16)).save(tmp / "set" / "0.png")
    teacher = SimpleNamespace(
        shape=(4, 2, 2),
        image_shape=(3, 16, 16),
        vae=SimpleNamespace(dtype=torch.float32),
        vae_folder=tmp / "vae",
        folder=tmp,
        cache=tmp / "cache",
        device="cpu",
        encode_images=lambda x: torch.zeros(len(x), 4, 2, 2),
    )

    def load():
        labels = torch.zeros(1, dtype=torch.int64)
        load_latents(tmp / "set", teacher, [tmp / "set" / "0.png"], labels, ["one"], quiet)

    load()
    return next((tmp / "cache").glob("*/00000.safetensors")), load


def noise_pairs(tmp, make_run):
    run, teacher = make_run(), load_teacher("toy")
    load = lambda: Pairs(run, teacher, 3, 1.0)
    load()
    return next(run.out.glob("pairs-*/*.safetensors")), load


def sit(tmp, make_run):
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
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_pickle_is_not_executed(place, make_run, tmp_path, capsys):
    (tmp_path / "place").mkdir()
    path, load = place(tmp_path / "place", make_run)
    marker = tmp_path / "executed"
    for name, write in PICKLES.items():
        write(Bomb(marker), path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((UserError, RunError)) as e:
            load()
        assert not marker.exists(), name
        assert sorted(tmp_path.rglob("*")) == before, name
        check_one_line(e.value)
        assert path.name in str(e.value) or str(path.parent)[-20:] in str(e.value), name
    assert "Traceback" not in capsys.readouterr().err


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


def check_one_line(error, limit=600):
    assert "\n" not in str(error), error
    assert len(str(error)) < limit, error


# ---- teacher.json --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A toy teacher of a stranger."""
    return shutil.copytree(TOY, tmp_path / "strange")


WAYS_OUT = ["../secret", "/etc/passwd", "a/../../b", "", 5, ["stats.npz"], None, "a\0b"]


@pytest.mark.parametrize("key", ["classifier", "reference", "images", "labels"])
@pytest.mark.parametrize("value", WAYS_OUT)
def test_teacher_json_names_files_of_its_folder(key, value, folder):
    edit(folder / "teacher.json", evaluation={key: value})
    says = f"--teacher .*evaluation.{key}: expected a file in this folder"
    with pytest.raises(UserError, match=says):
        load_teacher(str(folder))


RESULT = dict(nfe=1, cfg=1, protocol="x")


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(names="ten"), "names: expected a list of names"),
        (dict(names=[]), "names: expected a list of names"),
        (dict(names=[1]), "names: expected a list of names"),
        (dict(protocol=3), "protocol: expected text"),
        (dict(stages=0), "stages: expected an integer from 1 to 5"),
        (dict(stages=True), "stages: expected an integer from 1 to 5"),
        (dict(groups="x"), "groups: expected a list of integers"),
        (dict(groups=[-1]), "groups: expected a list of integers"),
        (dict(groups=[0]), "groups: expected, for each of 0 kinds"),
        (dict(groups=[1], kinds=["a"], names=["b"]), "groups: expected, for each of 1 kinds"),
        (dict(measured={}), "measured: expected a list of results"),
        (dict(measured=[{}]), "measured: expected a list of results"),
        (dict(measured=[RESULT | dict(cfg="1")]), "measured: expected a list of results"),
        (dict(measured=[RESULT | dict(fd="low")]), "measured: expected a list of results"),
    ],
)
def test_evaluation_is_checked_before_training(changes, says, folder):
    """It is used at the end of a run, where a mistake is expensive."""
    edit(folder / "teacher.json", evaluation=changes)
    with pytest.raises(UserError, match=f"evaluation.{says}"):
        load_teacher(str(folder))


def test_a_good_evaluation(folder):
    evaluation = dict(groups=[0, 0], kinds=["a", "b"], names=["c"], measured=[RESULT], stages=5)
    edit(folder / "teacher.json", evaluation=evaluation)
    assert load_teacher(str(folder)).evaluation == evaluation


@pytest.mark.parametrize(
    "change",
    [dict(weights="../sit.pt"), dict(weights="/sit.pt"), dict(vae="../vae"), dict(vae="/vae")],
)
def test_sit_names_files_of_its_folder(change, tmp_path):
    home = tmp_path / "t"
    home.mkdir()
    (tmp_path / "vae").mkdir()
    for path in (tmp_path / "sit.pt", home / "sit.pt"):
        torch.save({}, path)
    model = dict(adapter="sit", weights="sit.pt") | change
    (home / "teacher.json").write_text(json.dumps(dict(model=model)))
    (key,) = change
    with pytest.raises(UserError, match=f"{key}: expected a file in this folder"):
        load_teacher(str(home))


# ---- distill.json --------------------------------------------------------------------------------


def test_a_student_does_not_choose_where_we_write(tmp_path):
    """eval.py takes prompts and sizes of the training's flags, but never the cache's folder."""
    args = evaluation_script.parse_args([str(tmp_path)])
    flags = dict(cache_prompts=str(tmp_path / "elsewhere"), prompts="p.txt", size=64)
    text = prompt_kwargs(args, dict(flags=flags))
    assert text["cache"] is None
    assert text["prompts"] == "p.txt"
    assert text["size"] == [64, 64]


def test_flags_of_wrong_types_are_ignored(tmp_path):
    args = evaluation_script.parse_args([str(tmp_path)])
    flags = dict(prompts=5, size="x", frames=[1], embedded_guidance="y", negative_prompt=[1])
    text = prompt_kwargs(args, dict(flags=flags))
    rest = dict(size=None, frames=None, guidance=None, cache=None, loras=None)
    rest |= dict(edits=None)
    assert text == dict(prompts=None, negative=None) | rest


# ---- pipelines -----------------------------------------------------------------------------------


def write_index(home, **index):
    home.mkdir(parents=True, exist_ok=True)
    index = dict(_class_name="StableDiffusionPipeline") | index
    (home / "model_index.json").write_text(json.dumps(index))


FOREIGN = [
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
]


@pytest.mark.parametrize("component", FOREIGN, ids=str)
def test_foreign_modules_of_a_pipeline(component, tmp_path, monkeypatch):
    """model_index.json may name any module and class; code that lies there is not imported."""
    home, marker = tmp_path / "pipe", tmp_path / "executed"
    write_index(home, text_encoder=component)
    (home / "text_encoder").mkdir()
    code = f"open({str(marker)!r}, 'w')"
    (tmp_path / "evil_module.py").write_text(code)
    (home / "text_encoder" / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    says = "text_encoder: expected a component of diffusers or transformers"
    with pytest.raises(UserError, match=says):
        load_pipeline(str(home), prompts=["x"])
    assert not marker.exists()


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_code_that_is_called_like_a_library(library, tmp_path):
    """diffusers tries <part>/<library>.py first, whatever the library is called."""
    write_index(tmp_path, unet=[library, "UNet2DConditionModel"])
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / f"{library}.py").write_text("1 / 0")
    with pytest.raises(UserError, match="code of a folder is never run"):
        load_pipeline(str(tmp_path), prompts=["x"])


CLASS_NAMES = [["StableDiffusionPipeline"], {}, None, 5, "DiffusionPipeline", "../SD"]


@pytest.mark.parametrize("name", CLASS_NAMES, ids=str)
def test_other_classes_of_pipelines(name, tmp_path):
    write_index(tmp_path, _class_name=name)
    with pytest.raises(UserError, match="expected one of the pipelines"):
        load_pipeline(str(tmp_path), prompts=["x"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pipelines_with_pickles(folders, tmp_path):
    """A whole tiny pipeline: every file of weights in turn as a pickle, also under an old name."""
    good, marker = folders("sd15"), tmp_path / "executed"

    def check_refused(home):
        with pytest.raises(UserError) as e:
            load_pipeline(
                str(home), prompts=["x"], cache=tmp_path / f"{home.name}-cache", say=quiet
            )
        assert not marker.exists()
        assert "\n" not in str(e.value)

    for i, path in enumerate(sorted(good.rglob("*.safetensors"))):
        home = shutil.copytree(good, tmp_path / f"bad-{i}")
        path = home / path.relative_to(good)
        path.unlink()
        for old in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.bin"):
            torch.save(dict(x=Bomb(marker)), path.parent / old)
        check_refused(home)
        PICKLES["pickle"](Bomb(marker), path)
        check_refused(home)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_configurations_that_point_at_code(folders, tmp_path):
    """The classes are named in model_index.json, so the folder's code is not needed."""
    home, marker = shutil.copytree(folders("sd15"), tmp_path / "remote"), tmp_path / "executed"
    for part in ("text_encoder", "tokenizer", "unet", "vae", "."):
        code = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
        (home / part / "modeling_evil.py").write_text(code)
    evil = "modeling_evil.Evil"
    auto = dict(AutoConfig=evil, AutoModel=evil, AutoTokenizer=evil)
    edit(home / "text_encoder" / "config.json", auto_map=auto)
    edit(home / "unet" / "config.json", auto_map=auto)
    pair = dict(auto, AutoTokenizer=[evil, evil])
    edit(home / "tokenizer" / "tokenizer_config.json", auto_map=pair)
    load_pipeline(str(home), prompts=["x"], cache=tmp_path / "cache", say=quiet)
    assert not marker.exists()


@pytest.fixture
def depth_estimator(tmp_path):
    """Folder of a depth estimator whose weights are a pickle."""
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
    home = tmp_path / "depth"
    DPTForDepthEstimation(config).save_pretrained(home)
    (home / "model.safetensors").unlink()
    torch.save(dict(x=Bomb(tmp_path / "executed")), home / "pytorch_model.bin")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("with_code", [False, True])
def test_a_depth_estimator_with_a_pickle(with_code, depth_estimator, tmp_path):
    marker = tmp_path / "executed"
    if with_code:
        auto = dict(AutoModelForDepthEstimation="evil.Evil")
        edit(depth_estimator / "config.json", auto_map=auto, model_type="evil")
        (depth_estimator / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    generator = SimpleNamespace(adapter="dit", image_shape=(3, 32, 32), classes=0)
    with pytest.raises(UserError, match="--control-model"):
        Control("depth", generator, None, 4, str(depth_estimator))
    assert not marker.exists()


# ---- archives and images -------------------------------------------------------------------------


def npy_header(*shape):
    header = io.BytesIO()
    fields = dict(descr="|u1", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def write_zeros(path, megabytes):
    """An .npz of two arrays of zeros. On disk it is a thousandth of its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("images", "mu"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                f.write(npy_header(megabytes, 1024, 1024))
                for _ in range(megabytes):
                    f.write(bytes(2**20))


both_loaders = pytest.mark.parametrize("load", [data.load_npz, fid.load_stats])


@both_loaders
def test_an_archive_that_grows(load, tmp_path):
    path = tmp_path / "bomb.npz"
    write_zeros(path, 130)
    assert path.stat().st_size < 2**19
    with pytest.raises(UserError, match="ValueError"):
        load(path)


def test_an_archive_of_a_few_zeros(tmp_path):
    """It compresses as well, but is small."""
    write_zeros(tmp_path / "small.npz", 1)
    says = "expected an .npz with arrays images and labels .KeyError"
    with pytest.raises(UserError, match=says):
        data.load_npz(tmp_path / "small.npz")


@both_loaders
def test_an_archive_whose_header_lies(load, tmp_path):
    path = tmp_path / "lie.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("images", "mu"):
            archive.writestr(f"{name}.npy", npy_header(2**60))
    with pytest.raises(UserError):
        load(path)


@pytest.mark.parametrize("size", [None, 8])
def test_images_that_are_programs(size, tmp_path, monkeypatch):
    """PostScript in a .png: pillow would pass it to ghostscript."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    program += b"(x) show\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(program)
    run = lambda *args, **kwargs: pytest.fail("ghostscript was started")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        read_image(tmp_path / "a.png", 3, size)


def test_names_that_are_no_text(scripts, tmp_path):
    """A file's name need not be UTF-8. To print it must not end the run."""
    (tmp_path / "set" / "0").mkdir(parents=True)
    open(os.fsencode(tmp_path / "set" / "0") + b"/\xff.png", "w").close()
    flags = ["--teacher", "mnist", "--gan", "--data", tmp_path / "set", "--batch", 8, "--smoke"]
    flags += ["--out", tmp_path / "run"]
    p = scripts.run("dmd2.py", *flags, code=2, PYTHONIOENCODING="utf-8")
    assert "Traceback" not in p.err
    assert "found none readable (1 skipped)" in p.err


# ---- a crafted checkpoint ------------------------------------------------------------------------


def adam_state(checkpoint, parameter=0):
    return checkpoint["state"]["opt_g"]["state"][parameter]


CRAFTED = {
    "no iteration": lambda c: c.pop("it"),
    "iteration -1": lambda c: c.update(it=-1),
    "iteration of text": lambda c: c.update(it="2"),
    "iteration of a tensor": lambda c: c.update(it=torch.ones(2)),
    "seconds of text": lambda c: c.update(seconds="long"),
    "seconds of nan": lambda c: c.update(seconds=float("nan")),
    "negative length of the log": lambda c: c.update(log_bytes=-5),
    "no count of skipped steps": lambda c: c.pop("skipped"),
    "state of a list": lambda c: c.update(state=[]),
    "no state": lambda c: c.update(state=None),
    "header of zeros": lambda c: c.update(header=torch.zeros(5)),
    "header of a matrix": lambda c: c.update(header=torch.ones(3, 2)),
    "optimiser of numbers": lambda c: c["state"].update(opt_g=dict(state=3, param_groups=4)),
    "average of a number": lambda c: c["state"].update(ema=5),
    "average without a count": lambda c: c["state"]["ema"].pop("images"),
    "moment of another shape": lambda c: adam_state(c).update(exp_avg=torch.zeros(5, 5)),
    "no second moment": lambda c: adam_state(c).pop("exp_avg_sq"),
    "two steps": lambda c: adam_state(c, 1).update(step=torch.ones(2)),
    "moment of text": lambda c: adam_state(c).update(exp_avg="x"),
    "weight of a list": lambda c: c["state"]["student"].update(weight=[[False] * 3] * 2),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_checkpoint_is_refused(name, make_run, capsys):
    run = make_run()
    run.save(1, training_parts())
    (path,) = run.checkpoints()
    run.close()
    payload = torch.load(path, weights_only=True)
    CRAFTED[name](payload)
    torch.save(payload, path)
    with pytest.raises(UserError, match="--resume") as e:
        make_run("--resume").resume(training_parts())
    check_one_line(e.value)


# ---- faults outside the code ---------------------------------------------------------------------

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
    "Connection closed by peer [127.0.0.1]:1"
)
CPU_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
CUDA_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(
    "fault, says",
    [
        (MemoryError(), "lower --batch"),
        (RuntimeError(CPU_MEMORY), "lower --batch"),
        (torch.OutOfMemoryError(CUDA_MEMORY), "lower --batch"),
        (RuntimeError("x does not have a deterministic implementation"), "--deterministic"),
        (RuntimeError(GLOO), "another process"),
        (OSError(28, "No space left on device", "x"), "No space left"),
    ],
)
def test_faults_outside_the_code_get_one_line(fault, says):
    assert says in explain_fault(fault)


@pytest.mark.parametrize("message", ["shapes cannot be multiplied", ""])
def test_other_faults_keep_their_traceback(message):
    assert explain_fault(RuntimeError(message)) is None
