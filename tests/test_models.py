"""common/model.py, common/routed.py, common/teachers/dit.py: loading (a bad file is one line),
saving, copies, evaluation against diffusers itself, on random networks of 30k weights."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.model import ScalarEmbedding
from common.rng import BatchRandom
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


def tiny(**config):
    torch.manual_seed(0)
    net = DiT.network(dict(SIZE, **config))
    with torch.no_grad():
        for p in net.parameters():  # diffusers starts some at zero, so that blocks would not matter
            p.normal_(0, 0.15)
    return DiT(net, Flow(), "flow", (1, 28, 28), 10)


def toy_model():
    torch.manual_seed(0)
    return Toy(MLP(width=16), EDM(), "edm", (2,), 8)


@pytest.fixture(scope="module")
def dit():
    return tiny().requires_grad_(False)


@pytest.fixture
def folder(dit, tmp_path):
    info = dict(name="tiny", evaluation=dict(protocol="none"))
    dit.save(tmp_path / "teacher", info, "teacher.json")
    return tmp_path / "teacher"


def batch(n=6, seed=0):
    """n images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 28, 28, generator=generator), torch.arange(n) % 10


def largest(x):
    return x.abs().max()


def equal_lists(a, b):
    """The same tensors, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def edit(path, **changes):
    """Changes fields of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def saved_model(folder):
    """The entry "model" of distill.json."""
    return json.loads((folder / "distill.json").read_text())["model"]


# ---- bad input: one line that names the file -----------------------------------------------------


class Bomb:
    """Unpickling this creates a marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


# ways to spoil a good folder


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def fields(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def model_fields(**changes):
    """Changes in the entry "model" of teacher.json; None removes one."""

    def spoil(folder):
        path = folder / "teacher.json"
        edit(path, model=json.loads(path.read_text())["model"] | changes)

    return spoil


def remove(name):
    return lambda folder: (folder / name).unlink()


def weights(change):
    """change: function of the dict of tensors."""

    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def cut(size):
    """Only the first `size` bytes of the weights are left."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def weights_are_a_folder(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def long_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


NORM, PATCH = "transformer_blocks.0.norm1.linear.weight", "pos_embed.proj.weight"
TEACHER, CONFIG = "teacher.json", "config.json"


def narrow_patch(tensors):
    tensors[PATCH] = tensors[PATCH][:, :, :5, :5].contiguous()


