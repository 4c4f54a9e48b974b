"""LoRA files and workflows for ComfyUI (common/lora.py, common/teachers/comfyui.py).

ComfyUI is no part of the tests. NAMES are the layers that it knows, found on 2026-11-29 by running
its own functions on files like these (docs/comfyui.md has the figures). Its sampling is written
down here in own words, from its nodes' inputs to the samples.
"""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.cards import relative, write_as_run
from helpers.teachers import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_whole import CASES, make_student, perturbed

import dmd2
import phased_dmd
from common import lora
from common.checkpoint import write_checkpoint
from common.errors import UserError
from common.files import ROOT, WEIGHTS, read_json
from common.routed import ByLevel
from common.teachers.comfyui import KINDS
from common.teachers.load import load_model
from common.teachers.whole import RECORD, student_files
from tools.export import export_for_comfyui, main

PROMPTS = ["a red heart", "dog", "pizza 7"]
SPEC = dict(rank=2, alpha=3.0, targets=None, seed=0, flag="--lora")

ATTENTION = "to_q|to_k|to_v|to_out"
UNET = (
    r"lora_unet_(down_blocks_\d|mid_block|up_blocks_\d)_(attentions_\d_transformer_blocks_\d_"
    rf"(attn[12]_({ATTENTION}_0|to_[qkv])|ff_net_(0_proj|2))|attentions_\d_proj_(in|out)|"
    r"resnets_\d_(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers_0_conv)"
    r"|lora_unet_(conv_in|conv_out|time_embedding_linear_[12]|label_emb_0_[02])"
)
JOINT = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
TIME = r"time_text_embed\.(timestep|text)_embedder\.linear_[12]"
NAMES = dict(
    sd15=UNET,
    sdxl=UNET,
    sd3=rf"transformer\.(transformer_blocks\.\d\.({JOINT}|ff(_context)?\.net\.(0\.proj|2))|{TIME})",
    flux=rf"transformer\.((single_)?transformer_blocks\.\d\.({JOINT}|ff(_context)?\.net\."
    rf"(0\.proj|2))|{TIME})",
    qwen=rf"transformer\.(transformer_blocks\.\d\.({JOINT}|(img|txt)_mlp\.net\.(0\.proj|2))|"
    rf"{TIME})",
    zimage=r"transformer\.((layers|context_refiner|noise_refiner)\.\d\.attention\."
    r"(to_[qkv]|to_out\.0)|t_embedder\.mlp\.[02])",
    wan=r"diffusion_model\.(blocks\.\d\.((self|cross)_attn\.[qkvo]|ffn\.[02])|"
    r"(time|text)_embedding\.[02]|time_projection\.1|head\.head)",
)
ALL = {  # further layers than --lora takes by itself
    "sd15": "to_q proj_in proj_out conv1 conv2 conv_shortcut time_emb_proj conv_in conv_out "
    "linear_1 linear_2 conv",
    "sdxl": "to_q proj_in proj_out conv1 conv2 conv_shortcut time_emb_proj conv_in conv_out "
    "linear_1 linear_2 conv",
    "sd3": "to_q linear_1 linear_2",
    "wan": "to_q to_out.0 linear_1 linear_2 time_proj proj_out",
}


def first_network(model):
    return model.experts[0] if hasattr(model, "experts") else model


def make_lora(teacher, spec=SPEC):
    """As after a training: all adapters do something."""
    student = teacher.copy(spec)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return student


def layers_of(tensors):
    return {re.sub(r"\.(lora_(A|B|down|up)\.weight|alpha)$", "", key) for key in tensors}


@pytest.mark.parametrize(
    "kind, wide", [*[(kind, False) for kind in NAMES], *[(kind, True) for kind in ALL]]
)
def test_names_that_comfyui_knows(kind, wide, folders, tmp_path):
    teacher = first_network(load(folders, kind, PROMPTS))
    spec = dict(SPEC, targets=ALL[kind].split()) if wide else SPEC
    student = make_lora(teacher, spec)
    student.save(tmp_path, {})
    tensors = load_file(tmp_path / lora.FILE)
    layers = layers_of(tensors)
    assert [name for name in sorted(layers) if not re.fullmatch(NAMES[kind], name)] == []
    assert len(layers) == len(student.net.state_dict()) // 2
    if kind in ("sd15", "sdxl"):
        assert {float(v) for k, v in tensors.items() if k.endswith(".alpha")} == {2.0}
        assert len(tensors) == 3 * len(layers)


