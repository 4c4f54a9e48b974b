"""Random flags, random contents of JSON files, damaged weights and checkpoints: whatever comes, the program works or says in one line what is wrong.

A small sample by default; DISTIL_FAULTS=full: 500 cases of each (the flags in two parts, those that are refused at once and those that make a run). The examples
are the same every time, unless SEED=n is given.
"""
import contextlib
import copy
import importlib
import io
import json
import random
import re
import shutil

import pytest
import torch
from PIL import Image

from cases import FULL, SEED, generator
from common import adapters, models
from common.controls import Control
from common.models import WEIGHTS, Routed
from common.run import ROOT, Parser, UserError
from common.students import network_of, read_student, sampler_of
from test_run import run  # noqa: F401  the fixture
from test_scripts import SCRIPTS
from test_untrusted import parts

TOY = ROOT / "assets" / "toy"


def cases(n):
    """Random generators of n cases (500 in full)."""
    return [random.Random(f"{SEED} {i}") for i in range(500 if FULL else n)]


def one_line(e, limit=900):
    assert "\n" not in str(e) and 0 < len(str(e)) < limit, str(e)


# ---- flags ------------------------------------------------------------------------------------------------------------------------------

VALUES = {int: ["0", "1", "2", "3", "7", "-1", "40", "1.5", "x", "1" + "0" * 30], float: ["0", "1", "0.5", "2", "0.9", "1e-3", "-1", "nan", "inf", "1e30", "x"],
          str: ["x", "", "-", "../x", "a\0b", "1,2"]}
LIKELY = {int: ["1", "2", "3"], float: ["0.5", "1", "2"], str: ["x"]}
WORDS = dict(teacher=["toy", "toy-cond", "toyy", "", "/"], batch=["8", "16", "0", "7"], iters=["1", "2", "0"], eval_n=["0", "8", "16", "1"], steps=["999", "999,499", "0.5", "1,0.5", "a"],
             data=["{set}", "{set}/none"], device=["cpu", "auto", "tpu"], lora_targets=["hidden.0", "inp", "none"], small=["width=16", "depth=2", "wide=1", "depth=x"],
             control=["class", "edges"], nfe=["1", "2", "4", "0"], students=["1", "2", "9"])
NOT = ("help", "out", "generator", "compile", "prompts", "cache_prompts")


@pytest.fixture(scope="module")
def parsers(monkeypatch=pytest.MonkeyPatch()):
    found = {}
    with monkeypatch.context() as m:
        for script in SCRIPTS:
            m.setattr(Parser, "parse", lambda self, *a: found.update({script: self}) or (_ for _ in ()).throw(KeyError))
            with contextlib.suppress(KeyError):
                importlib.import_module(script).parse_args([])
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    home = tmp_path_factory.mktemp("set")
    (home / "0").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (i, i, i)).save(home / "0" / f"{i}.png")
    return home


def command(rng, parser, home):
    """Some of a script's flags with values of their kind, mostly likely ones."""
    words = ["--teacher", "toy", "--batch", "8", "--iters", "2", "--log-every", "1", "--sample-every", "0", "--eval-n", "0"]
    known = [a for a in parser._actions if a.option_strings and a.dest not in NOT]
    for action in rng.sample(known, rng.choice([1, 1, 2, 3, 5])):
        words.append(action.option_strings[0])
        n = 0 if action.nargs == 0 else action.nargs if isinstance(action.nargs, int) else rng.randint(1, 2) if action.nargs else 1
        kind, likely = action.type or str, rng.random() < 0.8
        pool = WORDS.get(action.dest) or list(map(str, action.choices or ())) or (LIKELY if likely else VALUES)[kind]
        words += [(rng.choice(pool) if likely else rng.choice(VALUES[kind])).replace("{set}", str(home)) for _ in range(n)]
    return [w for w in words if "\0" not in w]