BAD = {  # name: (how a good folder is spoilt, words of the message)
    "no teacher.json": (remove(TEACHER), [TEACHER]),
    "teacher.json not JSON": (text(TEACHER, '{"model": '), [TEACHER, "JSON"]),
    "teacher.json binary": (
        lambda folder: (folder / TEACHER).write_bytes(b"\xff\xfe\x00"),
        [TEACHER, "JSON"],
    ),
    "teacher.json nested": (text(TEACHER, "[" * 100000), [TEACHER, "JSON"]),
    "teacher.json not an object": (text(TEACHER, "[1, 2]"), [TEACHER, "object", "list"]),
    "no model": (fields(TEACHER, model=None), [TEACHER, "model"]),
    "model not an object": (fields(TEACHER, model="dit"), [TEACHER, "model", "str"]),
    "evaluation not an object": (fields(TEACHER, evaluation=[1]), [TEACHER, "evaluation"]),
    "no adapter": (model_fields(adapter=None), ["adapter", "dit"]),
    "unknown adapter": (model_fields(adapter="unet"), ["adapter", "unet"]),
    "adapter not a name": (model_fields(adapter=["dit"]), ["adapter"]),
    "no schedule": (fields(TEACHER, model=dict(adapter="dit")), ["schedule"]),
    "unknown schedule": (model_fields(schedule=dict(name="cosine")), ["cosine"]),
    "schedule not an object": (model_fields(schedule="flow"), ["schedule"]),
    "wrong schedule value": (model_fields(schedule=dict(name="flow", shift="3")), ["shift"]),
    "unknown prediction": (model_fields(prediction="velocity"), ["velocity"]),
    "shape not a list": (model_fields(shape=28), ["int"]),
    "shape not the network's": (model_fields(shape=[3, 32, 32]), ["shape", CONFIG]),
    "classes not the network's": (model_fields(classes=1000), ["classes", CONFIG]),
    "classes not a number": (model_fields(classes="ten"), ["ten"]),
    "sigma_data not positive": (model_fields(sigma_data=-1), ["sigma_data"]),
    "no config.json": (remove(CONFIG), [CONFIG]),
    "config.json not JSON": (text(CONFIG, "dit"), [CONFIG, "JSON"]),
    "config.json of another class": (
        fields(CONFIG, _class_name="UNet2DModel"),
        [CONFIG, "UNet2DModel", "DiTTransformer2DModel"],
    ),
    "config.json without class": (fields(CONFIG, _class_name=None), [CONFIG, "_class_name"]),
    "config.json with a wrong value": (fields(CONFIG, num_layers="two"), ["configuration"]),
    "config.json that cannot be built": (fields(CONFIG, patch_size=0), ["configuration"]),
    "config.json of another size": (
        fields(CONFIG, num_layers=3),
        [WEIGHTS, "transformer_blocks.2", "missing"],
    ),
    "no weights": (remove(WEIGHTS), [WEIGHTS, "safetensors"]),
    "weights are a folder": (weights_are_a_folder, [WEIGHTS]),
    "empty file": (cut(0), [WEIGHTS]),
    "cut in the header": (cut(100), [WEIGHTS]),
    "cut in the data": (cut(-1000), [WEIGHTS]),
    "header of 2^60 bytes": (long_header, [WEIGHTS]),
    "wrong shape": (weights(narrow_patch), [WEIGHTS, PATCH, "[32, 1, 7, 7]", "[32, 1, 5, 5]"]),
    "missing tensor": (weights(lambda tensors: tensors.pop(NORM)), [WEIGHTS, NORM, "missing"]),
    "extra tensor": (
        weights(lambda tensors: tensors.update(lora=torch.zeros(1))),
        [WEIGHTS, "lora"],
    ),
}


@pytest.mark.parametrize("spoil, words", BAD.values(), ids=BAD.keys())
def test_bad_folder(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError) as e:
        load_teacher(str(folder))
    message = str(e.value)
    assert [word for word in [str(folder), *words] if word not in message] == []
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "write",
    [lambda v, path: path.write_bytes(pickle.dumps(v)), lambda v, path: torch.save(v, path)],
    ids=["pickle", "torch.save"],
)
def test_a_pickle_is_not_executed(folder, tmp_path, name, write):
    marker = tmp_path / "executed"
    (folder / WEIGHTS).unlink()
    write(Bomb(marker), folder / name)
    with pytest.raises(UserError, match=WEIGHTS):
        load_teacher(str(folder))
    assert not marker.exists()
    # the bomb is live: it goes off if it is unpickled
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()


def test_a_pickle_beside_good_weights_is_not_read(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    load_teacher(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("mnsit", "did you mean mnist?"),
        ("toy-con", "toy-cond"),
        ("/no/such/folder", "expected toy, toy-cond, mnist, emoji, emoji-flow, sd15"),
        ("x" * 5000, "or a folder"),
        ("a\0b", "or a folder"),
        ("", "found"),
    ],
)
def test_unknown_teacher(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        load_teacher(name)
    message = str(e.value)
    assert "--teacher" in message
    assert words in message
    assert "\n" not in message


def test_foreign_folder(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="expected one of the pipelines"):
        load_teacher(str(tmp_path))
    with pytest.raises(UserError, match="expected a folder, found a file"):
        load_teacher(str(tmp_path / "model_index.json"))  # a file


def test_a_student_is_no_teacher(dit, tmp_path):
    dit.save(tmp_path, dict(method="dmd2"))
    with pytest.raises(UserError, match="student of this project; give its teacher"):
        load_teacher(str(tmp_path))


# ---- save, load, copy ----------------------------------------------------------------------------


def test_save_and_load(dit, folder):
    again, (x, y) = load_teacher(str(folder)), batch()
    assert torch.equal(again(x, 0.3, 0.7, again.encode(y)), dit(x, 0.3, 0.7, dit.encode(y)))
    assert again.config() == dit.config()
    assert again.folder == folder
    assert again.evaluation == dict(protocol="none")
    assert not any(p.requires_grad for p in again.parameters())
    # no temporary file is left
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, TEACHER]


