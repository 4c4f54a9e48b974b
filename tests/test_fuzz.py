"""Random flags, random contents of JSON files, damaged weights and checkpoints: whatever comes, the program works or says in one line what is wrong.

A small sample by default; DISTIL_FAULTS=full: 500 cases of each (the flags in two parts, those that are refused at once and those that make a run). The cases
are the same every time, unless SEED=n is given; hypothesis makes the failing one as small as it can.
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
from helpers.cases import FULL, SCRIPTS, SEED, toy_generator
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from test_untrusted import parts

from common.errors import UserError
from common.files import ROOT, WEIGHTS, write_json
from common.flags import Parser
from common.routed import ByLevel
from common.teachers.load import load_teacher
from common.teachers.students import network_of, read_student, sampler_of
from controls.controlled import load_generator, make_controlled
from controls.maps import Control

TOY = ROOT / "assets" / "toy"
TINY_DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=1,
    out_channels=1,
    num_layers=1,
    sample_size=8,
    patch_size=4,
    num_embeds_ada_norm=3,
)
TINY_MODEL = dict(
    adapter="dit",
    schedule=dict(name="flow", shift=1.0),
    prediction="flow",
    shape=[1, 8, 8],
    classes=3,
    sigma_data=0.5,
)


def cases(n, body):
    """What body(rng) gives in n random cases (500 in full)."""
    outcomes = []

    @seed(SEED)
    @settings(
        max_examples=500 if FULL else n,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.randoms(use_true_random=False))
    def case(rng):
        outcomes.append(body(rng))

    case()
    return outcomes


def chance(rng, percent):
    return rng.randrange(100) < percent


def attempt(body, *what):
    """ "fine", or "refused" in one line; anything else is shown with what led to it."""
    try:
        body()
    except UserError as e:
        one_line(e)
        return "refused"
    except Exception:
        print(*what)
        raise
    return "fine"


def one_line(e, limit=900):
    assert "\n" not in str(e) and 0 < len(str(e)) < limit, str(e)


# ---- flags ------------------------------------------------------------------------------------------------------------------------------

VALUES = {
    int: ["0", "1", "2", "3", "7", "-1", "40", "1.5", "x", "1" + "0" * 30],
    float: ["0", "1", "0.5", "2", "0.9", "1e-3", "-1", "nan", "inf", "1e30", "x"],
    str: ["x", "", "-", "../x", "a\0b", "1,2"],
}
LIKELY = {int: ["1", "2", "3"], float: ["0.5", "1", "2"], str: ["x"]}
WORDS = dict(
    teacher=["toy", "toy-cond", "toyy", "", "/"],
    batch=["8", "16", "0", "7"],
    iters=["1", "2", "0"],
    eval_n=["0", "8", "16", "1"],
    steps=["999", "999,499", "0.5", "1,0.5", "a"],
    size=["28", "16x16", "0", "16x", "x", "9999999"],
    data=["{set}", "{set}/none"],
    device=["cpu", "auto", "tpu"],
    lora_targets=["hidden.0", "inp", "none"],
    small=["width=16", "depth=2", "wide=1", "depth=x"],
    control=["class", "edges"],
    nfe=["1", "2", "4", "0"],
    students=["1", "2", "9"],
)
NOT = ("help", "out", "generator", "compile", "prompts", "cache_prompts")


@pytest.fixture(scope="module")
def parsers():
    found = {}
    with pytest.MonkeyPatch.context() as m:
        for script in SCRIPTS:
            m.setattr(
                Parser,
                "parse",
                lambda self, *a: found.update({script: self}) or (_ for _ in ()).throw(KeyError),
            )
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
    words = [
        "--teacher",
        "toy",
        "--batch",
        "8",
        "--iters",
        "2",
        "--log-every",
        "1",
        "--sample-every",
        "0",
        "--eval-n",
        "0",
    ]
    known = [a for a in parser._actions if a.option_strings and a.dest not in NOT]
    for action in rng.sample(known, rng.choice([1, 1, 2, 3, 5])):
        words.append(action.option_strings[0])
        n = (
            0
            if action.nargs == 0
            else action.nargs
            if isinstance(action.nargs, int)
            else rng.randint(1, 2)
            if action.nargs
            else 1
        )
        kind, likely = action.type or str, chance(rng, 80)
        pool = (
            WORDS.get(action.dest)
            or list(map(str, action.choices or ()))
            or (LIKELY if likely else VALUES).get(kind, LIKELY[str])
        )
        words += [
            (rng.choice(pool) if likely else rng.choice(VALUES.get(kind, VALUES[str]))).replace(
                "{set}", str(home)
            )
            for _ in range(n)
        ]
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
    def body(rng):
        words = command(rng, parsers[script := rng.choice(SCRIPTS)], pictures)
        line = refused(script, words)
        assert (
            line is None or line.count("\n") == 1 and len(line) < 600 and "Traceback" not in line
        ), (script, words, line)
        return "fine" if line is None else "refused"

    outcomes = cases(200, body)
    assert outcomes.count("refused") > len(outcomes) // 8


@pytest.mark.parametrize("n", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_flags_that_make_a_run(n, parsers, pictures, scripts, tmp_path):
    """What parse_args lets through runs two iterations, or is refused in one line before the first of them."""
    codes, i = [], 0
    for k in range(500 if FULL and n > 4 else n):
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
            assert (
                re.fullmatch(rf"{script}\.py: [^\n]{{1,800}}\n", p.err)
                and not (out / "log.jsonl").exists()
            ), said
        shutil.rmtree(out, ignore_errors=True)
    print(f"{codes.count(0)} runs, {codes.count(2)} refused")
    assert codes.count(0) >= len(codes) // 5


# ---- contents of JSON -----------------------------------------------------------------------------------------------------------------------

STRANGE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    1.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "toy",
    "../x",
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    [None, None],
    "level",
    "label",
    2**40,
    -(2**40),
]


def places(value, path=()):
    yield path
    for k, v in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
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
        what = rng.randrange(10)
        if what < 7:
            parent[path[-1]] = rng.choice(
                [
                    v
                    for v in STRANGE
                    if path[-1] not in ("depth", "num_layers")
                    or not isinstance(v, int)
                    or abs(v) < 10
                ]
            )  # a network of 2**40 layers is only slow
        elif what < 9:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[rng.choice(["x", "lora", "extras", "adapted", "experts", "by", "table"])] = (
                rng.choice(STRANGE)
            )
    return value


def text(rng, value):
    """As a file: rarely cut, or with a byte of something else in it."""
    data = json.dumps(mutate(rng, value)).encode()
    if (what := rng.randrange(10)) == 0:
        data = data[: rng.randint(0, len(data))]
    elif what == 1:
        at = rng.randint(0, len(data) - 1)
        data = data[:at] + bytes([rng.randint(0, 255)]) + data[at + 1 :]
    return data


def tally(outcomes):
    """Neither all worked nor all were refused: the cases mean something."""
    fine, refused = outcomes.count("fine"), outcomes.count("refused")
    print(f"{fine} worked, {refused} were refused")
    assert refused > len(outcomes) // 8 and fine > len(outcomes) // 50, (fine, refused)


def test_contents_of_a_teachers_folder(tmp_path):
    shutil.copytree(TOY, tmp_path / "t")
    good = {name: json.loads((TOY / name).read_text()) for name in ("teacher.json", "config.json")}
    good["teacher.json"]["evaluation"] = dict(
        protocol="x",
        classifier="c.safetensors",
        reference="s.npz",
        images="i.npz",
        names=["0", "1"],
        measured=[dict(nfe=1, cfg=1.5, fd=2.0, protocol="x")],
    )

    def load():
        teacher = load_teacher(str(tmp_path / "t"))
        with torch.no_grad():
            student = teacher.copy()
            student(torch.zeros(2, 2), 0.5, 0.5, student.encode([0, 1]))
            teacher.guided(torch.zeros(2, 2), 0.5, 0.5, teacher.encode([0, 1]), 2.0)

    def body(rng):
        for name, value in good.items():
            (tmp_path / "t" / name).write_text(json.dumps(value))
        path = tmp_path / "t" / rng.choice(list(good))
        path.write_bytes(text(rng, good[path.name]))
        return attempt(load, path.name, path.read_bytes())

    tally(cases(150, body))


def test_no_number_where_a_network_of_diffusers_wants_one(tmp_path):
    """It would be built and fail in its first pass (found by the case above)."""
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(**TINY_DIT).save_pretrained(tmp_path)
    write_json(tmp_path / "teacher.json", dict(model=TINY_MODEL))
    config = json.loads((tmp_path / "config.json").read_text())
    load_teacher(str(tmp_path))
    for value in (None, "", []):
        write_json(tmp_path / "config.json", config | dict(norm_eps=value))
        with pytest.raises(UserError, match="config.json: norm_eps: expected float, found"):
            load_teacher(str(tmp_path))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Students of the toy in every format: whole, several experts, adapters, new conditions, with a control."""
    home, teacher = tmp_path_factory.mktemp("students"), load_teacher("toy")
    info = lambda **kw: (
        dict(
            method="dmd2",
            teacher="toy",
            nfe=1,
            cfg=1.0,
            sampler=dict(steps="999"),
            flags=dict(iters=3, prompts=None),
        )
        | kw
    )
    teacher.copy().save(home / "whole", info())
    ByLevel([teacher.copy(), teacher.copy()], [1.0]).save(
        home / "phased", info(method="phased_dmd", nfe=2, sampler=dict(step_shift=1.0))
    )
    teacher.copy(dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")).save(
        home / "lora", info(method="sid", sampler=dict(form="edm", steps="5", renoise="fresh"))
    )
    teacher.copy().extend("few", "any", "mul").save(
        home / "twinflow", info(method="twinflow", sampler=dict(mode="few"))
    )
    teacher.copy().extend("s", "guidance").save(
        home / "boot", info(method="boot", sampler=dict(at=0.0, grid="time", t_max=1.0))
    )
    f, own, sampler = load_generator(toy_generator(), teacher, "toy")
    make_controlled(f, own, sampler, Control("class", f, teacher)).save(
        home / "nct", info(method="nct", sampler={})
    )
    return home


