"""training/flags.py: presets, --help, and flags that a script does not have."""

import argparse

import pytest
from helpers.trace import run_main

import boot
import decoupled_dmd
import dmd2
import flowmap
import sana_sprint
import sid
from common.errors import UserError, did_you_mean
from training.flags import Parser, parse_size

PRESETS = {
    "default": dict(cfg=1.0, lr=1.0, lr_fake=1.0, batch=4, iters=4, ema=0),
    "toy": dict(cfg=2.0, lr=2.0, lr_fake=2.0, batch=8, iters=8, ema=0, source="ours"),
}


def parse(*flags, **parts):
    parser = Parser("doc", few_steps=False, **parts)
    return parser.parse(PRESETS, list(flags))


def help_of(script, capsys, *flags):
    with pytest.raises(SystemExit) as end:
        script.parse_args([*flags, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_teacher_chooses_the_preset():
    args = parse("--teacher", "toy")
    assert (args.lr, args.preset, args.preset_source) == (2.0, "toy", "ours")
    args = parse("--teacher", "mnist")
    assert (args.lr, args.preset, args.preset_source) == (1.0, "default", "")
    assert "has none for mnist" in args.preset_from


def test_flags_on_the_command_line_are_known():
    assert parse("--teacher", "toy", "--cfg", "2").cfg_given
    assert not parse("--teacher", "toy").cfg_given


def test_flags_of_a_preset_can_be_overridden():
    args = parse("--teacher", "toy", "--lr", "0.5")
    assert args.lr == 0.5
    assert args.cfg == 2.0


def test_smoke():
    args = parse("--teacher", "toy", "--smoke")
    assert (args.iters, args.log_every, args.save_every, args.eval_n) == (3, 1, 3, 64)


@pytest.mark.parametrize("flag", ["--lr-fake", "--nfe", "--lora", "--shard"])
def test_flags_that_a_script_cannot_use_do_not_exist(flag, capsys):
    with pytest.raises(SystemExit) as end:
        parse(flag, "1", lora=False)
    assert end.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_what_common_code_reads_is_always_there():
    args = parse(lora=False)
    assert args.nfe == 1
    assert (args.data, args.lora, args.lora_fake, args.shard) == (None, None, None, False)


def test_help_shows_the_presets_values(capsys):
    assert "learning rate of the student [0.001]" in help_of(dmd2, capsys)
    assert "learning rate of the student [0.0005]" in help_of(dmd2, capsys, "--teacher", "toy")


def test_help_has_one_default(capsys):
    """A preset's value stands in the place of the text in brackets."""
    assert "weight w of (5) [by form]\n" in help_of(sid, capsys, "--teacher", "sdxl")
    assert "weight w of (5) [1_over_sigma]\n" in help_of(sid, capsys)


def test_help_lists_only_what_the_script_accepts(capsys):
    text = help_of(boot, capsys)
    for flag in ("image folder", "--lr-fake", "--lora-fake", "--nfe"):
        assert flag not in text.split("model:")[1]


@pytest.mark.parametrize("text, size", [("512", [512, 512]), ("480x832", [480, 832])])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "-1", "1x2x3", "123456"])
def test_wrong_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="512 or HEIGHTxWIDTH"):
        parse_size(text)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lr nan", "--lr: expected a number of ordinary size"),
        ("--betas 0.9 nan", "--betas: expected a number of ordinary size"),
        ("--seed 10000000000000000000", "--seed: expected a number of ordinary size"),
        ("--iters 0", "--iters: expected at least 1, found 0"),
        ("--ema -1", "--ema: expected a number >= 0, found -1"),
        ("--lr inf", "--lr: expected a number >= 0, found inf"),
        ("--eval-n 3", "--eval-n 3: expected 0 or at least 8"),
        ("--cooldown 1.5", "--cooldown: expected a share from 0 to 1"),
        ("--clip 0", "--clip: expected a number > 0"),
        ("--betas 0.9 1", "--betas: expected two numbers from 0 to below 1"),
        ("--shard --compile", "--shard with --compile"),
        ("--shard --lora 4", "--shard with --lora"),
        ("--lora-alpha 4", "--lora-alpha and --lora-targets need --lora"),
        ("--negative-prompt x --cfg 1", "--negative-prompt: expected --cfg other than 1"),
        ("--lora -1", "--lora: expected a rank of at least 1"),
        ("--lora 4 --lora-alpha 0", "--lora-alpha: expected a number > 0"),
        ("--resume --overwrite", "--resume keeps the run in --out, --overwrite discards it"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags.split())


@pytest.mark.parametrize(
    "script, flags",
    [
        (dmd2, "--cfg 2"),
        (flowmap, "--cfg 1 --cfg-range 1 3"),
        (sana_sprint, "--cfg 1 --cfg-train 1 2"),
    ],
)
def test_a_negative_prompt_where_the_teacher_is_guided(script, flags):
    args = script.parse_args(["--teacher", "emoji", *flags.split(), "--negative-prompt", ""])
    assert args.negative_prompt == ""
    with pytest.raises(UserError, match="--negative-prompt: expected --cfg other than 1"):
        script.parse_args("--teacher toy --negative-prompt x --cfg 1".split())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out {tmp}/file", "--out .*file: expected a folder that can be written"),
        ("--gan --data {tmp}/file", "--data .*file: expected a folder of images, found a file"),
        ("--start {tmp}/nowhere", "nowhere: expected the folder of a run, found nothing"),
        ("--nfe 2 --step-indices 5,7", "--step-indices 5,7: expected 2 falling indices"),
    ],
)
@pytest.mark.parametrize("script", [dmd2, decoupled_dmd])
def test_mistakes_that_are_found_before_the_teacher_is_loaded(
    script, flags, message, monkeypatch, tmp_path
):
    """Loading a large one takes minutes."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "load_teacher", None)  # a call would fail
    flags = ["--out", tmp_path / "run", *flags.format(tmp=tmp_path).split()]
    with pytest.raises(UserError, match=message):
        run_main(monkeypatch, script, "--teacher", "mnist", *flags)


def test_lora_spec():
    args = parse("--lora", "4", "--lora-alpha", "8", "--seed", "1")
    assert args.lora == dict(rank=4, alpha=8.0, targets=None, seed=1, flag="--lora")


def test_near_names_are_suggested():
    assert did_you_mean("toyy", ["toy", "mnist"]) == ", did you mean toy?"
    assert did_you_mean("abc", ["toy", "mnist"]) == ""


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", 20),  # of the preset: 900 iterations
        ("--iters 21", 20),
        ("--iters 20", 2),
        ("--iters 5", 0),
        ("--iters 20 --warmup 19", 19),
    ],
)
def test_a_presets_warmup_fits_a_shorter_run(flags, expected):
    assert dmd2.parse_args(["--teacher", "mnist", *flags.split()]).warmup == expected