def test_student_folder_round_trip(dit, tmp_path):
    dit.copy().save(tmp_path, dict(method="dmd2", nfe=1))
    info = json.loads((tmp_path / "distill.json").read_text())
    assert info["method"] == "dmd2"
    assert equal_lists(load_model(tmp_path, info["model"]).parameters(), dit.parameters())


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
            changed.save(folder, {}, TEACHER)
    assert (folder / WEIGHTS).read_bytes() == old
    assert list(folder.glob("*.tmp")) == []
    changed.save(folder, {}, TEACHER)
    assert torch.equal(load_file(folder / WEIGHTS)[PATCH], changed.net.pos_embed.proj.weight)


def test_half_precision_weights_become_fp32(dit, folder):
    halves = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    again = load_teacher(str(folder))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(largest(a - b) < 1e-3 for a, b in zip(again.parameters(), dit.parameters()))


def test_copy_is_independent_and_trainable(dit):
    copy, (x, y) = dit.copy(), batch()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    assert copy.schedule is dit.schedule
    assert all(p.requires_grad for p in copy.parameters())
    assert not any(p.requires_grad for p in dit.parameters())
    assert torch.equal(copy(x, 0.3, 0.7, copy.encode(y)), dit(x, 0.3, 0.7, dit.encode(y)))

    copy(x, 0.3, 0.7, copy.encode(y)).square().mean().backward()
    torch.optim.SGD(copy.parameters(), 1.0).step()
    assert equal_lists(dit.state_dict().values(), before.values())
    assert all(p.grad is None for p in dit.parameters())
    assert not torch.equal(copy.net.pos_embed.proj.weight, dit.net.pos_embed.proj.weight)


def test_hooks_parameters_and_attributes_of_a_copy_are_its_own(dit):
    copy, (x, y), calls = dit.copy(), batch(), []
    copy.register_forward_hook(lambda *a: calls.append(1))
    copy.another = torch.nn.Parameter(torch.zeros(1))
    copy.exact = True
    dit(x, 0.3, 0.7, dit.encode(y))
    assert calls == []
    assert not hasattr(dit, "another")
    assert not hasattr(dit, "exact")