@pytest.mark.parametrize("kind", ALL)
def test_all_layers_are_read_back_by_diffusers(kind, folders, tmp_path):
    """Exactly, by the pipeline's own reader: also convolutions and the embedding of the time."""
    import diffusers

    teacher = first_network(load(folders, kind, PROMPTS))
    student = make_lora(teacher, dict(SPEC, targets=ALL[kind].split()))
    student.save(tmp_path, {})
    pipeline = getattr(diffusers, teacher.pipeline)
    net = type(teacher.net).from_config(teacher.net.config).eval()
    net.load_state_dict(teacher.net.state_dict())
    options = dict(unet_config=net.config) if teacher.part == "unet" else {}
    state = pipeline.lora_state_dict(str(tmp_path), **options)
    if teacher.part == "unet":
        state, alphas = state
        pipeline.load_lora_into_unet(state, alphas, unet=net)
    else:
        pipeline.load_lora_into_transformer(state, transformer=net)
    found = {n: v for n, v in net.state_dict().items() if ".lora_" in n}
    expected = lora.tensors_of(student)
    assert len(found) == len(expected)
    for name, tensor in found.items():
        name = re.sub(r"\.default_0|\.default", "", name)
        assert torch.equal(tensor, expected[name]), name
    scales = {v for m in net.modules() for v in getattr(m, "scaling", {}).values()}
    assert scales == {1.0}


@pytest.mark.parametrize("kind", ["sd15", "wan", "sd3"])
def test_every_form_is_read_back(kind, folders, tmp_path):
    """What older versions wrote (diffusers' names), and alphas of others."""
    teacher = first_network(load(folders, kind, PROMPTS))
    student = make_lora(teacher, dict(SPEC, alpha=2.0))
    student.save(tmp_path, {})
    info = read_json(tmp_path / "distill.json")["model"]
    expected = student.net.state_dict()

    def check(tensors):
        save_file(tensors, tmp_path / lora.FILE)
        found = load_model(tmp_path, info, teacher).net.state_dict()
        assert all(torch.equal(found[name], v) for name, v in expected.items())

    check(load_file(tmp_path / lora.FILE))
    plain = lora.tensors_of(student)
    for form in lora.KEYS.values():
        check({form(teacher.part, name): v for name, v in plain.items()})
    doubled = {}
    for name, v in plain.items():
        doubled[lora.kohya_key(teacher.part, name)] = v / 2 if ".lora_B." in name else v
        if ".lora_A." in name:
            key = lora.kohya_key(teacher.part, name).replace("lora_down.weight", "alpha")
            doubled[key] = torch.tensor(4.0)  # twice the rank
    check(doubled)
    one = next(key for key in doubled if key.endswith("lora_up.weight"))
    with pytest.raises(UserError, match=f"{one} is missing"):
        check({key: v for key, v in doubled.items() if key != one})
    with pytest.raises(UserError, match="2 tensors that the configuration does not know"):
        check(doubled | {"lora_unet_x.alpha": torch.tensor(1.0), "y.alpha": torch.zeros(2)})


def test_a_lora_of_wan_without_blocks(folders, tmp_path):
    """diffusers does not read the original's names then, so the file has diffusers'."""
    teacher = first_network(load(folders, "wan", PROMPTS))
    student = make_lora(teacher, dict(SPEC, targets=["linear_2"]))
    student.save(tmp_path, {})
    assert layers_of(load_file(tmp_path / lora.FILE)) == {
        "transformer.condition_embedder.time_embedder.linear_2",
        "transformer.condition_embedder.text_embedder.linear_2",
    }


# ---- workflows -----------------------------------------------------------------------------------

OUTPUTS = dict(  # numbers of outputs of ComfyUI's nodes, other than one
    CheckpointLoaderSimple=3,
    SplitSigmas=2,
    SamplerCustom=2,
    LoraLoader=2,
    SaveImage=0,
    SaveAnimatedWEBP=0,
)


def check_links(nodes):
    """Every link points to an output of an earlier node, and every node is used."""
    used = set()
    for number, node in nodes.items():
        for value in node["inputs"].values():
            if isinstance(value, list):
                source, output = value
                assert int(source) < int(number)
                assert output < OUTPUTS.get(nodes[source]["class_type"], 1)
                used.add(source)
    last = [number for number in nodes if number not in used]
    assert [nodes[number]["class_type"] for number in last] in (["SaveImage"], ["SaveAnimatedWEBP"])


