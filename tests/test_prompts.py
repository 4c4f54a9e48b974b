"""common/teachers/prompts.py: embeddings of many prompts, on disk, by several processes.

python tests/test_prompts.py 1000 100000       # memory and time of encoding with a stub
"""

import os
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from helpers import pipelines
from helpers.runs import one_line, processes, run_processes
from helpers.teachers import copy_of

from common.errors import UserError
from common.files import read_json, write_json
from common.teachers import prompts as module
from common.teachers.flow import SD3, Flux, Sana
from common.teachers.prompts import BATCH, TextEncoders, embed_prompts
from common.teachers.unet import SD15
from common.teachers.wan import Wan

WIDTH = 6


def pipelines_by_name(name):
    return dict(sd15=SD15, sana=Sana, flux=Flux, wan=Wan)[name]


class Stub:
    """A pipeline that embeds a prompt as its number. Lengths differ from batch to batch."""

    part = "transformer"
    text_needs_network = False
    takes_image = False
    most_tokens = {}
    calls = []  # numbers of prompts of each call
    tokens = {}  # limit of each tokenizer

    @classmethod
    def text_pipeline(cls, folder, dtype):
        def tokenizer(limit):
            one_a_letter = lambda texts: SimpleNamespace(input_ids=[list(t) for t in texts])
            one_a_letter.model_max_length = limit
            return one_a_letter

        pipe = SimpleNamespace(**{name: tokenizer(limit) for name, limit in cls.tokens.items()})
        pipe.to = lambda device: pipe
        return pipe

    @classmethod
    def embed(cls, pipe, prompts):
        prompts = prompts or ["0"]
        cls.calls.append(len(prompts))
        numbers = torch.tensor([float(prompt.split()[0]) for prompt in prompts])
        length = 1 + int(numbers[0]) // BATCH % 3
        return dict(
            text=numbers[:, None, None].expand(-1, length, WIDTH) + 1,
            pooled=numbers[:, None] + 0.5,
        )

    @classmethod
    def embed_negative(cls, pipe, text):
        return cls.embed(pipe, [text])


def numbered(n):
    return [f"{i} x" for i in range(n)]


def padded(number):
    """What `rows` returns for a number: three tokens, the last ones zero."""
    length = 1 + number // BATCH % 3
    tokens = torch.zeros(3, WIDTH)
    tokens[:length] = number + 1
    return tokens


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(prompts) -> embeddings, through a cache with 32 rows in a part."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "model_index.json").write_text("{}")
    monkeypatch.setattr(Stub, "calls", [])
    monkeypatch.setattr(Stub, "tokens", {})
    monkeypatch.setattr(module, "SHARD", 32)
    monkeypatch.setattr("common.teachers.cache.VISIBLE_AFTER", 0)

    def embed(prompts, say=lambda text: None, cache="cache", negative=None):
        Stub.calls.clear()
        options = ("cpu", torch.float32, tmp_path / cache, say)
        return embed_prompts(Stub, tmp_path / "t", prompts, *options, negative=negative)

    embed.cache = tmp_path / "cache"
    return embed


def part_files(stub):
    return sorted(stub.cache.glob("*/0*.safetensors"))


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_are_those_of_the_prompts(stub):
    table = stub(numbered(100))
    assert len(table.parts) == 4
    index = torch.tensor([99, 0, 31, 32, 50, 0])
    rows = table.rows(index, "cpu")
    assert torch.equal(rows["text"], torch.stack([padded(i) for i in index.tolist()]))
    assert rows["pooled"].flatten().tolist() == [99.5, 0.5, 31.5, 32.5, 50.5, 0.5]
    assert torch.equal(table.nulls(2, "cpu")["text"], torch.stack([padded(0)] * 2))


def test_two_tables_with_parts_of_other_sizes(stub):
    table, other = stub(numbered(70)), stub(numbered(40))
    first = table.append(other)
    assert first == 96  # the next multiple of SHARD
    rows = table.rows(torch.tensor([69, first, first + 39]), "cpu")
    assert rows["pooled"].flatten().tolist() == [69.5, 0.5, 39.5]


