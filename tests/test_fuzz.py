"""Random flags, random contents of JSON files, damaged weights and checkpoints: whatever comes, the
program works or says in one line what is wrong.

A small sample by default; DISTIL_FAULTS=full: 500 cases of each. The cases are the same every time
unless SEED=n is given. hypothesis makes the failing one as small as it can.
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
from helpers.files import training_parts
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from common.files import ROOT, WEIGHTS, write_json
from common.routed import ByLevel
from common.teachers.load import load_teacher
from common.teachers.students import network_of, read_student, sampler_of
from controls.controlled import load_generator, make_controlled
from controls.maps import Control
from training.flags import Parser

TOY = ROOT / "assets" / "toy"


def run_cases(n, body):
    """[body(rng)] of n random cases (500 in full)."""
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


def attempt(body, *case):
    """ "fine", or "refused" in one line. Any other error is raised, after the case is printed."""
    try:
        body()
    except UserError as e:
        assert "\n" not in str(e)
        assert 0 < len(str(e)) < 900, str(e)
        return "refused"
    except Exception:
        print(*case)
        raise
    return "fine"


def check_outcomes(outcomes):
    """Neither all worked nor all were refused: the cases mean something."""
    fine, refused = outcomes.count("fine"), outcomes.count("refused")
    print(f"{fine} worked, {refused} were refused")
    assert refused > len(outcomes) // 8, (fine, refused)
    assert fine > len(outcomes) // 50, (fine, refused)


# ---- flags ---------------------------------------------------------------------------------------

# Values that a flag of this type takes sometimes, and values that are mostly good.
ANY = {
    int: ["0", "1", "2", "3", "7", "-1", "40", "1.5", "x", "1" + "0" * 30],
    float: ["0", "1", "0.5", "2", "0.9", "1e-3", "-1", "nan", "inf", "1e30", "x"],
    str: ["x", "", "-", "../x", "1,2"],
}
LIKELY = {int: ["1", "2", "3"], float: ["0.5", "1", "2"], str: ["x"]}
LIKELY_OF_FLAG = dict(
    teacher=["toy", "toy-cond", "toyy", "", "/"],
    batch=["8", "16", "0", "7"],
    iters=["1", "2", "0"],
    eval_n=["0", "8", "16", "1"],
    steps=["999", "999,499", "0.5", "1,0.5", "a"],
    step_indices=["999", "999,499", "499,999", "1000", "a"],
    size=["28", "16x16", "0", "16x", "x", "9999999"],
    data=["{set}", "{set}/none"],
    device=["cpu", "auto", "tpu"],
    lora_targets=["hidden.0", "inp", "none"],
    small=["width=16", "depth=2", "wide=1", "depth=x"],
    small_fake=["width=16", "depth=2", "wide=1", "depth=x"],
    control=["class", "edges"],
    nfe=["1", "2", "4", "0"],
    students=["1", "2", "9"],
)
NEVER = ("help", "out", "generator", "compile", "prompts", "cache_prompts")
BASE = "--teacher toy --batch 8 --iters 2 --log-every 1 --sample-every 0 --eval-n 0".split()


class Captured(Exception):
    """Carries the parser that a script has built."""


@pytest.fixture(scope="module")
def parsers():
    def capture(parser, *args):
        raise Captured(parser)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse", capture)
        for script in SCRIPTS:
            with pytest.raises(Captured) as e:
                importlib.import_module(script).parse_args([])
            found[script] = e.value.args[0]
    return found


@pytest.fixture(scope="module")
def grey_images(tmp_path_factory):
    home = tmp_path_factory.mktemp("set")
    (home / "0").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (i, i, i)).save(home / "0" / f"{i}.png")
    return home


def random_flags(rng, parser, images):
    """Some of a script's flags with values of their type, mostly likely ones."""
    words = list(BASE)
    known = [a for a in parser._actions if a.option_strings and a.dest not in NEVER]
    for action in rng.sample(known, rng.choice([1, 1, 2, 3, 5])):
        words.append(action.option_strings[0])
        values = values_of(rng, action)
        for _ in range(number_of_values(rng, action)):
            words.append(rng.choice(values).replace("{set}", str(images)))
    return words