def find(nodes, *class_types):
    return [node for node in nodes.values() if node["class_type"] in class_types]


def table_of(nodes, kind):
    """ComfyUI's noise levels of a model, rising."""
    if kind in ("sd15", "sdxl"):
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - beta).cumprod(0)
        return ((1 - alphas) / alphas).sqrt().float()
    node = find(nodes, KINDS[kind]["shift"])[0]
    inputs = node["inputs"]
    if node["class_type"] == "ModelSamplingFlux":
        t = torch.arange(1, 10001) / 10000
        slope = (inputs["max_shift"] - inputs["base_shift"]) / (4096 - 256)
        tokens = inputs["width"] * inputs["height"] / 256
        mu = tokens * slope + inputs["base_shift"] - slope * 256
        return math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    t = torch.arange(1, 1001) / 1000
    return inputs["shift"] * t / (1 + (inputs["shift"] - 1) * t)


def stages_of(nodes, kind):
    """-> [(sampler, its sigmas)], one for each node that samples."""
    if manual := find(nodes, "ManualSigmas"):
        text = manual[0]["inputs"]["sigmas"]
        assert re.fullmatch(r"(\d+\.\d{8}, )+0\.00000000", text)
        sigmas = [float(s) for s in re.findall(r"[\d.]+", text)]
        name = find(nodes, "KSamplerSelect")[0]["inputs"]["sampler_name"]
        return [(name, sigmas)]
    stages = []
    for node in find(nodes, "KSampler", "KSamplerAdvanced"):
        inputs = node["inputs"]
        assert (inputs["cfg"], inputs["scheduler"]) == (1.0, "simple")
        table, n = table_of(nodes, kind), inputs["steps"]
        sigmas = [float(table[-(1 + int(i * (len(table) / n)))]) for i in range(n)] + [0.0]
        first, last = inputs.get("start_at_step", 0), inputs.get("end_at_step", n)
        stages.append((inputs["sampler_name"], sigmas[first : last + 1]))
    return stages


@torch.no_grad()
def run_workflow(nodes, models, z, cond, noise):
    """ComfyUI's samples from unit noise z. models: for each node that samples."""
    kind = models[0].adapter
    vp = kind in ("sd15", "sdxl")
    table = table_of(nodes, kind).log() if vp or not find(nodes, "ManualSigmas") else None
    x = None
    for model, (sampler, sigmas) in zip(models, stages_of(nodes, kind), strict=True):
        if x is None:
            pure = vp and math.isclose(sigmas[0], float(table[-1].exp()), rel_tol=1e-5)
            x = z * (math.sqrt(1 + sigmas[0] ** 2) if pure else sigmas[0])
        for sigma, following in zip(sigmas, sigmas[1:]):
            t = int((table - math.log(sigma)).abs().argmin()) if vp else sigma
            seen = x / math.sqrt(sigma**2 + 1) if vp else x
            x0 = x - sigma * model.predict(seen, torch.full((len(x),), float(t)), cond)
            if following == 0:
                x = x0
            elif sampler == "lcm":
                x = (1 if vp else 1 - following) * x0 + following * noise()
            else:
                assert sampler == "euler"
                x = x + (x - x0) / sigma * (following - sigma)
    return x