def test_only_the_rows_that_are_used_are_read(stub):
    """The tensors are views of files: what is written there shows."""
    table = stub(numbered(40))
    pooled = table.parts[1]["pooled"]
    path = part_files(stub)[1]
    content = bytearray(path.read_bytes())
    at = content.index(torch.tensor(39.5).numpy().tobytes())
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(torch.tensor(7.0).numpy().tobytes())
    assert pooled[7].item() == 7.0
    assert table.rows(torch.tensor([39]), "cpu")["pooled"].item() == 7.0


def test_large_rows_make_small_parts(stub, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_PART", 16 * 4 * (WIDTH + 1))
    table = stub(numbered(40))
    assert [len(part["pooled"]) for part in table.parts] == [16, 16, 8]
    index = torch.tensor([15, 16, 31, 39])
    assert table.rows(index, "cpu")["pooled"].flatten().tolist() == [15.5, 16.5, 31.5, 39.5]
    monkeypatch.setattr(module, "LARGEST_PART", 1)  # a batch is the least
    assert len(stub(numbered(41)).parts) == 3


# ---- the cache -----------------------------------------------------------------------------------


def test_a_second_start_encodes_nothing(stub):
    first = stub(numbered(50))
    lines = []
    again = stub(numbered(50), lines.append)
    assert Stub.calls == []
    assert lines[1].startswith("prompts: 50 embeddings read from ")
    for a, b in zip(first.parts, again.parts, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_negative_prompts_share_the_cache(stub):
    """Each is encoded once, and the prompts are not encoded again for it."""
    null = stub(numbered(40)).null["pooled"]
    for negative, number in (("7", 7.5), ("40 x", 40.5)):
        table = stub(numbered(40), negative=negative)
        assert Stub.calls == [1]
        assert table.nulls(2, "cpu")["pooled"].flatten().tolist() == [number] * 2
        assert table.rows(torch.tensor([39]), "cpu")["pooled"].item() == 39.5
        stub(numbered(40), negative=negative)
        assert Stub.calls == []
    assert torch.equal(stub(numbered(40)).null["pooled"], null)


def test_an_interrupted_encoding_keeps_its_parts(stub, monkeypatch):
    embed, calls = Stub.embed, []

    def die(pipe, prompts):
        calls.append(prompts)
        if len(calls) == 2 + 5:  # of the plan; in the third part
            raise KeyboardInterrupt
        return embed(pipe, prompts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stub, "embed", die)
        stub(numbered(100))
    assert [path.name[:5] for path in part_files(stub)] == ["00000", "00001"]
    lines = []
    table = stub(numbered(100), lines.append)
    assert "encoding 36 into" in lines[1]
    assert Stub.calls == [16, 16, 4]
    assert torch.equal(table.rows(torch.arange(100), "cpu")["text"][67], padded(67))


def test_a_lost_part_is_encoded_again(stub):
    whole = stub(numbered(100))
    expected = whole.rows(torch.arange(100), "cpu")
    part_files(stub)[1].unlink()
    again = stub(numbered(100)).rows(torch.arange(100), "cpu")
    assert Stub.calls == [16, 16]
    assert torch.equal(again["text"], expected["text"])


def test_what_is_another_cache(stub, monkeypatch, tmp_path):
    """Other prompts, their order, another text encoder, another version of library or format."""
    stub(["1 a", "2 b"])

    def write(name, text):
        path = tmp_path / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        stub(["1 a", "2 b"])

    def other_version(patch, library):
        version = metadata.version  # of the other library: as it is
        changed = lambda name: "9.9" if name == library else version(name)
        patch.setattr("common.teachers.cache.metadata.version", changed)
        stub(["1 a", "2 b"])

    def with_network(patch):
        patch.setattr(Stub, "text_needs_network", True)
        write("transformer/config.json", "{}")

    changes = [
        lambda patch: stub(["2 b", "1 a"]),
        lambda patch: stub(["1 a\n", "2 b"]),
        lambda patch: stub(["1 a", "2 b", "3"]),
        lambda patch: (patch.setattr(module, "FORMAT", 3), stub(["1 a", "2 b"])),
        lambda patch: other_version(patch, "diffusers"),
        lambda patch: other_version(patch, "transformers"),
        lambda patch: write("model_index.json", '{"a": 1}'),
        lambda patch: write("tokenizer_2/chat_template.jinja", "{{ prompt }}"),
        lambda patch: write("text_encoder/config.json", "{}"),
        lambda patch: write("tokenizer/additional_chat_templates/x.jinja", "{{ prompt }}"),
        with_network,
    ]
    for k, change in enumerate(changes, 2):
        with monkeypatch.context() as patch:
            change(patch)
        assert len(list(stub.cache.iterdir())) == k
    write("vae/config.json", "{}")  # no embedding depends on it
    write("transformer/config.json", "{ }")  # nor this one's on it
    assert len(list(stub.cache.iterdir())) == k


@pytest.mark.parametrize("name, cls", [("sd3", SD3), ("sana", Sana)])
def test_embeddings_that_depend_on_the_network(name, cls, folders, tmp_path):
    """Without T5, SD3's pipeline takes zeros of a width that the network's config.json has. The
    other pipelines read nothing of the network."""
    folder = copy_of(folders, name, tmp_path)
    cache = lambda: module.cache_of(cls, folder, ["1 a"], torch.float32, tmp_path)
    before = cache()
    config = read_json(folder / "transformer" / "config.json")
    write_json(folder / "transformer" / "config.json", config | dict(joint_attention_dim=1))
    assert (cache() != before) == (name == "sd3")
    width = cls.embed(cls.text_pipeline(folder, torch.float32), ["dog"])["text"].shape[-1]
    assert (width == 1) == (name == "sd3")


def test_a_cache_that_cannot_be_written_but_read(stub, monkeypatch):
    stub(numbered(40))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    stub(numbered(40))
    with pytest.raises(UserError, match="--cache-prompts .*Permission denied"):
        stub(numbered(41))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda home: (home / "plan.json").write_text("{"),
        lambda home: (home / "plan.json").write_text('{"prompts": 40}'),
        lambda home: (home / "plan.json").write_text('{"prompts": 4, "rows": 16, "row_bytes": 1}'),
        lambda home: (home / "null.safetensors").unlink(),
        lambda home: (home / "00001.safetensors").write_bytes(b"x"),
        lambda home: shutil.copy(home / "00001.safetensors", home / "00000.safetensors"),
        lambda home: shutil.copy(home / "null.safetensors", home / "00001.safetensors"),
    ],
)
def test_a_damaged_cache_is_refused(spoil, stub):
    stub(numbered(40))
    (home,) = stub.cache.iterdir()
    spoil(home)
    with pytest.raises(UserError, match="--cache-prompts .*(delete|JSON)"):
        stub(numbered(40))