def values_of(rng, action):
    kind = action.type or str
    if chance(rng, 20):
        return ANY.get(kind, ANY[str])
    if action.dest in LIKELY_OF_FLAG:
        return LIKELY_OF_FLAG[action.dest]
    if action.choices:
        return [str(choice) for choice in action.choices]
    return LIKELY.get(kind, LIKELY[str])


def number_of_values(rng, action):
    if action.nargs is None:
        return 1
    if isinstance(action.nargs, int):
        return action.nargs
    return rng.randint(1, 2)


def refusal(script, words):
    """The line with which parse_args refuses these words, or None."""
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


def test_flags_that_are_refused_at_once(parsers, grey_images):
    def body(rng):
        script = rng.choice(SCRIPTS)
        words = random_flags(rng, parsers[script], grey_images)
        line = refusal(script, words)
        if line is None:
            return "fine"
        assert line.count("\n") == 1, (script, words, line)
        assert len(line) < 600, (script, words, line)
        assert "Traceback" not in line, (script, words, line)
        return "refused"

    outcomes = run_cases(200, body)
    assert outcomes.count("refused") > len(outcomes) // 8


def accepted_flags(script, parser, images, seeds):
    """The first random flags that parse_args accepts."""
    for number in seeds:
        words = random_flags(random.Random(f"{SEED} {number}"), parser, images)
        if refusal(script, words) is None:
            return words


@pytest.mark.parametrize("n", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_flags_that_make_a_run(n, parsers, grey_images, scripts, tmp_path):
    """What parse_args accepts runs two iterations, or is refused in one line before the first."""
    codes = []
    seeds = iter(range(n * 1000, 10**9))
    for k in range(500 if FULL and n > 4 else n):
        script = SCRIPTS[k % len(SCRIPTS)]
        words = accepted_flags(script, parsers[script], grey_images, seeds)
        out = tmp_path / str(k)
        p = scripts.start(f"{script}.py", *words, "--out", out)
        codes.append(p.wait())
        case = f"{script}.py {' '.join(words)}\n{p.err}"
        assert p.code in (0, 2), case
        assert "Traceback" not in p.err, case
        if p.code == 2:
            assert re.fullmatch(rf"{script}\.py: [^\n]{{1,800}}\n", p.err), case
            assert not (out / "log.jsonl").exists(), case
        shutil.rmtree(out, ignore_errors=True)
    print(f"{codes.count(0)} runs, {codes.count(2)} refused")
    assert codes.count(0) >= len(codes) // 5


# ---- contents of JSON ----------------------------------------------------------------------------

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
NEW_FIELDS = ["x", "lora", "extras", "adapted", "experts", "by", "table"]
SIZES = ("depth", "num_layers")  # with 2**40 layers a network is only slow to build


def paths_in(value, path=(), lists=True):
    """Paths of all values inside nested dicts and, unless lists is False, lists."""
    entries = []
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list) and lists:
        entries = enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        yield from paths_in(inner, (*path, key), lists)


def strange_value(rng, key):
    if key in SIZES:
        return rng.choice([v for v in STRANGE if not isinstance(v, int) or abs(v) < 10])
    return rng.choice(STRANGE)