def check_samples(home, models, student, teacher, module, nfe, sampler):
    """The workflow beside a student gives the samples of its script."""
    nodes = json.loads((home / "comfyui.json").read_text())
    check_links(nodes)
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode([0])
    drawn = []

    def noise():
        drawn.append(torch.randn(z.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1]

    with torch.no_grad():
        ours = module.sample(student, z, cond, nfe, noise, **sampler)
    again = iter(drawn)
    theirs = run_workflow(nodes, models, z, cond, lambda: next(again))
    assert relative(theirs, ours) < 1e-5
    assert next(again, None) is None
    record = read_json(home / "distill.json")
    times = torch.tensor(record["plain"]["times"], dtype=torch.float64)
    sigmas = [s for _, part in stages_of(nodes, teacher.adapter) for s in part[:-1]] + [0.0]
    schedule = teacher.schedule
    levels = schedule.sigma(times) / schedule.alpha(times) if schedule.unit_norm else times
    assert (torch.tensor(sigmas[:-1], dtype=torch.float64) - levels).abs().max() < 1e-6
    return nodes


def test_the_table_of_the_page():
    rows = []
    for case in CASES:
        name = case.replace(" --nfe ", "_").replace(" --", "_")
        cells = []
        for kind in ("sd15", "sd3"):
            found, manual = (names.split() for names in EXPECTED[kind])
            cells.append("ManualSigmas" if name in manual else "simple" if name in found else "no")
        rows.append(f"| {case} | {' | '.join(cells)} |")
    assert "\n".join(rows) in (ROOT / "docs" / "comfyui.md").read_text()


EXPECTED = {  # kind -> scripts with a workflow, and of these: those with steps in the workflow
    "sd15": ("dmd2 decoupled_dmd sid boot sana_sprint_1 swiftbrush", "sid"),
    "sd3": (
        "dmd2 decoupled_dmd sid phased_dmd twinflow_steps flowmap boot sana_sprint sana_sprint_1 "
        "swiftbrush anyflow",
        "sana_sprint",
    ),
}
EXPECTED["flux"] = EXPECTED["wan"] = EXPECTED["sd3"]
SLOW = ("flux", "wan")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in EXPECTED]
)
def test_workflows(kind, folders, tmp_path):
    """Of every script whose sampler ComfyUI has, with the weights that it would load."""
    teacher = load(folders, kind, PROMPTS)
    found, manual = set(), set()
    for case, (module, nfe, sampler, inputs) in CASES.items():
        name = case.replace(" --nfe ", "_").replace(" --", "_")
        home = tmp_path / name
        if kind == "wan" and inputs:
            continue  # its LoRA would have one more adapter than `loaded` below
        student = make_student(teacher, inputs, SPEC if kind == "wan" else None)
        record = write_as_run(home, student, teacher, module.__name__, module, nfe, sampler)
        if not (home / "comfyui.json").exists():
            assert "comfyui" not in record["plain"]
            continue
        found.add(name)
        loaded = load_model(home, record["model"], teacher)
        if inputs:  # the network without them, as plain programs load it
            loaded = teacher.copy()
            tensors = load_file(home / teacher.part / WEIGHTS)
            loaded.net.load_state_dict({k: v for k, v in tensors.items() if "cond_proj" not in k})
        nodes = check_samples(home, [loaded], student, teacher, module, nfe, sampler)
        if find(nodes, "ManualSigmas"):
            manual.add(name)
        text = (home / "README.md").read_text()
        assert "ComfyUI: copy" in text
        assert ("ManualSigmas" in text) == (name in manual)
        student_file = f"{teacher.folder.name}-{module.__name__}-{nfe}.safetensors"
        assert student_file in json.dumps(nodes)
        assert student_file in text
    expected, expected_manual = (set(names.split()) for names in EXPECTED[kind])
    if kind == "wan":
        expected = {"dmd2", "decoupled_dmd", "sid", "phased_dmd", "swiftbrush"}
    assert found == expected
    assert manual == expected_manual & found


@pytest.mark.parametrize("module, sampler", [(phased_dmd, dict(step_shift=5.0)), (dmd2, {})])
def test_two_experts(module, sampler, folders, tmp_path):
    """The second LoRA takes over between two steps; the noise of both parts differs."""
    teacher = first_network(load(folders, "wan", PROMPTS))
    experts = [perturbed(teacher.copy(SPEC), seed) for seed in (3, 4)]
    student = ByLevel(experts, [2.0])  # sigma / alpha: between t = 0.75 and 0.5, or 0.83 and 0.63
    record = write_as_run(tmp_path, student, teacher, module.__name__, module, 4, sampler)
    loaded = load_model(tmp_path, record["model"], teacher)
    nodes = check_samples(tmp_path, loaded.experts, student, teacher, module, 4, sampler)
    first, second = find(nodes, "KSamplerAdvanced")
    assert first["inputs"]["return_with_leftover_noise"] == "enable"
    assert second["inputs"]["add_noise"] == "disable"
    assert first["inputs"]["noise_seed"] != second["inputs"]["noise_seed"]
    assert len(find(nodes, "LoraLoaderModelOnly")) == 2
    assert "of each expert" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("spec", [None, SPEC])