def test_a_disk_that_is_too_small(stub, monkeypatch):
    """Said before anything is encoded; what is there already needs no space."""
    row = 4 * (WIDTH + 1)
    usage = SimpleNamespace(free=100 * row - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="embeddings of 100 prompts take .* free; choose a folder"):
        stub(numbered(100))
    assert part_files(stub) == []
    usage.free = 100 * row
    lines = []
    stub(numbered(100), lines.append)
    assert "encoding 100 into" in lines[1]
    assert "MB of 0.0 MB free" in lines[1]
    usage.free = 0
    stub(numbered(100))


# ---- what is said of the prompts -----------------------------------------------------------------


def test_duplicates_lengths_and_cut_prompts(stub, monkeypatch):
    monkeypatch.setattr(Stub, "tokens", dict(tokenizer=7, tokenizer_2=7, tokenizer_3=10**30))
    monkeypatch.setattr(Stub, "most_tokens", dict(tokenizer_3=9))
    given = ["1", "22222", "1", "3 4 5 67", "1234567890"]
    expected = "prompts: 5, 4 different, 1 to 10 characters, 2 cut at 7 tokens, 1 cut at 9 tokens"
    for _ in range(2):  # encoded, then read
        lines = []
        stub(given, lines.append)
        assert lines[0] == expected


@pytest.mark.parametrize("name, limit", [("sd15", 16), ("sana", 300), ("flux", 512), ("wan", 512)])
def test_the_limit_of_a_pipeline(name, limit, folders):
    """At its limit a prompt is whole, and a letter more is cut."""
    cls = pipelines_by_name(name)
    pipe = cls.text_pipeline(folders(name), torch.float32)
    encoders = TextEncoders(cls, folders(name), "cpu", torch.float32)
    encoders.pipe = pipe
    longest = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
    size = lambda text: len(longest([text]).input_ids[0])
    more = " a" if name == "sd15" else "a"  # one token: of words, of letters
    text = "a"
    while size(text) < limit:
        text += more
    assert size(text) == limit
    assert limit not in encoders.count_cut([text])
    assert encoders.count_cut([text, text + more, "a"])[limit] == 1
    with torch.no_grad():
        a, b = (cls.embed(pipe, [longer])["text"] for longer in (text + more, text + 2 * more))
    assert torch.equal(a, b)  # the pipeline does not read further