def test_copy_of_half_precision_is_fp32():
    teacher = tiny()
    teacher.net.bfloat16()
    assert {p.dtype for p in teacher.copy().parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


# ---- the DiT against diffusers -------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.03, 0.7, 1.0])
def test_forward_is_diffusers_plus_the_flow_conversion(dit, t):
    x, y = batch()
    v = dit.net(x, timestep=torch.full((6,), t * 1000), class_labels=y).sample
    t = float(torch.tensor(t))
    assert largest(dit(x, 1 - t, t, dit.encode(y)) - (x - t * v)) < 1e-5


def test_plain_diffusers_loads_the_folder(dit, folder):
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel.from_pretrained(folder).eval()
    x, y = batch()
    with torch.no_grad():
        v = net(x, timestep=torch.full((6,), 700.0), class_labels=y).sample
    assert largest(dit(x, 0.3, 0.7, dit.encode(y)) - (x - 0.7 * v)) < 1e-5


def test_labels_are_never_dropped_inside(dit):
    """In train mode diffusers drops a tenth of the labels: guidance and losses would be wrong."""
    x, y = batch(1)
    for model in (dit, dit.copy()):
        torch.nn.ModuleList([model]).train()
        assert not any(m.training for m in model.modules() if m is not model)
        cond = {name: value.expand(200) for name, value in model.encode(y + 3).items()}
        out = model(x.expand(200, -1, -1, -1), 0.3, 0.7, cond)
        assert largest(out - out[0]) < 1e-4
    null = dit(x, 0.3, 0.7, dit.null(1))
    assert largest(null - out[:1]) > 0.01  # a dropped label would have been seen


def test_batch_rows_are_independent(dit):
    x, y = batch()
    a, s = torch.linspace(0.9, 0.1, 6), torch.linspace(0.1, 0.9, 6)
    together = dit(x, a, s, dit.encode(y))
    for i in range(6):
        alone = dit(x[i : i + 1], a[i], s[i], dit.encode(y[i : i + 1]))
        assert largest(alone - together[i : i + 1]) < 1e-4
    other_time = dit(x[:1], a[1], s[1], dit.encode(y[:1]))
    assert largest(together[0] - other_time[0]) > 1e-3


@pytest.mark.parametrize(
    "other", [EDM(0.002, 80.0), VP(), TrigFlow(0.5)], ids=["edm", "vp", "trigflow"]
)
def test_other_schedules_give_the_same_estimate(dit, other):
    """x_t of EDM, VP and TrigFlow, at the signal-to-noise ratio of a flow time.

    Float tolerance, relative to the sample, which the view rescales.
    """
    x, y = batch()
    for t in (0.1, 0.5, 0.93):
        t = float(torch.tensor(t))
        u = other.t_from_snr(torch.tensor(((1 - t) / t) ** 2, dtype=torch.float64))
        a, s = other.alpha(u), other.sigma(u)
        found = dit((x * (s / t)).float(), a, s, dit.encode(y))
        expected = dit(x, 1 - t, t, dit.encode(y))
        assert largest(found - expected) < 2e-4 * largest(expected)


def test_own_schedule_reaches_the_network_unchanged(dit):
    x, y = batch(4)
    t = torch.tensor([0.0, 0.001, 0.3, 1.0])
    seen = []
    handle = dit.net.register_forward_pre_hook(
        lambda m, args, kw: seen.append((args[0], kw["timestep"])), with_kwargs=True
    )
    dit(x, dit.schedule.alpha(t), dit.schedule.sigma(t), dit.encode(y))
    handle.remove()
    [(x_seen, t_seen)] = seen
    assert torch.equal(x_seen, x)
    assert torch.equal(t_seen, t * 1000)


def test_pure_noise_of_the_toy_schedule_is_the_flow_at_one(dit):
    x, y = batch()
    assert torch.equal(dit(2 * x, 0.0, 2.0, dit.encode(y)), dit(x, 0.0, 1.0, dit.encode(y)))


def test_bf16_passes(dit):
    model, (x, y) = dit.copy(), batch()
    exact = model(x, 0.3, 0.7, model.encode(y)).detach()
    model.dtype, inside = torch.bfloat16, []
    to_q = model.net.transformer_blocks[0].attn1.to_q
    to_q.register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    out = model(x, 0.3, 0.7, model.encode(y))
    out.square().mean().backward()
    (h,) = model(x, 0.3, 0.7, model.encode(y), features=True)
    assert inside == [torch.bfloat16] * 2
    assert out.dtype == torch.float32
    assert h.dtype == torch.float32
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert 0 < largest(out - exact) < 0.05 * largest(exact)
    assert model.copy().dtype == torch.bfloat16


def test_decode_and_encode_images(dit):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = dit.encode_images(images)
    assert torch.equal(dit.decode(x), images)
    assert [x.min(), x.max()] == [-1, 1]
    assert dit.decode(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


# ---- conditions ----------------------------------------------------------------------------------


def test_encode_and_null(dit):
    assert dit.encode([3, 1])["labels"].tolist() == [3, 1]
    assert dit.encode(torch.tensor([3, 1]))["labels"].tolist() == [3, 1]
    assert dit.null(3)["labels"].tolist() == [10, 10, 10]
    table = dit.net.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    assert table.num_embeddings == 11  # there is a row for the null label


def test_random_cond(dit):
    """Labels of the whole range; the same for the same draw, also through Routed."""
    labels = dit.random_cond(BatchRandom(0, 0, 500))["labels"]
    assert set(labels.tolist()) == set(range(10))
    routed = ByLabel([dit, dit], [0, 1] * 5)
    assert torch.equal(routed.random_cond(BatchRandom(0, 0, 500))["labels"], labels)


def test_drop_condition(dit):
    cond = dict(dit.encode([1, 2, 3]), r=torch.tensor([0.1, 0.2, 0.3]))
    dropped = dit.drop_condition(cond, torch.tensor([True, False, True]))
    assert dropped["labels"].tolist() == [10, 2, 10]
    assert torch.equal(dropped["r"], cond["r"])  # there is no null of a scalar condition
    assert cond["labels"].tolist() == [1, 2, 3]


def test_guidance_is_one_pass_of_twice_the_batch(dit):
    x, y = batch()
    cond, sizes = dit.encode(y), []
    c, u = dit(x, 0.3, 0.7, cond), dit(x, 0.3, 0.7, dit.null(6))
    handle = dit.net.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    conditional = dit.guided(x, 0.3, 0.7, cond, 1.0)
    guided = dit.guided(x, 0.3, 0.7, cond, 2.5)
    of_levels = dit.guided(x, torch.full((6,), 0.3), torch.full((6,), 0.7), cond, 2.5)
    unconditional = dit.guided(x, 0.3, 0.7, cond, 0.0)
    handle.remove()
    assert sizes == [6, 12, 12, 6]
    assert largest(c - u) > 0.01
    assert torch.equal(conditional, c)
    assert torch.equal(unconditional, u)
    assert largest(guided - (u + 2.5 * (c - u))) < 1e-4
    assert largest(of_levels - guided) < 1e-4
    assert cond["labels"].tolist() == y.tolist()  # null() did not write into cond


def test_guidance_is_linear_in_any_prediction(dit):
    """The same w in the velocity gives the same sample: x0 is affine in the network's output."""
    x, y = batch()
    velocity = lambda labels: (
        dit.net(x, timestep=torch.full((6,), 700.0), class_labels=labels).sample
    )
    c, u = velocity(y), velocity(dit.null(6)["labels"])
    expected = x - 0.7 * (u + 3.0 * (c - u))
    assert largest(dit.guided(x, 0.3, 0.7, dit.encode(y), 3.0) - expected) < 1e-4


# ---- features ------------------------------------------------------------------------------------


def as_map(tokens):
    """Tokens [6, 16, 32] in row-major order as a map [6, 32, 4, 4]."""
    return tokens.reshape(6, 4, 4, 32).permute(0, 3, 1, 2)


def test_features_stop_early_and_are_the_blocks_output():
    model, (x, y) = tiny(num_layers=4), batch()
    t = torch.full((6,), 0.7)
    ran, out = [], {}
    for i, block in enumerate(model.net.transformer_blocks):
        block.register_forward_pre_hook(lambda *a, i=i: ran.append(i))
        block.register_forward_hook(lambda m, a, o, i=i: out.update({i: o}))
    model.net(x, timestep=t * 1000, class_labels=y)
    expected = dict(out)

    ran.clear()
    (h,) = model(x, 1 - t, t, model.encode(y), features=True)
    assert ran == [0, 1, 2]  # the middle one of four
    assert h.dtype == torch.float32
    assert torch.equal(h, as_map(expected[2]))
    assert len(model.net.transformer_blocks[2]._forward_hooks) == 1  # no hook is left behind

    ran.clear()
    maps = model(x, 1 - t, t, model.encode(y), features=(0.1, 0.2, 0.3))
    assert ran == [0, 1]
    assert equal_lists(maps, [as_map(expected[0]), as_map(expected[1])])  # each block once

    ran.clear()
    model(x, 1 - t, t, model.encode(y))
    assert ran == [0, 1, 2, 3]


def test_hooks_are_removed_when_the_network_fails(dit):
    with pytest.raises(RuntimeError):
        dit(torch.zeros(1, 3, 28, 28), 0.3, 0.7, dit.null(1), features=True)
    assert not any(m._forward_hooks for m in dit.modules())


def test_gradients_through_features():
    """GAN losses: gradient reaches the sample through frozen weights, also with checkpointing."""
    model, (x, y) = tiny(), batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.net.enable_gradient_checkpointing()
        model.requires_grad_(False)
        x_in = x.clone().requires_grad_(True)
        model(x_in, 0.3, 0.7, model.encode(y), features=True)[0].square().mean().backward()
        assert largest(x_in.grad) > 0
        assert all(p.grad is None for p in model.parameters())

        model.requires_grad_(True)
        model(x, 0.3, 0.7, model.encode(y), features=True)[0].square().mean().backward()
        block = [p.grad.clone() for p in model.net.transformer_blocks[0].parameters()]
        grads.append([x_in.grad.clone(), *block])
        assert model.net.proj_out_2.weight.grad is None  # after the feature layer
        model.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


# ---- the toy's network ---------------------------------------------------------------------------


def test_toy_save_and_load(tmp_path):
    torch.manual_seed(0)
    toy = Toy(MLP(width=16), EDM(0.01, 20.0, 0.714), "edm", (2,), 8, sigma_data=0.714)
    toy.save(tmp_path, dict(evaluation={}), TEACHER)
    again, x = load_teacher(str(tmp_path)), torch.randn(5, 2)
    assert again.exact
    expected = toy(x, 1.0, 0.3, toy.null(5))
    assert torch.equal(again.copy()(x, 1.0, 0.3, toy.null(5)), expected)
    edit(tmp_path / CONFIG, width=17)
    with pytest.raises(UserError, match="expected shape"):
        load_teacher(str(tmp_path))


def test_toy_network_is_edm_preconditioned():
    """D = c_skip x + c_out F(c_in x): at small sigma the estimate is the input."""
    sd, s = 0.714, 5.0
    toy = Toy(MLP(width=16), EDM(0.01, 20.0, sd), "edm", (2,), 8, sigma_data=sd)
    x = torch.randn(50, 2)
    assert largest(toy(x, 1.0, 0.01, toy.null(50)) - x) < 0.05
    norm = (s**2 + sd**2) ** 0.5
    output = toy.net(x / norm, torch.full((50,), s), torch.full((50,), 8))
    expected = sd**2 / norm**2 * x + s * sd / norm * output
    assert largest(toy(x, 1.0, s, toy.null(50)) - expected) < 1e-6


# ---- SANA-Sprint's change of a network -----------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_adapted_network_is_saved_copied_and_loaded(qk_norm, tmp_path):
    model, (x, y) = tiny(num_layers=2), batch()
    t = torch.full((6,), 0.7)
    evaluate = lambda model: model(x, 1 - t, t, model.encode(y))
    model.adapt(qk_norm)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))

    times, squares = [], []
    handle = model.net.register_forward_pre_hook(
        lambda m, a, kw: times.append(kw["timestep"]), with_kwargs=True
    )
    if qk_norm:
        norm = model.net.transformer_blocks[1].attn1.norm_q
        norm.register_forward_hook(
            lambda m, a, out: squares.append((out / m.weight).square().mean(-1))
        )
    expected = evaluate(model)
    handle.remove()
    assert torch.equal(times[0], t)
    assert all(torch.allclose(s, torch.ones(()), atol=0.02) for s in squares)
    assert len(squares) == qk_norm

    assert torch.equal(evaluate(model.copy()), expected)
    model.save(tmp_path, {})
    info = saved_model(tmp_path)
    assert torch.equal(evaluate(load_model(tmp_path, info)), expected)
    for adapted in ("dense", ["qk_norm"], 1, {}):
        with pytest.raises(UserError, match="adapted"):
            load_model(tmp_path, dict(info, adapted=adapted))


