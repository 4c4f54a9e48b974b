"""common/models.py: loading (every bad input is one line), saving, copies, and the DiT adapter against diffusers itself, on random networks of 30k weights."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.model import ScalarEmbedding
from common.routed import ByLabel, ByLevel
from common.schedules import EDM, VP, Flow, TrigFlow
from common.teachers.dit import DiT
from common.teachers.load import load_model, load_teacher
from common.teachers.toy import MLP, Toy

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZE = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=1,
    out_channels=1,
    num_layers=2,
    sample_size=28,
    patch_size=7,
    num_embeds_ada_norm=10,
)


def tiny(**kw):
    torch.manual_seed(0)
    net = DiT.network(dict(SIZE, **kw))
    with torch.no_grad():
        for (
            p
        ) in net.parameters():  # diffusers starts some layers at zero: the blocks would not matter
            p.normal_(0, 0.15)
    return DiT(net, Flow(), "flow", (1, 28, 28), 10)


@pytest.fixture(scope="module")
def dit():
    return tiny().requires_grad_(False)


@pytest.fixture
def folder(dit, tmp_path):
    dit.save(
        tmp_path / "teacher", dict(name="tiny", evaluation=dict(protocol="none")), "teacher.json"
    )
    return tmp_path / "teacher"


def batch(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 28, 28, generator=g), torch.arange(n) % 10


def edit(path, **changes):
    """Changes fields of a JSON file; None removes one."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


# ---- bad input: one line that names the file ---------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this creates a marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def model_field(**changes):
    return lambda f: edit(
        f / "teacher.json",
        model=dict(json.loads((f / "teacher.json").read_text())["model"], **changes),
    )


def tensors(change):
    def apply(f):
        found = load_file(f / WEIGHTS)
        change(found)
        save_file(found, f / WEIGHTS)

    return apply


def cut(size):
    return lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:size])


NORM, PATCH = "transformer_blocks.0.norm1.linear.weight", "pos_embed.proj.weight"
BAD = {  # name: (what is done to a good folder, what the message must say)
    "no teacher.json": (lambda f: (f / "teacher.json").unlink(), ["teacher.json"]),
    "teacher.json not JSON": (
        lambda f: (f / "teacher.json").write_text('{"model": '),
        ["teacher.json", "JSON"],
    ),
    "teacher.json binary": (
        lambda f: (f / "teacher.json").write_bytes(b"\xff\xfe\x00"),
        ["teacher.json", "JSON"],
    ),
    "teacher.json nested": (
        lambda f: (f / "teacher.json").write_text("[" * 100000),
        ["teacher.json", "JSON"],
    ),
    "teacher.json not an object": (
        lambda f: (f / "teacher.json").write_text("[1, 2]"),
        ["teacher.json", "object", "list"],
    ),
    "no model": (lambda f: edit(f / "teacher.json", model=None), ["teacher.json", "model"]),
    "model not an object": (
        lambda f: edit(f / "teacher.json", model="dit"),
        ["teacher.json", "model", "str"],
    ),
    "evaluation not an object": (
        lambda f: edit(f / "teacher.json", evaluation=[1]),
        ["teacher.json", "evaluation"],
    ),
    "no adapter": (model_field(adapter=None), ["adapter", "dit"]),
    "unknown adapter": (model_field(adapter="unet"), ["adapter", "unet"]),
    "adapter not a name": (model_field(adapter=["dit"]), ["adapter"]),
    "no schedule": (lambda f: edit(f / "teacher.json", model=dict(adapter="dit")), ["schedule"]),
    "unknown schedule": (model_field(schedule=dict(name="cosine")), ["cosine"]),
    "schedule not an object": (model_field(schedule="flow"), ["schedule"]),
    "wrong schedule value": (model_field(schedule=dict(name="flow", shift="3")), ["shift"]),
    "unknown prediction": (model_field(prediction="velocity"), ["velocity"]),
    "shape not a list": (model_field(shape=28), ["int"]),
    "shape not the network's": (model_field(shape=[3, 32, 32]), ["shape", "config.json"]),
    "classes not the network's": (model_field(classes=1000), ["classes", "config.json"]),
    "classes not a number": (model_field(classes="ten"), ["ten"]),
    "sigma_data not positive": (model_field(sigma_data=-1), ["sigma_data"]),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config.json not JSON": (
        lambda f: (f / "config.json").write_text("dit"),
        ["config.json", "JSON"],
    ),
    "config.json of another class": (
        lambda f: edit(f / "config.json", _class_name="UNet2DModel"),
        ["config.json", "UNet2DModel", "DiTTransformer2DModel"],
    ),
    "config.json without class": (
        lambda f: edit(f / "config.json", _class_name=None),
        ["config.json", "_class_name"],
    ),
    "config.json with a wrong value": (
        lambda f: edit(f / "config.json", num_layers="two"),
        ["configuration"],
    ),
    "config.json that cannot be built": (
        lambda f: edit(f / "config.json", patch_size=0),
        ["configuration"],
    ),
    "config.json of another size": (
        lambda f: edit(f / "config.json", num_layers=3),
        [WEIGHTS, "transformer_blocks.2", "missing"],
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "safetensors"]),
    "weights are a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), [WEIGHTS]),
    "empty file": (cut(0), [WEIGHTS]),
    "cut in the header": (cut(100), [WEIGHTS]),
    "cut in the data": (cut(-1000), [WEIGHTS]),
    "header of 2^60 bytes": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        [WEIGHTS],
    ),
    "wrong shape": (
        tensors(lambda t: t.update({PATCH: t[PATCH][:, :, :5, :5].contiguous()})),
        [WEIGHTS, PATCH, "[32, 1, 7, 7]", "[32, 1, 5, 5]"],
    ),
    "missing tensor": (tensors(lambda t: t.pop(NORM)), [WEIGHTS, NORM, "missing"]),
    "extra tensor": (tensors(lambda t: t.update(lora=torch.zeros(1))), [WEIGHTS, "lora"]),
}