def test_loras_of_the_teacher(spec, folders, tmp_path):
    """Whole weights contain the LoRA, so that ComfyUI adds it to the text encoders alone, and not
    at all if it does not change them."""
    teacher = copy.copy(load(folders, "sd15", PROMPTS))
    records = [dict(file=f"{name}.safetensors", scale=0.8) for name in ("style", "network")]
    teacher.loras = [SimpleNamespace(changes_text=True), SimpleNamespace(changes_text=False)]
    write_run(tmp_path / "run", make_student(teacher, (), spec), teacher, teacher_lora=records)
    path = export_for_comfyui(tmp_path / "run", tmp_path)[-1]
    nodes = json.loads(path.read_text())
    check_links(nodes)
    style, *network = find(nodes, "LoraLoader")
    strengths = style["inputs"]["strength_model"], style["inputs"]["strength_clip"]
    assert style["inputs"]["lora_name"] == "style.safetensors"
    assert strengths == ((0.0 if spec is None else 0.8), 0.8)
    assert [n["inputs"]["lora_name"] for n in network] == (
        [] if spec is None else ["network.safetensors"]
    )
    last = [style, *network][-1]
    number = next(number for number, node in nodes.items() if node is last)
    assert find(nodes, "CLIPTextEncode")[0]["inputs"]["clip"] == [number, 1]
    assert find(nodes, "KSampler")[0]["inputs"]["model"] == [number, 0]


def test_what_comfyui_cannot_load_has_no_workflow(folders, tmp_path):
    """It has no SANA, and does not convert Wan's whole networks. Wan 2.2 5B was not tried."""
    for kind, spec in (("sana", None), ("wan", None), ("wan5b", SPEC)):
        teacher = first_network(load(folders, kind, PROMPTS))
        home = tmp_path / kind
        student = make_student(teacher, (), spec)
        record = write_as_run(home, student, teacher, "dmd2", dmd2, 4, {})
        assert "comfyui" not in record["plain"]
        assert not (home / "comfyui.json").exists()
        assert "ComfyUI" not in (home / "README.md").read_text()


# ---- tools.export --comfyui ----------------------------------------------------------------------


def write_run(run, student, teacher, **changes):
    """A folder with a checkpoint that holds the student of a dmd2."""
    files, entries = student_files(student, teacher, dmd2.sample, {}, 4)
    record = dict(method="dmd2", teacher=str(teacher.folder), nfe=4, cfg=3.0, sampler={})
    files[RECORD] = record | entries | changes
    (run / "ckpt").mkdir(parents=True)
    write_checkpoint(run, 3, dict(student=files))


@pytest.mark.parametrize("spec", [None, SPEC])
def test_export(spec, folders, tmp_path, monkeypatch, capsys):
    """One file, however large: without the input that no program but diffusers knows."""
    from common import files as files_module

    monkeypatch.setattr(files_module, "LARGEST_FILE", 1000)
    teacher = load(folders, "sd15", PROMPTS)
    student = make_student(teacher, (), spec)
    write_run(tmp_path / "run", student, teacher)
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "run"), "--comfyui", str(tmp_path)])
    main()
    name = f"{teacher.folder.name}-dmd2-4"
    paths = [tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"]
    assert capsys.readouterr().out.split() == ["ComfyUI:", str(paths[0]), "ComfyUI:", str(paths[1])]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        p.name for p in paths[::-1]
    ]
    tensors = load_file(paths[0])
    if spec is None:
        assert tensors.keys() == student.net.state_dict().keys()
        assert all(torch.equal(tensors[k], v) for k, v in student.net.state_dict().items())
    else:
        expected = lora.to_file(student, lora.tensors_of(student))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[k], v) for k, v in expected.items())
    with safe_open(paths[0], "pt") as f:
        metadata = f.metadata()
    assert metadata["distill.method"] == "dmd2"
    kohya = "https://github.com/Stability-AI/generative-models"
    assert metadata["modelspec.implementation"] == ("diffusers" if spec is None else kohya)
    nodes = json.loads(paths[1].read_text())
    check_links(nodes)
    loader = "UNETLoader" if spec is None else "LoraLoaderModelOnly"
    assert paths[0].name in find(nodes, loader)[0]["inputs"].values()


def test_export_mistakes(folders, tmp_path, monkeypatch):
    teacher = load(folders, "sana", PROMPTS)
    write_run(tmp_path / "run", make_student(teacher), teacher)
    with pytest.raises(UserError, match="--comfyui: .*expected a student that ComfyUI can sample"):
        export_for_comfyui(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for more in (["--to", "x"], ["--copy"], ["--merge-teacher-lora"]):
        args = ["export", str(tmp_path / "run"), "--comfyui", str(tmp_path / "out"), *more]
        monkeypatch.setattr("sys.argv", args)
        with pytest.raises(UserError, match="--comfyui: expected none of --to, --copy"):
            main()