def test_fitted_time_embedding_keeps_the_network_and_loses_its_fast_waves():
    model = load_teacher("mnist")
    dense = model.copy().adapt()
    embedder = lambda model: model.net.transformer_blocks[3].norm1.emb
    dense.time_embedders = lambda: ([embedder(dense)], 160)  # one of six
    dense.fit_time(steps=300).requires_grad_(False)
    assert not model.dense

    def curves(t):
        old, new = embedder(model), embedder(dense)
        return (
            old.timestep_embedder(old.time_proj(1000 * t)),
            new.timestep_embedder(new.time_proj(t)),
        )

    t = torch.linspace(0.02, 0.98, 500)
    old, new = curves(t)
    # the fit itself depends on the number of threads in its last digits
    assert (old - new).square().mean() < 0.1 * old.var(0).mean()
    old_moved, new_moved = curves(t + 1e-3)
    assert (new_moved - new).square().mean() < 0.1 * (old_moved - old).square().mean()


# ---- scalar conditions ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny, toy_model])
def test_extended_network_starts_as_it_was_and_then_depends_on_the_condition(make, tmp_path):
    model = make().copy()
    x = torch.randn(4, *model.shape)
    cond = model.encode(torch.arange(4))
    before = model(x, 0.6, 0.8, cond)
    model.extend("r", "w")
    cond = dict(cond, r=torch.rand(4), w=torch.rand(4))
    assert torch.equal(model(x, 0.6, 0.8, cond), before)
    model(x, 0.6, 0.8, cond).sum().backward()
    assert model.extras["r"].layers[2].weight.grad.abs().sum() > 0

    for p in model.extras.parameters():
        p.data.normal_()
    after = model(x, 0.6, 0.8, cond)
    assert not torch.allclose(after, before)
    assert not torch.allclose(after, model(x, 0.6, 0.8, dict(cond, r=cond["r"] + 0.3)))
    assert torch.equal(model.guided(x, 0.6, 0.8, cond, 1.0), after)
    assert model.guided(x, 0.6, 0.8, cond, 2.0).isfinite().all()
    assert model.extra is None
    assert not any(m._forward_hooks for m in model.modules())

    copy = model.copy()
    assert torch.equal(copy(x, 0.6, 0.8, cond), after)
    assert copy.extras["r"].layers[0].weight is not model.extras["r"].layers[0].weight

    model.save(tmp_path, {})
    again = load_model(tmp_path, saved_model(tmp_path))
    assert torch.equal(again(x, 0.6, 0.8, cond), after)
    (tmp_path / "extras.safetensors").unlink()
    with pytest.raises(UserError, match="extras.safetensors"):
        load_model(tmp_path, saved_model(tmp_path))