def test_contents_of_a_students_folder(students):
    names, teacher = [p.name for p in sorted(students.iterdir())], load_teacher("toy")
    good = {name: json.loads((students / name / "distill.json").read_text()) for name in names}

    def body(rng):
        folder = students / rng.choice(names)
        path = folder / "distill.json"
        path.write_bytes(text(rng, good[folder.name]))

        def load():
            home, info = read_student(folder)
            sample = sampler_of(home, info)
            student = network_of(folder, home, info, teacher, "toy")
            with torch.no_grad():
                sample(
                    student,
                    torch.ones(2, 2),
                    student.encode(torch.tensor([0, 1])),
                    min(info["nfe"], 8),
                    lambda: torch.zeros(2, 2),
                    **info["sampler"],
                )

        try:
            return attempt(load, folder.name, path.read_bytes())
        finally:
            path.write_text(json.dumps(good[folder.name]))

    tally(cases(150, body))


@pytest.mark.slow
def test_contents_of_a_transformers_folder(tmp_path):
    """The same for a network of diffusers."""
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(**TINY_DIT).save_pretrained(tmp_path)
    good = {
        "teacher.json": dict(model=TINY_MODEL),
        "config.json": json.loads((tmp_path / "config.json").read_text()),
    }

    def load():
        teacher = load_teacher(str(tmp_path))
        with torch.no_grad():
            teacher.guided(
                torch.zeros(2, 1, 8, 8), 0.5, 0.5, teacher.encode(torch.tensor([0, 1])), 2.0
            )

    def body(rng):
        for name, value in good.items():
            (tmp_path / name).write_text(json.dumps(value))
        path = tmp_path / rng.choice(list(good))
        path.write_bytes(text(rng, good[path.name]))
        return attempt(load, path.name, path.read_bytes())

    tally(cases(60, body))