# ---- several processes ---------------------------------------------------------------------------

# One batch in a part, batches that take a second, and a process group that waits a few seconds.
SLOW_ENCODER = """
import datetime, os, time
import torch.distributed as dist
import common.teachers.cache as cache
import common.teachers.prompts as prompts
from common.teachers.unet import SD15
init = dist.init_process_group
def init_with_limit(*args, timeout=None, **kwargs):
    init(*args, timeout=datetime.timedelta(seconds={limit}), **kwargs)
dist.init_process_group = init_with_limit
prompts.SHARD = prompts.BATCH
cache.VISIBLE_AFTER = 0
embed = SD15.embed.__func__
def slow(cls, pipe, texts):
    time.sleep({seconds})
    print("embedded", len(texts or [""]), flush=True)
    return embed(cls, pipe, texts)
SD15.embed = classmethod(slow)
"""
OTHER_FOLDER = """
import os
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
"""
NO_SPACE = """
import os
import common.files
def full(descriptor):
    raise OSError(28, "No space left on device")
if os.environ["RANK"] == "1":
    os.fsync = full
"""


def flags_of_two(scripts, folders, tmp_path, n):
    scripts.load(*pipelines.MODULES)
    (tmp_path / "p.txt").write_text("\n".join(numbered(n)))
    flags = ["dmd2.py", "--teacher", folders("sd15"), "--prompts", tmp_path / "p.txt"]
    flags += ["--batch", 2, "--iters", 1, "--warmup", 0, "--nfe", 1, "--eval-n", 0]
    flags += ["--sample-every", 0]
    return [*flags, "--cache-prompts", tmp_path / "cache", "--out", tmp_path / "out"]


@pytest.mark.slow
def test_processes_share_the_encoding_and_do_not_wait_long(scripts, folders, tmp_path):
    """20 seconds of encoding, and a process group that gives up after 8."""
    flags = flags_of_two(scripts, folders, tmp_path, 320)
    before = SLOW_ENCODER.format(limit=8, seconds=1)
    first, second = run_processes(scripts, 2, *flags, BEFORE=before)
    assert first.out.count("embedded 16") == 1 + 10  # one for the plan
    assert second.out.count("embedded 16") == 10
    assert len(list((tmp_path / "cache").glob("*/0*.safetensors"))) == 20
    flags += ["--overwrite"]
    again = run_processes(scripts, 2, *flags, BEFORE=before)
    assert not any("embedded" in p.out for p in again)


@pytest.mark.parametrize(
    "before, says",
    [
        (OTHER_FOLDER, "rank 1: --cache-prompts cache/.*: expected a folder on a disk that all"),
        (NO_SPACE, "rank 1: --cache-prompts .*No space left on device; delete it"),
    ],
    ids=["two disks", "a full disk"],
)
def test_what_one_process_cannot_do_ends_all(before, says, scripts, folders, tmp_path):
    flags = flags_of_two(scripts, folders, tmp_path, 40)
    if before == OTHER_FOLDER:
        flags[flags.index("--cache-prompts") + 1] = "cache"
        before = f"import os; os.chdir({str(tmp_path)!r})\n" + before
    before += SLOW_ENCODER.format(limit=60, seconds=0)
    first, second = processes(scripts, 2, *flags, BEFORE=before)
    one_line(first, f"dmd2.py: {says}", "dmd2")
    assert second.wait() == 2
    assert second.err == ""


def test_each_machine_has_its_own_copy_of_the_teacher(scripts, folders, tmp_path):
    """Files with other dates. The cache is where process 0 says."""
    flags = flags_of_two(scripts, folders, tmp_path, 20)
    for rank in range(2):
        shutil.copytree(folders("sd15"), tmp_path / str(rank) / "t")
        for path in (tmp_path / str(rank) / "t").rglob("*.json"):
            os.utime(path, (rank + 1, rank + 1))
    flags[2] = "t"
    before = f"import os; os.chdir({str(tmp_path)!r})\n" + OTHER_FOLDER
    run_processes(scripts, 2, *flags, BEFORE=before)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_machines_with_different_prompts(scripts, folders, tmp_path):
    flags = flags_of_two(scripts, folders, tmp_path, 20)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "p.txt").write_text("\n".join(numbered(20 + rank)))
    flags[flags.index("--prompts") + 1] = "p.txt"
    before = f"import os; os.chdir({str(tmp_path)!r})\n" + OTHER_FOLDER
    first, second = processes(scripts, 2, *flags, BEFORE=before)
    one_line(first, "--prompts or captions .*process 1 has others than process 0", "dmd2")
    assert second.wait() == 2
    assert second.err == ""