def test_a_scalar_with_a_factor():
    """[B, 2]: the embedding times a factor; 0 switches it off whatever it has learnt."""
    embed, s = ScalarEmbedding(16), torch.linspace(-1, 1, 5)
    torch.nn.init.normal_(embed.layers[2].weight)
    torch.nn.init.normal_(embed.layers[2].bias)
    factor = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    found = embed(torch.stack([s.double(), factor], 1))
    assert torch.equal(found, factor.float()[:, None] * embed(s))
    assert embed(s).abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extended_network_under_checkpointing_keeps_the_condition_of_each_call(dtype):
    """Blocks run again in backward, after another call with another condition; same attention."""
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
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
        cond = model.encode(torch.arange(4))
        first = model(x, 0.6, 0.8, dict(cond, r=torch.full((4,), 0.2)))
        second = model(x, 0.6, 0.8, dict(cond, r=torch.full((4,), 0.9)))
        (first * second).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(runs) == 2 + 4  # twice as many with checkpointing
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


# ---- several experts -----------------------------------------------------------------------------


def experts(n):
    """Toys with different weights that read the label."""
    models = [toy_model() for _ in range(n)]
    for i, model in enumerate(models):
        model.labelled = True
        for p in model.parameters():
            p.data += 0.1 * i
    return models