def refused(script, words):
    """Line that parse_args refuses these with, or None."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            importlib.import_module(script).parse_args(words)
    except UserError as e:
        return f"{script}.py: {' '.join(str(e).split())}\n"
    except SystemExit as e:
        assert e.code == 2
        return err.getvalue()
    return None


def test_flags_that_are_refused_at_once(parsers, pictures):
    count = 0
    for i, rng in enumerate(cases(200)):
        script = SCRIPTS[i % len(SCRIPTS)]
        words = command(rng, parsers[script], pictures)
        line = refused(script, words)
        if line is not None:
            count += 1
            assert line.count("\n") == 1 and len(line) < 600 and "Traceback" not in line, (script, words, line)
    assert count > (100 if FULL else 40)


@pytest.mark.parametrize("n", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_flags_that_make_a_run(n, parsers, pictures, scripts, tmp_path):
    """What parse_args lets through runs two iterations, or is refused in one line before the first of them."""
    codes, i = [], 0
    for k in range(500 if FULL and n > 8 else n):
        script, words = SCRIPTS[k % len(SCRIPTS)], None
        while words is None or refused(script, words):
            i += 1
            words = command(random.Random(f"{SEED} {n} {i}"), parsers[script], pictures)
        out = tmp_path / str(k)
        p = scripts.start(f"{script}.py", *words, "--out", out)
        p.wait()
        codes.append(p.code)
        said = f"{script}.py {' '.join(words)}\n{p.err}"
        assert p.code in (0, 2) and "Traceback" not in p.err, said
        if p.code == 2:
            assert re.fullmatch(rf"{script}\.py: [^\n]{{1,800}}\n", p.err) and not (out / "log.jsonl").exists(), said
        shutil.rmtree(out, ignore_errors=True)
    print(f"{codes.count(0)} runs, {codes.count(2)} refused")
    assert codes.count(0) >= len(codes) // 4


# ---- contents of JSON -----------------------------------------------------------------------------------------------------------------------

STRANGE = [None, True, False, 0, 1, -1, 3, 1.5, 1e300, float("nan"), float("inf"), "", "x", "toy", "../x", [], {}, [1], [[]], {"a": 1}, [None, None], "level", "label", 2**40, -(2**40)]


def places(value, path=()):
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(v, (*path, k))


def mutate(rng, value):
    """One or two changes anywhere: another value, a missing or a new one."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice([p for p in places(value) if p] or [()])
        if not path:
            return value
        parent = value
        for k in path[:-1]:
            parent = parent[k]
        what = rng.random()
        if what < 0.7:
            parent[path[-1]] = rng.choice([v for v in STRANGE if path[-1] != "depth" or not isinstance(v, int) or abs(v) < 10])  # a network of 2**40 layers is only slow
        elif what < 0.9:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[rng.choice(["x", "lora", "extras", "adapted", "experts", "by", "table"])] = rng.choice(STRANGE)
    return value


def text(rng, value):
    """As a file: rarely cut, or with a byte of something else in it."""
    data = json.dumps(mutate(rng, value)).encode()
    if (what := rng.random()) < 0.1:
        data = data[:rng.randint(0, len(data))]
    elif what < 0.2:
        at = rng.randint(0, len(data) - 1)
        data = data[:at] + bytes([rng.randint(0, 255)]) + data[at + 1:]
    return data


def tally(outcomes, n):
    """Of n cases, some worked and more were refused."""
    assert outcomes.count("refused") > n // 5 and outcomes.count("fine") > n // 50, (outcomes.count("refused"), outcomes.count("fine"))


