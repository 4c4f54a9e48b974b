"""dryrun/wire.py: what a dry run says that processes send is what real ones send over gloo."""

import json
import re

import pytest
import torch
from helpers.dry import dry_run, leave_device
from helpers.runs import run_processes

from common.teachers.load import load_teacher
from dryrun import ghost
from dryrun.ghost import GhostDevice
from dryrun.wire import AGAIN, ALL_REDUCED, GATHERED, SCATTERED, GhostDDP, Traffic

ghost.register()  # before the first backward of this process: while pytest collects
slow = pytest.mark.slow

# Run in real processes before the script: sums up the bytes that each sends, and writes the sums
# after every iteration. A ring of N sends (N - 1) / N of a whole tensor to gather or to scatter it.
COUNT = """
import json, os
import torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP

sent = dict(reduced=0, gathered=0, scattered=0)
lines = open(os.environ["SENT"] + os.environ["RANK"], "w")

def count(kind, tensor, times=1, group=None):
    n = dist.get_world_size(group)
    sent[kind] += times * (n - 1) / n * tensor.numel() * tensor.element_size()

def count_ddp(state, bucket):
    count("reduced", bucket.buffer(), 2)
    return default_hooks.allreduce_hook(None, bucket)

def replace(name, kind):
    original = getattr(dist, name, None)
    def counting(*args, **kwargs):
        names = ("output", "input", "output_tensor", "input_tensor")
        tensors = [*args, *(kwargs[k] for k in names if k in kwargs)]
        sizes = [t for t in tensors if torch.is_tensor(t)]
        count(kind, max(sizes, key=torch.Tensor.numel), group=kwargs.get("group"))
        return original(*args, **kwargs)
    if original is not None:
        setattr(dist, name, counting)

for name in ("all_gather_single", "all_gather_into_tensor"):
    replace(name, "gathered")
for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
    replace(name, "scattered")

all_reduce = dist.all_reduce
def from_copy_to_copy(tensor, *args, **kwargs):
    if dist.get_world_size(kwargs.get("group")) < dist.get_world_size():
        count("reduced", tensor, 2, kwargs["group"])
    return all_reduce(tensor, *args, **kwargs)
dist.all_reduce = from_copy_to_copy

init = DDP.__init__
def with_hook(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.register_comm_hook(None, count_ddp)
DDP.__init__ = with_hook

from training import optim, run
after = run.Run.after
def note(self, *args, **kwargs):
    if self.is_last_microstep:
        lines.write(json.dumps(sent) + "\\n")
        lines.flush()
    return after(self, *args, **kwargs)
run.Run.after = note
def counting(flat):
    count("reduced", flat, 2)
    return all_reduce(flat)
average = optim.average_over_processes
run.average_over_processes = lambda grads, world: average(grads, world, counting)
"""


@pytest.fixture
def dry(monkeypatch, tmp_path):
    yield lambda script, *flags: dry_run(monkeypatch, script, tmp_path / "dry", *flags)
    leave_device()


def really_sent(scripts, tmp_path, n, script, *flags):
    """Bytes by iteration and kind that the first of n processes sends."""
    quiet = ["--save-every", 0, "--sample-every", 0, "--eval-n", 0, "--log-every", 1000]
    env = dict(BEFORE=COUNT, SENT=tmp_path / "sent")
    run_processes(scripts, n, f"{script}.py", *flags, *quiet, "--out", tmp_path / "real", **env)
    sums = [json.loads(line) for line in (tmp_path / "sent0").read_text().splitlines()]
    return [{k: b[k] - a[k] for k in b} for a, b in zip(sums, sums[1:])]


TOY = ["--teacher", "toy-cond", "--batch", 16]
DMD2 = ["--nfe", 1, "--ratio", 2, "--ema", 100]
MNIST = [*DMD2, "--teacher", "mnist", "--batch", 4]
CASES = [
    pytest.param("dmd2", [*TOY, *DMD2], id="toy"),
    pytest.param("dmd2", [*TOY, *DMD2, "--accumulate", 2], id="toy-accumulate"),
    pytest.param("dmd2", [*TOY, *DMD2, "--dtype", "bf16"], id="toy-bf16"),
    pytest.param("dmd2", [*MNIST, "--gan"], marks=slow, id="mnist"),
    pytest.param("dmd2", [*MNIST, "--gan", "--dtype", "bf16"], marks=slow, id="mnist-bf16"),
    pytest.param("dmd2", [*MNIST, "--grad-checkpoint"], marks=slow, id="mnist-checkpoint"),
    pytest.param("sana_sprint", [*TOY, "--H", 1], id="sana_sprint"),
]