def one_by_one(models, x, alpha, sigma, cond):
    """The estimate of sample i by models[i], each in a pass of its own."""
    estimates = []
    for i, model in enumerate(models):
        s = sigma[i] if torch.is_tensor(sigma) else sigma
        estimates.append(model(x[i : i + 1], alpha, s, dict(labels=cond["labels"][i : i + 1])))
    return torch.cat(estimates)


def test_routed_by_level():
    a, b, c = experts(3)
    model = ByLevel([a, b, c], [2.0, 0.5])
    x, cond = torch.randn(5, 2), a.encode(torch.arange(5))
    for ratio, expert in ((3.0, a), (2.0, b), (0.6, b), (0.5, c), (0.1, c)):
        assert torch.equal(model(x, 1.0, ratio, cond), expert(x, 1.0, ratio, cond))

    sigma = torch.tensor([3.0, 0.6, 0.1, 5.0, 0.6], dtype=torch.float64)
    together = model(x, torch.ones(5), sigma, cond)
    alone = one_by_one([a, b, c, a, b], x, 1.0, sigma, cond)
    assert torch.allclose(together, alone, atol=1e-6)
    together.square().sum().backward()
    assert all(expert.net.out.weight.grad.abs().sum() > 0 for expert in (a, b, c))


def test_routed_by_level_at_the_edges():
    a, b = experts(2)
    pure_noise = ByLevel([a, b], [1.0]).route(2, 0.0, 1.0, {})
    assert torch.equal(pure_noise, torch.zeros(2, dtype=torch.int64))
    x, cond = torch.randn(5, 2), a.encode(torch.arange(5))
    alone = ByLevel([a], [])  # one expert needs no table
    assert torch.equal(alone(x, 1.0, 0.5, cond), a(x, 1.0, 0.5, cond))