@pytest.mark.parametrize("spoil, says", BAD.values(), ids=BAD.keys())
def test_bad_folder(folder, spoil, says):
    spoil(folder)
    with pytest.raises(UserError) as e:
        load_teacher(str(folder))
    text = str(e.value)
    assert str(folder) in text and all(word in text for word in says), text
    assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "writer",
    [lambda v, path: path.write_bytes(pickle.dumps(v)), lambda v, path: torch.save(v, path)],
    ids=["pickle", "torch.save"],
)
def test_a_pickle_is_not_executed(folder, tmp_path, name, writer):
    marker = tmp_path / "executed"
    (folder / WEIGHTS).unlink()
    writer(Bomb(marker), folder / name)
    with pytest.raises(UserError, match=WEIGHTS):
        load_teacher(str(folder))
    assert not marker.exists()
    pickle.loads(
        pickle.dumps(Bomb(marker))
    ).close()  # the bomb is live: it goes off when somebody does unpickle it
    assert marker.exists()


def test_a_pickle_beside_good_weights_is_not_read(folder, tmp_path):
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    load_teacher(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("mnsit", "did you mean mnist?"),
        ("toy-con", "toy-cond"),
        ("/no/such/folder", "expected toy, toy-cond, mnist, emoji, emoji-flow, sd15"),
        ("x" * 5000, "or a folder"),
        ("a\0b", "or a folder"),
        ("", "found"),
    ],
)
def test_unknown_teacher(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        load_teacher(name)
    assert "--teacher" in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_foreign_folder(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="expected one of the pipelines"):
        load_teacher(str(tmp_path))
    with pytest.raises(UserError, match="or a folder"):
        load_teacher(str(tmp_path / "model_index.json"))  # a file


def test_a_student_is_no_teacher(dit, tmp_path):
    dit.save(tmp_path, dict(method="dmd2"))
    with pytest.raises(UserError, match="student of this project; give its teacher"):
        load_teacher(str(tmp_path))


# ---- save, load, copy -------------------------------------------------------------------------------------------------------------------


def test_save_and_load(dit, folder):
    twin = load_teacher(str(folder))
    x, y = batch()
    assert torch.equal(twin(x, 0.3, 0.7, twin.encode(y)), dit(x, 0.3, 0.7, dit.encode(y)))
    assert (
        twin.config() == dit.config()
        and twin.folder == folder
        and twin.evaluation == dict(protocol="none")
    )
    assert not any(p.requires_grad for p in twin.parameters())
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        WEIGHTS,
        "teacher.json",
    ]  # no temporary file