@pytest.mark.parametrize("script, flags", CASES)
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "shard"])
def test_what_is_sent(script, flags, shard, dry, scripts, tmp_path):
    compare(2, script, [*flags, *shard], dry, scripts, tmp_path)


@slow
def test_what_is_sent_between_two_copies(dry, scripts, tmp_path):
    flags = [*TOY, *DMD2, "--shard", "--shard-size", 2]
    compare(4, "dmd2", flags, dry, scripts, tmp_path)


def compare(n, script, flags, dry, scripts, tmp_path):
    """A dry run for n processes and what n processes send, in iterations that both have."""
    flags = ["--dtype", "fp32", *flags, "--iters", 4, "--warmup", 0]
    found = {t["it"]: t["sent"] for t in dry(script, *flags, "--processes", n)["turns"]}
    real_turns = dict(enumerate(really_sent(scripts, tmp_path, n, script, *flags), 1))
    assert len(real_turns.keys() & found.keys()) >= 2
    for it in real_turns.keys() & found.keys():
        real, sent = real_turns[it], found[it]
        assert sent.get(ALL_REDUCED, 0) == pytest.approx(real["reduced"], rel=1e-3), it
        gathered = sent.get(GATHERED, 0) + sent.get(AGAIN, 0)
        assert gathered == pytest.approx(real["gathered"], rel=0.01), it
        assert sent.get(SCATTERED, 0) == pytest.approx(real["scattered"], rel=0.01), it
        assert any(real.values())


@slow
def test_checkpointing_gathers_nothing_more(dry):
    """Embedders inside blocks, whose activations are computed again, are gathered once for that and
    for their own backward."""
    flags = [*MNIST, "--shard", "--processes", 2, "--iters", 2, "--warmup", 0]
    plain, checkpointed = (dry("dmd2", *flags, *more) for more in ([], ["--grad-checkpoint"]))
    assert [t["sent"] for t in checkpointed["turns"]] == [t["sent"] for t in plain["turns"]]


# ---- memory --------------------------------------------------------------------------------------


def test_ddp_keeps_the_memory_of_gradients(dry):
    """They stay between two iterations, also of the network that was not stepped."""
    one, two = (dry("dmd2", *TOY, *DMD2, "--processes", n) for n in (1, 2))
    parameters = list(load_teacher("toy-cond").copy().parameters())
    gradients = 2 * sum(4 * p.numel() for p in parameters)  # of student and critic
    more = two["at_rest"] - one["at_rest"]
    assert gradients <= more < 1.01 * gradients + 2 * 512 * len(parameters)
    for turn in two["turns"]:
        for name in ("student", "critic"):
            assert turn["parts"][f"gradients of {name}"] >= gradients / 2


def test_memory_of_ddp_goes_with_it():
    with GhostDevice() as gpu:
        net = torch.nn.Linear(64, 64, device="ghost")
        traffic = Traffic(2, gpu)
        before = gpu.memory.now
        ddp = GhostDDP(net, traffic)
        ddp(torch.empty(1, 64, device="ghost")).sum().backward()
        assert all(p.grad is ddp.buckets[id(p)] for p in net.parameters())
        assert gpu.memory.now == 2 * before
        assert traffic.sent == {ALL_REDUCED: 4 * 65 * 64}
        net.zero_grad()
        del ddp
        assert gpu.memory.now == before
        net(torch.empty(1, 64, device="ghost")).sum().backward()
        assert traffic.sent == {ALL_REDUCED: 4 * 65 * 64}


def test_parts_of_sharded_networks(dry):
    """Weights, gradients, moments and average are spread over four processes."""
    flags = [*TOY, *DMD2, "--processes", 4]
    whole, sharded = (dry("dmd2", *flags, *more) for more in ([], ["--shard"]))
    tensors = len(list(load_teacher("toy-cond").copy().parameters()))
    for name, n in whole["parts"].items():
        if name.startswith(("weights", "moments", "average")):
            padding = 2 * tensors * 1024  # a row of each, and blocks of 512 bytes
            assert n / 4 - padding < sharded["parts"][name] < n / 4 + padding, name
            assert sharded["parts"][name] < 0.75 * n, name
    assert sharded["parts"][GATHERED] > 0
    assert sum(sharded["parts"].values()) == sharded["peak"]
    assert sharded["at_rest"] < 0.5 * whole["at_rest"]


def test_the_report_of_processes(dry, capsys):
    dry("dmd2", *TOY, *DMD2, "--processes", 2, "--shard")
    text = capsys.readouterr().out
    for kind in (GATHERED, AGAIN, SCATTERED):
        assert re.search(rf"sent by a process +[\d.]+ MB: {kind}\n", text)
    assert re.search(r"sent per iteration +[\d.]+ MB by each of 2 processes", text)