def test_routed_by_label(tmp_path):
    a, b = experts(2)
    model = ByLabel([a, b], [0, 1] * 4)
    x, cond = torch.randn(6, 2), a.encode([0, 1, 2, 3, 8, 5])  # 8 is the null label
    expected = one_by_one([a, b, a, b, a, b], x, 1.0, 0.7, cond)
    assert torch.allclose(model(x, 1.0, 0.7, cond), expected, atol=1e-6)
    copy = model.copy()
    copy.experts[0].net.out.weight.data += 1
    assert torch.allclose(model(x, 1.0, 0.7, cond), expected, atol=1e-6)

    model.save(tmp_path, dict(method="msd"))
    info = saved_model(tmp_path)
    again = load_model(tmp_path, info)
    assert torch.allclose(again(x, 1.0, 0.7, cond), expected, atol=1e-6)
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


def test_a_routed_model_has_the_attributes_of_its_first_expert():
    a, b = experts(2)
    model = ByLabel([a, b], [0, 1] * 4)
    assert model.shape == (2,)
    assert model.classes == 8
    assert model.adapter == "toy"
    assert model.schedule is a.schedule
    model.dtype = torch.bfloat16
    assert [a.dtype, b.dtype, model.dtype] == [torch.bfloat16] * 3
    assert not hasattr(model, "no_such_attribute")


def test_experts_of_experts(tmp_path):
    """MSD's students of a teacher with one expert per range of noise: by label, then by level."""
    flat = experts(4)
    two = ByLevel(flat[:2], [1.0]), ByLevel(flat[2:], [0.5])
    model = ByLabel(two, [0, 1] * 4)
    x, cond = torch.randn(4, 2), flat[0].encode([0, 1, 2, 3])
    model.save(tmp_path, {})
    again = load_model(tmp_path, saved_model(tmp_path))
    for ratio, (even, odd) in ((2.0, (0, 2)), (0.7, (1, 2)), (0.1, (1, 3))):
        expected = one_by_one([flat[even], flat[odd]] * 2, x, 1.0, ratio, cond)
        assert torch.allclose(again(x, 1.0, ratio, cond), expected, atol=1e-6)
    assert two[0].at_level(float("inf")) is flat[0]
    assert two[0].at_level(1.0) is flat[1]
    assert model.at_level(1.0) is model  # the level does not choose

    ByLevel([model], []).save(tmp_path / "deep", {})  # one deeper is not read
    with pytest.raises(UserError, match="experts: expected a list of models"):
        load_model(tmp_path / "deep", saved_model(tmp_path / "deep"))


@pytest.mark.parametrize("features", [False, True])
def test_sharded_experts_are_called_equally_often_whatever_the_samples(features):
    """--shard: a process that calls other experts than the others waits for them for ever."""

    def calls(kind, table, sigma, labels):
        """(expert, features) of each call."""
        found = []
        models = experts(2)
        for i, expert in enumerate(models):
            expert.sharding = lambda module: module
            expert.register_forward_pre_hook(lambda m, args, i=i: found.append((i, args[4])))
        x = torch.randn(4, 2)
        kind(models, table)(x, 1.0, sigma, models[0].encode(labels), features)
        return found

    both, levels = [(0, features), (1, features)], torch.tensor
    for sigma in (levels([3.0, 3.0, 3.0, 3.0]), levels([3.0, 0.1, 3.0, 3.0]), levels([0.1] * 4)):
        assert calls(ByLevel, [1.0], sigma, [0, 1, 2, 3]) == both
    for labels in ([0, 2, 4, 6], [0, 1, 2, 3], [1, 3, 5, 7]):
        assert calls(ByLabel, [0, 1] * 4, 0.5, labels) == both
    # a single level is the same on all processes
    assert calls(ByLevel, [1.0], 3.0, [0, 1, 2, 3]) == [(0, features)]