def test_student_folder_round_trip(dit, tmp_path):
    dit.copy().save(tmp_path, dict(method="dmd2", nfe=1))
    info = json.loads((tmp_path / "distill.json").read_text())
    twin = load_model(tmp_path, info["model"])
    assert info["method"] == "dmd2" and all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), dit.parameters())
    )


def test_save_replaces_and_keeps_the_old_weights_on_failure(dit, folder, monkeypatch):
    old = (folder / WEIGHTS).read_bytes()
    changed = dit.copy()
    with torch.no_grad():
        changed.net.pos_embed.proj.weight += 1

    def disk_full(tensors, path, metadata):
        with open(path, "wb") as f:
            f.write(old[:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("common.files.save_file", disk_full)
        with pytest.raises(OSError):
            changed.save(folder, {}, "teacher.json")
    assert (folder / WEIGHTS).read_bytes() == old and not list(folder.glob("*.tmp"))
    changed.save(folder, {}, "teacher.json")
    assert torch.equal(
        load_file(folder / WEIGHTS)["pos_embed.proj.weight"], changed.net.pos_embed.proj.weight
    )


def test_half_precision_weights_become_fp32(dit, folder):
    save_file({k: v.half() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    twin = load_teacher(str(folder))
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(twin.parameters(), dit.parameters()))


def test_copy_is_independent_and_trainable(dit):
    twin, (x, y) = dit.copy(), batch()
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    assert (
        twin.schedule is dit.schedule
        and all(p.requires_grad for p in twin.parameters())
        and not any(p.requires_grad for p in dit.parameters())
    )
    assert torch.equal(twin(x, 0.3, 0.7, twin.encode(y)), dit(x, 0.3, 0.7, dit.encode(y)))
    twin(x, 0.3, 0.7, twin.encode(y)).square().mean().backward()
    torch.optim.SGD(twin.parameters(), 1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in dit.state_dict().items()) and all(
        p.grad is None for p in dit.parameters()
    )
    assert not torch.equal(twin.net.pos_embed.proj.weight, dit.net.pos_embed.proj.weight)
    calls = []
    twin.register_forward_hook(
        lambda *a: calls.append(1)
    )  # hooks, new parameters and switches of a copy are its own
    twin.another, twin.exact = torch.nn.Parameter(torch.zeros(1)), True
    dit(x, 0.3, 0.7, dit.encode(y))
    assert not calls and not hasattr(dit, "another") and not hasattr(dit, "exact")


def test_copy_of_half_precision_is_fp32():
    teacher = tiny()
    teacher.net.bfloat16()
    assert {p.dtype for p in teacher.copy().parameters()} == {torch.float32} and {
        p.dtype for p in teacher.parameters()
    } == {torch.bfloat16}


# ---- the DiT adapter --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.03, 0.7, 1.0])
def test_forward_is_diffusers_plus_the_flow_conversion(dit, t):
    x, y = batch()
    v = dit.net(x, timestep=torch.full((6,), t * 1000), class_labels=y).sample
    t = float(torch.tensor(t))
    assert (dit(x, 1 - t, t, dit.encode(y)) - (x - t * v)).abs().max() < 1e-5


def test_plain_diffusers_loads_the_folder(dit, folder):
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel.from_pretrained(folder).eval()
    x, y = batch()
    with torch.no_grad():
        v = net(x, timestep=torch.full((6,), 700.0), class_labels=y).sample
    assert (dit(x, 0.3, 0.7, dit.encode(y)) - (x - 0.7 * v)).abs().max() < 1e-5


def test_labels_are_never_dropped_inside(dit):
    """In train mode diffusers replaces a tenth of the labels at random; guidance and every loss would be wrong, without a sign of it."""
    for model in (dit, dit.copy()):
        holder = torch.nn.ModuleList([model]).train()
        assert not any(m.training for m in model.modules() if m is not model)
        x, y = batch(1)
        cond = {k: v.expand(200) for k, v in model.encode(y + 3).items()}
        out = holder[0](x.expand(200, -1, -1, -1), 0.3, 0.7, cond)
        assert (out - out[0]).abs().max() < 1e-4
    null = dit(x, 0.3, 0.7, dit.null(1))
    assert (null - out[:1]).abs().max() > 0.01  # a dropped label would have been seen


def test_batch_rows_are_independent(dit):
    x, y = batch()
    a, s = torch.linspace(0.9, 0.1, 6), torch.linspace(0.1, 0.9, 6)
    whole = dit(x, a, s, dit.encode(y))
    for i in range(6):
        assert (
            dit(x[i : i + 1], a[i], s[i], dit.encode(y[i : i + 1])) - whole[i : i + 1]
        ).abs().max() < 1e-4
    assert (
        whole[0] - dit(x[:1], a[1], s[1], dit.encode(y[:1]))[0]
    ).abs().max() > 1e-3  # the time matters


@pytest.mark.parametrize(
    "ask", [EDM(0.002, 80.0), VP(), TrigFlow(0.5)], ids=["edm", "vp", "trigflow"]
)
def test_other_schedules_ask_the_same_question(dit, ask):
    """x_t of EDM, VP and TrigFlow, at the signal-to-noise ratio of a flow time: float tolerance, relative to the sample (the view rescales it)."""
    x, y = batch()
    for t in (0.1, 0.5, 0.93):
        t = float(torch.tensor(t))
        u = ask.t_from_snr(torch.tensor(((1 - t) / t) ** 2, dtype=torch.float64))
        a, s = ask.alpha(u), ask.sigma(u)
        asked = dit((x * (s / t)).float(), a, s, dit.encode(y))
        exact = dit(x, 1 - t, t, dit.encode(y))
        assert (asked - exact).abs().max() < 2e-4 * exact.abs().max()


def test_own_schedule_reaches_the_network_unchanged(dit):
    x, y = batch(4)
    t = torch.tensor([0.0, 0.001, 0.3, 1.0])
    seen = []
    handle = dit.net.register_forward_pre_hook(
        lambda m, args, kw: seen.append((args[0], kw["timestep"])), with_kwargs=True
    )
    dit(x, dit.schedule.alpha(t), dit.schedule.sigma(t), dit.encode(y))
    handle.remove()
    assert torch.equal(seen[0][0], x) and torch.equal(seen[0][1], t * 1000)


def test_pure_noise_of_the_toy_schedule_asks_the_flow_at_one(dit):
    x, y = batch()
    assert torch.equal(dit(2 * x, 0.0, 2.0, dit.encode(y)), dit(x, 0.0, 1.0, dit.encode(y)))


def test_features_stop_early_and_are_the_blocks_output():
    model, (x, y) = tiny(num_layers=4), batch()
    t = torch.full((6,), 0.7)
    ran, out = [], {}
    for i, block in enumerate(model.net.transformer_blocks):
        block.register_forward_pre_hook(lambda *a, i=i: ran.append(i))
        block.register_forward_hook(lambda m, a, o, i=i: out.update({i: o}))
    model.net(x, timestep=t * 1000, class_labels=y)
    expected = out[2]  # the middle one of four
    ran.clear()
    (h,) = model(x, 1 - t, t, model.encode(y), features=True)
    assert ran == [0, 1, 2]
    assert h.shape == (6, 32, 4, 4) and h.dtype == torch.float32
    assert torch.equal(
        h.permute(0, 2, 3, 1).reshape(6, 16, 32), expected
    )  # tokens in row-major order
    assert len(model.net.transformer_blocks[2]._forward_hooks) == 1  # no hook left behind
    ran.clear()
    a, b = model(
        x, 1 - t, t, model.encode(y), features=(0.1, 0.2, 0.3)
    )  # the first two are the same block
    assert ran == [0, 1] and all(
        torch.equal(h.permute(0, 2, 3, 1).reshape(6, 16, 32), out[i]) for i, h in enumerate((a, b))
    )
    ran.clear()
    model(x, 1 - t, t, model.encode(y))
    assert ran == [0, 1, 2, 3]


def test_hooks_are_removed_when_the_network_fails(dit):
    with pytest.raises(Exception):
        dit(torch.zeros(1, 3, 28, 28), 0.3, 0.7, dit.null(1), features=True)
    assert not any(len(m._forward_hooks) for m in dit.modules())


def test_gradients_through_features():
    """GAN losses: gradient reaches the sample through frozen weights, and is the same with gradient checkpointing."""
    model, (x, y) = tiny(), batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.net.enable_gradient_checkpointing()
        model.requires_grad_(False)
        x_in = x.clone().requires_grad_(True)
        model(x_in, 0.3, 0.7, model.encode(y), features=True)[0].square().mean().backward()
        frozen = x_in.grad.clone()
        assert frozen.abs().max() > 0 and all(p.grad is None for p in model.parameters())
        model.requires_grad_(True)
        model(x, 0.3, 0.7, model.encode(y), features=True)[0].square().mean().backward()
        grads.append(
            [frozen] + [p.grad.clone() for p in model.net.transformer_blocks[0].parameters()]
        )
        assert model.net.proj_out_2.weight.grad is None  # behind the site
        model.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_guidance_is_one_pass_of_twice_the_batch(dit):
    x, y = batch()
    cond, sizes = dit.encode(y), []
    c, u = dit(x, 0.3, 0.7, cond), dit(x, 0.3, 0.7, dit.null(6))
    handle = dit.net.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    one, two = dit.guided(x, 0.3, 0.7, cond, 1.0), dit.guided(x, 0.3, 0.7, cond, 2.5)
    each = dit.guided(x, torch.full((6,), 0.3), torch.full((6,), 0.7), cond, 2.5)
    none = dit.guided(x, 0.3, 0.7, cond, 0.0)
    handle.remove()
    assert sizes == [6, 12, 12, 6]
    assert (
        torch.equal(one, c)
        and torch.equal(none, u)
        and (two - (u + 2.5 * (c - u))).abs().max() < 1e-4
        and (each - two).abs().max() < 1e-4
    )
    assert (c - u).abs().max() > 0.01 and cond[
        "labels"
    ].tolist() == y.tolist()  # null() did not write into cond


def test_guidance_is_linear_in_any_prediction(dit):
    """The same w in the velocity gives the same sample: x0 is affine in the network's output."""
    x, y = batch()
    v = [
        dit.net(x, timestep=torch.full((6,), 700.0), class_labels=c["labels"]).sample
        for c in (dit.encode(y), dit.null(6))
    ]
    assert (
        dit.guided(x, 0.3, 0.7, dit.encode(y), 3.0) - (x - 0.7 * (v[1] + 3.0 * (v[0] - v[1])))
    ).abs().max() < 1e-4


def test_bf16_passes(dit):
    model, (x, y) = dit.copy(), batch()
    exact = model(x, 0.3, 0.7, model.encode(y)).detach()
    model.dtype, seen = torch.bfloat16, []
    model.net.transformer_blocks[0].attn1.to_q.register_forward_hook(
        lambda m, a, o: seen.append(o.dtype)
    )
    out = model(x, 0.3, 0.7, model.encode(y))
    out.square().mean().backward()
    (h,) = model(x, 0.3, 0.7, model.encode(y), features=True)
    assert seen == [torch.bfloat16] * 2
    assert out.dtype == h.dtype == torch.float32 and {
        p.grad.dtype for p in model.parameters() if p.grad is not None
    } == {torch.float32}
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert model.copy().dtype == torch.bfloat16


def test_decode_and_encode_images(dit):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = dit.encode_images(images)
    assert torch.equal(dit.decode(x), images) and x.min() == -1 and x.max() == 1
    assert dit.decode(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


def test_encode_and_null(dit):
    assert dit.encode([3, 1])["labels"].tolist() == [3, 1] and dit.encode(torch.tensor([3, 1]))[
        "labels"
    ].tolist() == [3, 1]
    assert dit.null(3)["labels"].tolist() == [10, 10, 10]
    assert (
        dit.net.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 11
    )  # there is a row for it


# ---- the toy's network ------------------------------------------------------------------------------------------------------------------


def test_toy_save_and_load(tmp_path):
    torch.manual_seed(0)
    toy = Toy(MLP(width=16), EDM(0.01, 20.0, 0.714), "edm", (2,), 8, sigma_data=0.714)
    toy.save(tmp_path, dict(evaluation={}), "teacher.json")
    twin, x = load_teacher(str(tmp_path)), torch.randn(5, 2)
    assert twin.exact and torch.equal(
        twin.copy()(x, 1.0, 0.3, toy.null(5)), toy(x, 1.0, 0.3, toy.null(5))
    )
    edit(tmp_path / "config.json", width=17)
    with pytest.raises(UserError, match="expected shape"):
        load_teacher(str(tmp_path))


def test_toy_network_is_edm_preconditioned():
    """At small sigma the estimate is the input (c_skip = 1), at large sigma the input hardly counts."""
    toy = Toy(MLP(width=16), EDM(0.01, 20.0, 0.714), "edm", (2,), 8, sigma_data=0.714)
    x = torch.randn(50, 2)
    assert (toy(x, 1.0, 0.01, toy.null(50)) - x).abs().max() < 0.05
    s, sd = 5.0, 0.714
    raw = toy.net((x / (s**2 + sd**2) ** 0.5), torch.full((50,), s), torch.full((50,), 8))
    assert (
        toy(x, 1.0, s, toy.null(50))
        - (sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2) ** 0.5 * raw)
    ).abs().max() < 1e-6


# ---- changes to a network that make its derivative along the time tame ---------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_adapted_network_is_saved_copied_and_loaded(qk_norm, tmp_path):
    model, (x, y), seen = tiny(num_layers=2), batch(), []
    t = torch.full((6,), 0.7)
    model.adapt(qk_norm)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    handle = model.net.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["timestep"]), with_kwargs=True
    )
    block = model.net.transformer_blocks[1].attn1
    if qk_norm:
        block.norm_q.register_forward_hook(
            lambda m, a, out: seen.append((out / m.weight).square().mean(-1))
        )
    now = model(x, 1 - t, t, model.encode(y))
    assert torch.equal(seen[0], t) and (
        not qk_norm or torch.allclose(seen[1], torch.ones(()), atol=0.02)
    )
    handle.remove()
    assert torch.equal(model.copy()(x, 1 - t, t, model.encode(y)), now)
    model.save(tmp_path, {})
    info = json.loads((tmp_path / "distill.json").read_text())["model"]
    assert torch.equal(load_model(tmp_path, info)(x, 1 - t, t, model.encode(y)), now)
    for adapted in ("dense", ["qk_norm"], 1, {}):
        with pytest.raises(UserError, match="adapted"):
            load_model(tmp_path, dict(info, adapted=adapted))


def test_fitted_time_embedding_keeps_the_network_and_loses_its_fast_waves():
    model = load_teacher("mnist")
    dense = model.copy().adapt()
    one = lambda m: m.net.transformer_blocks[3].norm1.emb
    dense.time_embedders = lambda: ([one(dense)], 160)  # one of six
    dense.fit_time(steps=300).requires_grad_(False)
    assert not model.dense
    t = torch.linspace(0.02, 0.98, 500)
    curve = lambda t: (
        one(model).timestep_embedder(one(model).time_proj(1000 * t)),
        one(dense).timestep_embedder(one(dense).time_proj(t)),
    )
    a, b = curve(t)
    assert (a - b).square().mean() < 0.1 * a.var(
        0
    ).mean()  # the fit itself depends on the threads in its last digits
    rough = [(p - q).square().mean() for p, q in zip(curve(t + 1e-3), (a, b))]
    assert rough[1] < 0.1 * rough[0]


# ---- new scalar conditions -------------------------------------------------------------------------------------------------------------------


def toy_model():
    torch.manual_seed(0)
    return Toy(MLP(width=16), EDM(), "edm", (2,), 8)


@pytest.mark.parametrize("make", [tiny, toy_model])
def test_extended_network_starts_as_it_was_and_then_listens(make, tmp_path):
    model = make().copy()
    x = torch.randn(4, *model.shape)
    cond = model.encode(torch.arange(4))
    before = model(x, 0.6, 0.8, cond)
    model.extend("r", "w")
    given = dict(cond, r=torch.rand(4), w=torch.rand(4))
    assert torch.equal(model(x, 0.6, 0.8, given), before)
    model(x, 0.6, 0.8, given).sum().backward()
    assert model.extras["r"].layers[2].weight.grad.abs().sum() > 0
    for p in model.extras.parameters():
        p.data.normal_()
    now = model(x, 0.6, 0.8, given)
    assert not torch.allclose(now, before) and not torch.allclose(
        now, model(x, 0.6, 0.8, dict(given, r=given["r"] + 0.3))
    )
    assert model.extra is None and not any(m._forward_hooks for m in model.modules())
    assert (
        torch.equal(model.guided(x, 0.6, 0.8, given, 1.0), now)
        and model.guided(x, 0.6, 0.8, given, 2.0).isfinite().all()
    )
    twin = model.copy()
    assert (
        torch.equal(twin(x, 0.6, 0.8, given), now)
        and twin.extras["r"].layers[0].weight is not model.extras["r"].layers[0].weight
    )
    model.save(tmp_path, {})
    loaded = load_model(tmp_path, json.loads((tmp_path / "distill.json").read_text())["model"])
    assert torch.equal(loaded(x, 0.6, 0.8, given), now)
    (tmp_path / "extras.safetensors").unlink()
    with pytest.raises(UserError, match="extras.safetensors"):
        load_model(tmp_path, json.loads((tmp_path / "distill.json").read_text())["model"])


def test_a_scalar_with_a_factor():
    """[B, 2]: the embedding times a factor; 0 switches it off whatever it has learnt."""
    embed, s = ScalarEmbedding(16), torch.linspace(-1, 1, 5)
    torch.nn.init.normal_(embed.layers[2].weight)
    torch.nn.init.normal_(embed.layers[2].bias)
    factor = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert (
        torch.equal(embed(torch.stack([s.double(), factor], 1)), factor.float()[:, None] * embed(s))
        and embed(s).abs().min() > 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extended_network_under_checkpointing_keeps_each_calls_condition(dtype):
    """The blocks are run again in backward, after another call with another condition; with the same attention."""
    grads, runs = [], []
    for checkpointing in (False, True):
        model = tiny().copy().extend("r")
        model.dtype = dtype
        torch.manual_seed(1)
        for p in model.extras.parameters():
            p.data.normal_()
        if checkpointing:
            model.checkpoint_activations()
        model.net.transformer_blocks[0].attn1.register_forward_hook(lambda *a: runs.append(1))
        x, cond = (
            torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
            model.encode(torch.arange(4)),
        )
        one = model(x, 0.6, 0.8, dict(cond, r=torch.full((4,), 0.2)))
        two = model(x, 0.6, 0.8, dict(cond, r=torch.full((4,), 0.9)))
        (one * two).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(runs) == 2 + 4  # twice as often with checkpointing
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


# ---- several experts --------------------------------------------------------------------------------------------------------------------------


def experts(n):
    models = [toy_model() for _ in range(n)]
    for i, m in enumerate(models):
        for p in m.parameters():
            p.data += 0.1 * i
    return models


def test_routed_by_level():
    a, b, c = experts(3)
    model = ByLevel([a, b, c], [2.0, 0.5])
    x, cond = torch.randn(5, 2), a.encode(torch.arange(5))
    for ratio, expert in ((3.0, a), (2.0, b), (0.6, b), (0.5, c), (0.1, c)):
        assert torch.equal(model(x, 1.0, ratio, cond), expert(x, 1.0, ratio, cond))
    sigma = torch.tensor([3.0, 0.6, 0.1, 5.0, 0.6], dtype=torch.float64)
    together = model(x, torch.ones(5), sigma, cond)
    alone = torch.cat(
        [
            e(x[i : i + 1], 1.0, sigma[i], {"labels": cond["labels"][i : i + 1]})
            for i, e in enumerate((a, b, c, a, b))
        ]
    )
    assert torch.allclose(together, alone, atol=1e-6)
    (together**2).sum().backward()
    assert all(e.net.out.weight.grad.abs().sum() > 0 for e in (a, b, c))
    # the noisiest level there is: alpha = 0
    assert torch.equal(
        ByLevel([tiny(), tiny()], [1.0]).route(2, 0.0, 1.0, {}),
        torch.zeros(2, dtype=torch.int64),
    )
    # a single expert, which needs no table
    assert torch.equal(ByLevel([a], [])(x, 1.0, 0.5, cond), a(x, 1.0, 0.5, cond))


def test_experts_of_experts(tmp_path):
    """msd's students of a teacher that has an expert for each noise level: by label, then by level. One deeper is not read."""
    flat = experts(4)
    for i, m in enumerate(flat):
        m.labelled = True
    two = ByLevel(flat[:2], [1.0]), ByLevel(flat[2:], [0.5])
    model = ByLabel(two, [0, 1] * 4)
    x, cond = torch.randn(4, 2), flat[0].encode([0, 1, 2, 3])
    model.save(tmp_path, {})
    info = json.loads((tmp_path / "distill.json").read_text())["model"]
    again = load_model(tmp_path, info)
    for ratio, mine in ((2.0, (0, 2)), (0.7, (1, 2)), (0.1, (1, 3))):
        want = torch.stack([flat[mine[i % 2]](x, 1.0, ratio, cond)[i] for i in range(4)])
        assert torch.allclose(again(x, 1.0, ratio, cond), want, atol=1e-6)
    assert (
        two[0].at_level(float("inf")) is flat[0]
        and two[0].at_level(1.0) is flat[1]
        and model.at_level(1.0) is model
    )
    ByLevel([model], []).save(tmp_path / "deep", {})
    with pytest.raises(UserError, match="experts: expected a list of models"):
        load_model(
            tmp_path / "deep", json.loads((tmp_path / "deep" / "distill.json").read_text())["model"]
        )


def test_routed_by_label(tmp_path):
    a, b = experts(2)
    for m in (a, b):
        m.labelled = True
    model = ByLabel([a, b], [0, 1] * 4)
    x, cond = torch.randn(6, 2), a.encode([0, 1, 2, 3, 8, 5])
    want = torch.stack(
        [
            (b if int(label) in (1, 3, 5) else a)(x, 1.0, 0.7, cond)[i]
            for i, label in enumerate(cond["labels"])
        ]
    )
    assert torch.allclose(model(x, 1.0, 0.7, cond), want, atol=1e-6)
    assert (
        model.shape == (2,)
        and model.classes == 8
        and model.adapter == "toy"
        and model.schedule is a.schedule
    )
    twin = model.copy()
    twin.experts[0].net.out.weight.data += 1
    assert torch.allclose(model(x, 1.0, 0.7, cond), want, atol=1e-6)
    model.dtype = torch.bfloat16
    assert a.dtype == b.dtype == torch.bfloat16
    model.dtype = torch.float32
    model.save(tmp_path, dict(method="msd"))
    info = json.loads((tmp_path / "distill.json").read_text())["model"]
    assert torch.allclose(load_model(tmp_path, info)(x, 1.0, 0.7, cond), want, atol=1e-6)
    for change in (
        dict(table=[0, 1]),
        dict(table=[0, 2] * 4),
        dict(by="level"),
        dict(by="x"),
        dict(experts=[]),
        dict(experts=[info]),
        dict(table="x"),
    ):
        with pytest.raises(UserError):
            load_model(tmp_path, info | change)