def mutate(rng, value):
    """One or two changes anywhere: another value, a missing one, a new field."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        paths = list(paths_in(value))
        if not paths:
            break
        *parents, key = rng.choice(paths)
        parent = value
        for step in parents:
            parent = parent[step]
        kind = rng.randrange(10)
        if kind < 7:
            parent[key] = strange_value(rng, key)
        elif kind < 9:
            del parent[key]
        elif isinstance(parent, dict):
            parent[rng.choice(NEW_FIELDS)] = rng.choice(STRANGE)
    return value


def mutated_file(rng, value):
    """Bytes of a changed JSON value; now and then they are cut, or one of them is another."""
    content = json.dumps(mutate(rng, value)).encode()
    kind = rng.randrange(10)
    if kind == 0:
        return content[: rng.randint(0, len(content))]
    if kind == 1:
        at = rng.randint(0, len(content) - 1)
        return content[:at] + bytes([rng.randint(0, 255)]) + content[at + 1 :]
    return content


def fuzz_json(n, folder, good, load):
    """Runs load() with one of the JSON files of a folder changed. good: {name: contents}."""

    def body(rng):
        for name, value in good.items():
            (folder / name).write_text(json.dumps(value))
        path = folder / rng.choice(list(good))
        path.write_bytes(mutated_file(rng, good[path.name]))
        return attempt(load, path.name, path.read_bytes())

    check_outcomes(run_cases(n, body))


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

    @torch.no_grad()
    def load():
        teacher = load_teacher(str(tmp_path / "t"))
        student = teacher.copy()
        student(torch.zeros(2, 2), 0.5, 0.5, student.encode([0, 1]))
        teacher.guided(torch.zeros(2, 2), 0.5, 0.5, teacher.encode([0, 1]), 2.0)

    fuzz_json(150, tmp_path / "t", good, load)


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


@pytest.fixture
def tiny_dit(tmp_path):
    """Folder of a class-conditional transformer."""
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(**TINY_DIT).save_pretrained(tmp_path)
    write_json(tmp_path / "teacher.json", dict(model=TINY_MODEL))
    return tmp_path


@pytest.mark.parametrize("value", [None, "", []])
def test_no_number_where_diffusers_needs_one(value, tiny_dit):
    """diffusers would build the network, which would fail in its first pass."""
    config = json.loads((tiny_dit / "config.json").read_text())
    load_teacher(str(tiny_dit))
    write_json(tiny_dit / "config.json", config | dict(norm_eps=value))
    with pytest.raises(UserError, match="config.json: norm_eps: expected float, found"):
        load_teacher(str(tiny_dit))


@pytest.mark.slow
def test_contents_of_a_transformers_folder(tiny_dit):
    config = json.loads((tiny_dit / "config.json").read_text())
    good = {"teacher.json": dict(model=TINY_MODEL), "config.json": config}

    @torch.no_grad()
    def load():
        teacher = load_teacher(str(tiny_dit))
        cond = teacher.encode(torch.tensor([0, 1]))
        teacher.guided(torch.zeros(2, 1, 8, 8), 0.5, 0.5, cond, 2.0)

    fuzz_json(60, tiny_dit, good, load)


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Students of the toy in every format: whole, experts, LoRA, new conditions, a control."""
    home, teacher = tmp_path_factory.mktemp("students"), load_teacher("toy")

    def save(name, student, method, sampler, nfe=1):
        flags = dict(iters=3, prompts=None)
        info = dict(method=method, teacher="toy", nfe=nfe, cfg=1.0, sampler=sampler, flags=flags)
        student.save(home / name, info)

    save("whole", teacher.copy(), "dmd2", dict(steps="999"))
    experts = ByLevel([teacher.copy(), teacher.copy()], [1.0])
    save("experts", experts, "phased_dmd", dict(step_shift=1.0), nfe=2)
    lora = dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")
    save("lora", teacher.copy(lora), "sid", dict(steps="5"))
    extended = teacher.copy().extend("r", "fake")
    save("twinflow", extended, "twinflow", dict(mode="few"))
    extended = teacher.copy().extend("time")
    save("boot", extended, "boot", {})
    generator, info, sampler = load_generator(toy_generator(), teacher, "toy")
    control = Control("class", generator, teacher)
    controlled = make_controlled(generator, info, sampler, control)
    save("controlled", controlled, "nct", {})
    return home


@torch.no_grad()
def sample_student(folder, teacher):
    home, info = read_student(folder)
    sample = sampler_of(home, info)
    student = network_of(folder, home, info, teacher, "toy")
    cond = student.encode(torch.tensor([0, 1]))
    noise = lambda: torch.zeros(2, 2)
    sample(student, torch.ones(2, 2), cond, min(info["nfe"], 8), noise, **info["sampler"])


