"""--shard on two gloo processes: the same numbers as whole networks, checkpoints that any number of processes reads, a whole student."""
import json
import warnings

import pytest
import torch

import tiny
from cases import MORE, SHORT
from common import models, teachers
from test_scripts import QUICK, checkpoint, close, log, one_line, processes, same

MORE = MORE | {"flowmap": ["--teacher", "toy-cond", "--correction", 0.25, "--ema", 1000]}  # the JVP


def two(scripts, script, args, out):
    ps = processes(scripts, 2, f"{script}.py", *args, "--shard", "--out", out)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    assert "Warning" not in ps[0].err and ps[1].out == ""
    return ps[0]


def both(scripts, tmp_path, script, args, it):
    """The run on one process and sharded on two -> their folders, compared."""
    scripts.run(f"{script}.py", *args, "--out", tmp_path / "one")
    two(scripts, script, args, tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two", it)


@pytest.mark.parametrize("script", list(SHORT))
def test_toy(script, scripts, tmp_path):
    both(scripts, tmp_path, script, [*QUICK, *MORE[script], "--iters", 5, "--log-every", 1], 5)


def test_mnist(scripts, tmp_path):
    """Blocks of a transformer, features for the GAN from the middle of it, activations recomputed; then the metric, on both processes."""
    args = ["--teacher", "mnist", "--batch", 4, "--iters", 3, "--log-every", 1, "--sample-every", 0, "--cooldown", 0, "--gan", "--ratio", 2, "--ema", 1000, "--eval-n", 63,
            "--grad-checkpoint"]
    both(scripts, tmp_path, "dmd2", args, 3)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert other["fd"] == pytest.approx(one["fd"], rel=1e-3) and other["agreement"] == one["agreement"] and other["distinct"] == 63


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: name -> folder of a tiny pipeline, flags that choose it."""
    base, made = tmp_path_factory.mktemp("shard"), {}
    warnings.simplefilter("ignore")
    import diffusers
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    (base / "prompts.txt").write_text("dog\na red heart\n")

    def get(name):
        if name not in made:
            (base / name).mkdir()
            made[name] = getattr(tiny, name)(base / name)
        return made[name], ["--teacher", made[name], "--prompts", base / "prompts.txt", "--cache-prompts", base / "cache"]

    return get


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_pipeline(name, folder, scripts, tmp_path):
    """Three iterations equal those of whole networks; sharded 3 + 3 = 6; a checkpoint goes on with another number of processes; the student is whole."""
    import diffusers
    home, args = folder(name)
    args += ["--batch", 4, "--cfg", 3, "--eval-n", 0, "--log-every", 1, "--cooldown", 0, "--ema", 20, "--ratio", 2, "--sample-every", 0, "--grad-checkpoint", "--nfe", 2]
    both(scripts, tmp_path, "dmd2", [*args, "--iters", 3], 3)
    two(scripts, "dmd2", [*args, "--iters", 6, "--save-every", 3], tmp_path / "whole")
    assert "resumed it-00000003.pt" in two(scripts, "dmd2", [*args, "--iters", 6, "--resume"], tmp_path / "two").out
    same(tmp_path / "whole", tmp_path / "two", 6)
    scripts.run("dmd2.py", *args, "--iters", 6, "--resume", "--out", tmp_path / "one")
    close(tmp_path / "one", tmp_path / "two", 6)
    (tmp_path / "whole" / "ckpt" / "it-00000006.pt").unlink()
    assert "resumed it-00000003.pt" in scripts.run("dmd2.py", *args, "--iters", 6, "--resume", "--out", tmp_path / "whole").out  # from two processes to one
    close(tmp_path / "one", tmp_path / "whole", 6)
    average = torch.load(tmp_path / "two" / "ckpt" / "it-00000006.pt", weights_only=True)["state"]["ema"]["model"]
    teacher = teachers.load_pipeline(str(home), prompts=["dog", "a red heart"], cache=args[5], say=lambda *a: None)
    net = getattr(diffusers, teacher.network).from_pretrained(tmp_path / "two" / "student")
    assert all(torch.equal(v, average[f"net.{k}"]) for k, v in net.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "two" / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    picture = lambda run: (tmp_path / run / "samples" / "00000003.png").read_bytes()
    assert picture("one") == picture("two")