# ---- damaged files --------------------------------------------------------------------------------------------------------------------------


def damage(rng, data):
    """Cut, grown, or with flipped bits: anywhere, or where formats keep their tables (both ends)."""
    data = bytearray(data)
    if chance(rng, 30):
        return (
            bytes(data[: rng.randint(0, len(data))])
            if chance(rng, 80)
            else bytes(data) + rng.randbytes(rng.randint(1, 99))
        )
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = (
            rng.randrange(len(data))
            if chance(rng, 30)
            else min(rng.randrange(1500), len(data) - 1) * rng.choice([1, -1])
        )
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_damaged_weights(tmp_path):
    """safetensors have no checksum: a flipped bit of a number is a number. All else is refused."""
    shutil.copytree(TOY, tmp_path / "t")
    path, good = tmp_path / "t" / WEIGHTS, (TOY / WEIGHTS).read_bytes()

    def load():
        student = load_teacher(str(tmp_path / "t")).copy()
        with torch.no_grad():
            student(torch.zeros(2, 2), 0.5, 0.5, student.encode([0, 1]))

    def body(rng):
        path.write_bytes(damage(rng, good))
        return attempt(load, path.read_bytes()[:1500])

    tally(cases(150, body))


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
    good = new.read_bytes()

    def body(rng):
        new.write_bytes(damage(rng, good))
        r, state = run("--resume"), parts()
        try:
            it = r.resume(state)
        finally:
            r.lock.close()
        assert (state["student"].weight == it).all() and it in (1, 2)
        for left in old.parent.glob("*.unreadable"):
            left.unlink()
        assert it == 2 or "not readable" in capsys.readouterr().err
        return "fine" if it == 2 else "refused"

    tally(cases(60, body))


def test_contents_of_checkpoints(run):  # noqa: F811
    """Readable, but not what we wrote: refused in one line, or so harmless that training goes on."""
    r = run()
    r.save(1, parts())
    (path,) = r.checkpoints()
    r.lock.close()
    good = torch.load(path, weights_only=True)
    strange = [v for v in STRANGE if not isinstance(v, int) or abs(v) < 10] + [
        torch.zeros(0),
        torch.ones(3, 2),
        torch.ones(2, dtype=torch.int64),
        torch.tensor(1.0),
    ]

    def spots(value, at=()):
        yield at
        for k, v in value.items() if isinstance(value, dict) else ():
            yield from spots(v, (*at, k))

    def body(rng):
        payload = copy.deepcopy(good)
        at, parent, value = rng.choice([p for p in spots(payload) if p]), payload, "deleted"
        for k in at[:-1]:
            parent = parent[k]
        if chance(rng, 20):
            del parent[at[-1]]
        else:
            parent[at[-1]] = value = rng.choice(strange)
        torch.save(payload, path)
        r, state = run("--resume"), parts()

        def go_on():
            r.resume(state)
            state["student"](torch.ones(1, 3)).sum().backward()
            r.step(state["opt_g"], 1.0)
            state["ema"].update(8)

        try:
            return attempt(go_on, at, value)
        finally:
            r.lock.close()

    tally(cases(100, body))