def test_students_are_good_before_they_are_changed(students):
    teacher = load_teacher("toy")
    for folder in students.iterdir():
        sample_student(folder, teacher)


def test_contents_of_a_students_folder(students):
    teacher = load_teacher("toy")
    names = sorted(folder.name for folder in students.iterdir())
    good = {name: json.loads((students / name / "distill.json").read_text()) for name in names}

    def body(rng):
        folder = students / rng.choice(names)
        path = folder / "distill.json"
        path.write_bytes(mutated_file(rng, good[folder.name]))
        try:
            return attempt(lambda: sample_student(folder, teacher), folder, path.read_bytes())
        finally:
            path.write_text(json.dumps(good[folder.name]))

    check_outcomes(run_cases(150, body))


# ---- damaged files -------------------------------------------------------------------------------


def damage(rng, content):
    """Cut, grown, or with flipped bits: anywhere, or at both ends, where formats have tables."""
    if chance(rng, 30):
        if chance(rng, 80):
            return content[: rng.randint(0, len(content))]
        return content + rng.randbytes(rng.randint(1, 99))
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if chance(rng, 30):
            at = rng.randrange(len(content))
        else:
            at = min(rng.randrange(1500), len(content) - 1) * rng.choice([1, -1])
        content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def test_damaged_weights(tmp_path):
    """safetensors have no checksum: a flipped bit of a number is a number. All else is refused."""
    shutil.copytree(TOY, tmp_path / "t")
    path, good = tmp_path / "t" / WEIGHTS, (TOY / WEIGHTS).read_bytes()

    @torch.no_grad()
    def load():
        student = load_teacher(str(tmp_path / "t")).copy()
        student(torch.zeros(2, 2), 0.5, 0.5, student.encode([0, 1]))

    def body(rng):
        path.write_bytes(damage(rng, good))
        return attempt(load, path.read_bytes()[:1500])

    check_outcomes(run_cases(150, body))


def test_damaged_checkpoints(make_run, capsys):
    """The one before is taken, bit for bit; or the damage was where nothing is."""
    run = make_run()
    for it in (1, 2):
        state = training_parts()
        torch.nn.init.constant_(state["student"].weight, it)
        run.save(it - 1, state)
    older, newer = run.checkpoints()
    run.close()
    good = newer.read_bytes()

    def body(rng):
        newer.write_bytes(damage(rng, good))
        run, state = make_run("--resume"), training_parts()
        try:
            it = run.resume(state)
        finally:
            run.close()
        for left in older.parent.glob("*.unreadable"):
            left.unlink()
        assert it in (1, 2)
        assert (state["student"].weight == it).all()
        if it == 2:
            return "fine"
        assert "not readable" in capsys.readouterr().err
        return "refused"

    check_outcomes(run_cases(60, body))


def test_contents_of_checkpoints(make_run):
    """Readable, but not ours: refused in one line, or so harmless that training goes on."""
    run = make_run()
    run.save(1, training_parts())
    (path,) = run.checkpoints()
    run.close()
    good = torch.load(path, weights_only=True)
    strange = [v for v in STRANGE if not isinstance(v, int) or abs(v) < 10]
    strange += [torch.zeros(0), torch.ones(3, 2), torch.tensor(1.0)]
    strange += [torch.ones(2, dtype=torch.int64)]

    def body(rng):
        payload = copy.deepcopy(good)
        *parents, key = rng.choice(list(paths_in(payload, lists=False)))
        parent, value = payload, "deleted"
        for step in parents:
            parent = parent[step]
        if chance(rng, 20):
            del parent[key]
        else:
            value = rng.choice(strange)
            parent[key] = value
        torch.save(payload, path)
        run, state = make_run("--resume"), training_parts()

        def go_on():
            run.resume(state)
            state["student"](torch.ones(1, 3)).sum().backward()
            run.step(state["opt_g"], 1.0)
            state["ema"].update(8)

        try:
            return attempt(go_on, parents, key, value)
        finally:
            run.close()

    check_outcomes(run_cases(100, body))