# No capability, as in capset(2): root may write anywhere, so the run gives up that right.
NOBODY = """
import ctypes, struct
assert ctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24)) == 0
"""


@pytest.mark.skipif(os.getuid() != 0, reason="gives up rights of root")
@pytest.mark.parametrize("writable", [True, False])
def test_a_teacher_that_cannot_be_written_to(writable, scripts, folders, tmp_path):
    """Nor may the cache be: one line that names the flag."""
    scripts.load(*pipelines.MODULES)
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    shutil.copytree(folders("sd15"), home / "t")
    (home / "cache").mkdir()
    (home / "out").mkdir()
    for path in (home / "t", *(home / "t").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    flags = ["dmd2.py", "--teacher", home / "t", "--batch", 2, "--iters", 1, "--warmup", 0]
    flags += ["--nfe", 1, "--eval-n", 0, "--sample-every", 0, "--out", home / "out" / "run"]
    flags += ["--cache-prompts", home / "cache"]
    if writable:
        scripts.run(*flags, BEFORE=NOBODY)
    else:
        (home / "cache").chmod(0o555)
        says = "--cache-prompts .*expected to read and write embeddings there.*Permission denied"
        one_line(scripts.start(*flags, BEFORE=NOBODY), says, "dmd2")
    shutil.rmtree(home)


# ---- memory --------------------------------------------------------------------------------------


class SDXLSized(Stub):
    """Rows as large as SDXL's at 1/16 of its width, 20 KB."""

    @classmethod
    def embed(cls, pipe, prompts):
        n = len(prompts or [""])
        return dict(
            text=torch.ones(n, 77, 128, dtype=torch.bfloat16),
            pooled=torch.ones(n, 80, dtype=torch.bfloat16),
        )


def anonymous_memory():
    """Bytes that this process holds, without memory-mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def measure(n, folder):
    """Encodes n prompts -> (peak of memory above the start in bytes, seconds, bytes on disk)."""
    folder = Path(folder)
    (folder / "model_index.json").write_text("{}")
    prompts = [
        f"{i:06d} a prompt of usual length, which says what is in the image" for i in range(n)
    ]
    start, base, peak = time.monotonic(), anonymous_memory(), 0
    embed = SDXLSized.embed.__func__

    def watched(cls, pipe, prompts):
        nonlocal peak
        peak = max(peak, anonymous_memory())
        return embed(cls, pipe, prompts)

    class Watched(SDXLSized):
        pass

    Watched.embed = classmethod(watched)
    table = embed_prompts(
        Watched, folder, prompts, "cpu", torch.bfloat16, folder / "cache", lambda text: None
    )
    for _ in range(10):
        table.rows(torch.randint(n, (64,)), "cpu")
    peak = max(peak, anonymous_memory())
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return peak - base, time.monotonic() - start, size


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path, monkeypatch):
    """Part of 2.5 MB, 128 rows: 5,000 prompts are 100 MB on disk."""
    monkeypatch.setattr(module, "LARGEST_PART", 128 * (77 * 128 + 80) * 2)
    (tmp_path / "warm").mkdir()
    (tmp_path / "many").mkdir()
    measure(500, tmp_path / "warm")
    peak, _, size = measure(5000, tmp_path / "many")
    assert size > 95e6
    assert peak < 20e6


if __name__ == "__main__":
    for n in map(int, sys.argv[1:]):
        if os.fork() == 0:  # each has its own peak
            with tempfile.TemporaryDirectory() as folder:
                peak, seconds, size = measure(n, folder)
            print(
                f"{n} prompts: {peak / 2**20:.0f} MB of memory, {seconds:.0f} s, "
                f"{size / 2**20:.0f} MB on disk",
                flush=True,
            )
            os._exit(0)
        os.wait()