def test_contents_of_a_teachers_folder(tmp_path):
    shutil.copytree(TOY, tmp_path / "t")
    outcomes, good = [], {name: json.loads((TOY / name).read_text()) for name in ("teacher.json", "config.json")}
    good["teacher.json"]["evaluation"] = dict(protocol="x", classifier="c.safetensors", reference="s.npz", images="i.npz", names=["0", "1"], measured=[dict(nfe=1, cfg=1.5, fd=2.0, protocol="x")])
    for rng in cases(150):
        for name, value in good.items():
            (tmp_path / "t" / name).write_text(json.dumps(value))
        name = rng.choice(list(good))
        (tmp_path / "t" / name).write_bytes(text(rng, good[name]))
        try:
            teacher = models.load_teacher(str(tmp_path / "t"))
            with torch.no_grad():
                student = teacher.copy()
                student(torch.zeros(2, 2), 0.5, 0.5, student.encode([0, 1]))
                teacher.guided(torch.zeros(2, 2), 0.5, 0.5, teacher.encode([0, 1]), 2.0)
            outcomes.append("fine")
        except UserError as e:
            one_line(e)
            outcomes.append("refused")
        except Exception:
            print((tmp_path / "t" / name).read_bytes())
            raise
    tally(outcomes, len(outcomes))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Students of the toy in every format: whole, several experts, adapters, new conditions, with a control."""
    home, teacher = tmp_path_factory.mktemp("students"), models.load_teacher("toy")
    info = lambda **kw: dict(method="dmd2", teacher="toy", nfe=1, cfg=1.0, sampler=dict(steps="999"), flags=dict(iters=3, prompts=None)) | kw
    teacher.copy().save(home / "whole", info())
    Routed([teacher.copy(), teacher.copy()], "level", [1.0]).save(home / "phased", info(method="phased_dmd", nfe=2, sampler=dict(step_shift=1.0)))
    teacher.copy(dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")).save(home / "lora", info(method="sid", sampler=dict(form="edm", steps="5", renoise="fresh")))
    teacher.copy().extend("few", "any", "mul").save(home / "twinflow", info(method="twinflow", sampler=dict(mode="few")))
    teacher.copy().extend("s", "guidance").save(home / "boot", info(method="boot", sampler=dict(at=0.0, grid="time", t_max=1.0)))
    f, own, sampler = adapters.load_generator(generator(), teacher, "toy")
    adapters.make(f, own, sampler, Control("class", f, teacher)).save(home / "nct", info(method="nct", sampler={}))
    return home


def test_contents_of_a_students_folder(students):
    outcomes, made, teacher = [], [p.name for p in sorted(students.iterdir())], models.load_teacher("toy")
    good = {name: json.loads((students / name / "distill.json").read_text()) for name in made}
    for i, rng in enumerate(cases(150)):
        name = made[i % len(made)]
        folder, path = students / name, students / name / "distill.json"
        path.write_bytes(text(rng, good[name]))
        try:
            home, info = read_student(folder)
            sample = sampler_of(home, info)
            student = network_of(folder, home, info, teacher, "toy")
            noise = lambda: torch.zeros(2, 2)
            with torch.no_grad():
                sample(student, torch.ones(2, 2), student.encode(torch.tensor([0, 1])), min(info["nfe"], 8), noise, **info["sampler"])
            outcomes.append("fine")
        except UserError as e:
            one_line(e)
            outcomes.append("refused")
        except Exception:
            print(name, path.read_bytes())
            raise
        finally:
            path.write_text(json.dumps(good[name]))
    tally(outcomes, len(outcomes))


@pytest.mark.slow
def test_contents_of_a_transformers_folder(tmp_path):
    """The same for a network of diffusers."""
    from diffusers import DiTTransformer2DModel
    config = dict(num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8, patch_size=4, num_embeds_ada_norm=3)
    DiTTransformer2DModel(**config).save_pretrained(tmp_path)
    model = dict(adapter="dit", schedule=dict(name="flow", shift=1.0), prediction="flow", shape=[1, 8, 8], classes=3, sigma_data=0.5)
    good, outcomes = {"teacher.json": dict(model=model), "config.json": json.loads((tmp_path / "config.json").read_text())}, []
    for rng in cases(60):
        for name, value in good.items():
            (tmp_path / name).write_text(json.dumps(value))
        name = rng.choice(list(good))
        (tmp_path / name).write_bytes(text(rng, good[name]).replace(b'"num_layers": 1099511627776', b'"num_layers": 7'))
        try:
            teacher = models.load_teacher(str(tmp_path))
            with torch.no_grad():
                teacher.guided(torch.zeros(2, 1, 8, 8), 0.5, 0.5, teacher.encode(torch.tensor([0, 1])), 2.0)
            outcomes.append("fine")
        except UserError as e:
            one_line(e)
            outcomes.append("refused")
        except Exception:
            print(name, (tmp_path / name).read_bytes())
            raise
    tally(outcomes, len(outcomes))


# ---- damaged files --------------------------------------------------------------------------------------------------------------------------


def damage(rng, data):
    """Cut, grown, or with flipped bits: anywhere, or where formats keep their tables (both ends)."""
    data = bytearray(data)
    if rng.random() < 0.3:
        return bytes(data[:rng.randint(0, len(data))]) if rng.random() < 0.8 else bytes(data) + rng.randbytes(rng.randint(1, 99))
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(len(data)) if rng.random() < 0.3 else min(rng.randrange(1500), len(data) - 1) * rng.choice([1, -1])
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_damaged_weights(tmp_path):
    """safetensors have no checksum: a flipped bit of a number is a number. All else is refused."""
    shutil.copytree(TOY, tmp_path / "t")
    path, good, outcomes = tmp_path / "t" / WEIGHTS, (TOY / WEIGHTS).read_bytes(), []
    for rng in cases(150):
        path.write_bytes(damage(rng, good))
        try:
            student = models.load_teacher(str(tmp_path / "t")).copy()
            with torch.no_grad():
                student(torch.zeros(2, 2), 0.5, 0.5, student.encode([0, 1]))
            outcomes.append("fine")
        except UserError as e:
            one_line(e)
            assert WEIGHTS in str(e)
            outcomes.append("refused")
    tally(outcomes, len(outcomes))


def test_damaged_checkpoints(run, capsys):  # noqa: F811
    """The one before is taken, bit for bit; or the damage was where nothing is."""
    r = run()
    for it, scale in ((1, 1.0), (2, 2.0)):
        state = parts()
        with torch.no_grad():
            state["student"].weight.fill_(scale)
        r.save(it - 1, state)
    old, new = r.checkpoints()
    r.lock.close()
    good, outcomes = new.read_bytes(), []
    for rng in cases(60):
        new.write_bytes(damage(rng, good))
        r, state = run("--resume"), parts()
        it = r.resume(state)
        r.lock.close()
        assert (state["student"].weight == it).all() and it in (1, 2)
        outcomes.append("fine" if it == 2 else "refused")
        for left in old.parent.glob("*.unreadable"):
            left.unlink()
        assert it == 2 or "not readable" in capsys.readouterr().err
    tally(outcomes, len(outcomes))


def test_contents_of_checkpoints(run):  # noqa: F811
    """Readable, but not what we wrote: refused in one line, or so harmless that training goes on."""
    r = run()
    r.save(1, parts())
    (path,) = r.checkpoints()
    r.lock.close()
    good, outcomes = torch.load(path, weights_only=True), []
    strange = [v for v in STRANGE if not isinstance(v, int) or abs(v) < 10] + [torch.zeros(0), torch.ones(3, 2), torch.ones(2, dtype=torch.int64), torch.tensor(1.0)]

    def spots(value, path=()):
        yield path
        for k, v in value.items() if isinstance(value, dict) else ():
            yield from spots(v, (*path, k))

    for rng in cases(100):
        payload = copy.deepcopy(good)
        spot, parent = rng.choice([p for p in spots(payload) if p]), payload
        for k in spot[:-1]:
            parent = parent[k]
        if rng.random() < 0.2:
            del parent[spot[-1]]
        else:
            parent[spot[-1]] = value = rng.choice(strange)
        torch.save(payload, path)
        r, state = run("--resume"), parts()
        try:
            r.resume(state)
            state["student"](torch.ones(1, 3)).sum().backward()
            r.step(state["opt_g"], list(state["student"].parameters()), 1.0)
            state["ema"].update(8)
            outcomes.append("fine")
        except UserError as e:
            one_line(e)
            outcomes.append("refused")
        except Exception:
            print(spot, locals().get("value"))
            raise
        finally:
            r.lock.close()
    tally(outcomes, len(outcomes))
