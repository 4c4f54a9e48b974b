"""What a script shows and leaves: sample grids, metrics, the exported student."""

import datetime
import json
import math
import platform
import shlex
import sys
from pathlib import Path

import torch

from common.files import atomic, write_json
from common.metrics import METRICS, evaluate, summary
from common.sampling import TEACHER_NFE, generate, teacher_sample


def save_grid(path, rows, scale=None):
    """PNG of captioned rows. rows: list of (caption, uint8 [n, C, H, W], C 1 or 3). Small images are enlarged by whole pixels."""
    from PIL import Image, ImageDraw

    side = rows[0][1].shape[-1]
    scale = scale or max(1, 64 // side)
    pad, text = 2, 14
    n, (h, w) = max(len(r[1]) for r in rows), (rows[0][1].shape[-2] * scale, side * scale)
    sheet = Image.new("RGB", (n * (w + pad) + pad, len(rows) * (h + text + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (caption, images) in enumerate(rows):
        top = pad + r * (h + text + pad)
        pen.text((pad, top), caption, fill="black")
        for i, img in enumerate(images):
            a = img.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            sheet.paste(
                Image.fromarray(a).resize((w, h), Image.NEAREST), (pad + i * (w + pad), top + text)
            )
    with atomic(path) as f:
        sheet.save(f, "PNG")


def pictures(run, teacher, student, sample, sampler, it, n=20):
    """samples/<it>.png: teacher row beside student rows, same noise, same labels. Rank 0 draws."""
    if not (run.is_main or run.args.shard):  # a sharded network answers when all processes ask
        return
    nfe = run.args.nfe
    n = (
        4000
        if teacher.adapter == "toy"
        else n
        if teacher.shape[-1] <= 64 and teacher.prompts is None
        else 8
    )
    one = lambda fn, model: torch.cat(
        [x for _, _, x in generate(fn, model, n, run.args.seed, 4000 if n > 8 else 2)]
    )
    if not hasattr(run, "teacher_row"):
        run.teacher_row = teacher.to_pictures(
            one(lambda m, z, c, noise: teacher_sample(m, z, c, TEACHER_NFE, run.args.cfg), teacher)
        )
    now = student.to_pictures(
        one(lambda m, z, c, noise: sample(m, z, c, nfe, noise, **sampler), student)
    )
    rows = [
        (f"teacher, {TEACHER_NFE} steps, w = {run.args.cfg}", run.teacher_row),
        (f"{run.method}, {nfe} step{'s' * (nfe > 1)}, iteration {it}", now),
    ]
    if run.is_main:
        save_grid(run.out / "samples" / f"{it:08d}.png", rows)


def evaluate_run(run, teacher, student, sample, sampler, it, n):
    """Metrics of the student into metrics.json, and one line of eval.jsonl. Beside it, for scale, what was measured of its teacher (teacher.json)."""
    args = run.args
    if n and teacher.adapter != "toy" and not teacher.evaluation:
        run.print(
            f"{run.method}: this teacher brings no metric; samples/ has pictures, eval.py measures folders of images"
        )
        n = 0
    if not n:
        return
    model_sampler = lambda m, z, c, noise: sample(m, z, c, args.nfe, noise, **sampler)
    result = evaluate(model_sampler, student, teacher, n, args.seed, rank=run.rank, world=run.world)
    result = dict(
        method=run.method,
        teacher=args.teacher,
        it=it,
        nfe=args.nfe,
        cfg=args.cfg,
        train_seconds=round(run.seconds),
        **result,
    )
    if run.is_main:
        before = (
            [line for line in path.read_text().splitlines() if earlier(line, it)]
            if (path := run.out / "eval.jsonl").exists()
            else []
        )
        with atomic(path) as f:
            f.write("\n".join([*before, dumps(result), ""]).encode())
        write_json(
            run.out / "metrics.json", json.loads(dumps(result))
        )  # strict JSON: a diverged run has nan
        for row in teacher.evaluation.get("measured", []):
            run.print(summary(dict(row, method=f"teacher w={row['cfg']:g}")))
        run.print(summary(result))
        for part in result.get("experts", []):
            run.print(
                summary(
                    dict(result, **{k: None for k in METRICS})
                    | part
                    | dict(
                        method=f"  expert {part['expert']}",
                        protocol=f"labels {part['labels']}, n={part['n']}",
                    )
                )
            )


def earlier(line, it):
    """Is this line of eval.jsonl of an iteration before `it`? Others are of iterations that a resume has undone, or half a line."""
    try:
        return json.loads(line)["it"] < it
    except (ValueError, KeyError, TypeError):
        return False


def export(run, teacher, student, sampler):
    """student/: weights in diffusers format and distill.json, all that inference needs."""
    student = student.unsharded()
    if run.is_main:
        (run.out / "student" / "distill.json").unlink(
            missing_ok=True
        )  # written last: no half-written student looks finished
        flags = {k: v for k, v in vars(run.args).items() if k not in ("resume", "overwrite")}
        student.save(
            run.out / "student",
            dict(
                method=run.method,
                teacher=run.args.teacher,
                nfe=run.args.nfe,
                cfg=run.args.cfg,
                sampler=sampler,
                flags=flags,
                seed=run.args.seed,
                revision=run.revision,
                torch=torch.__version__,
                training=run.record
                | dict(
                    seconds=round(run.seconds),
                    iterations=run.args.iters,
                    batch=run.args.batch,
                    command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                    world=run.world,
                    dtype=str(run.dtype)[6:],
                    threads=torch.get_num_threads(),
                    hardware=hardware(run.device),
                    date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                ),
            ),
        )
        run.print(f"student: {run.out / 'student'}")


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in cpuinfo.splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )


def dumps(value):
    """One line of strict JSON: NaN and infinities become null."""
    clean = lambda v: (
        {k: clean(w) for k, w in v.items()}
        if isinstance(v, dict)
        else [clean(w) for w in v]
        if isinstance(v, list)
        else None
        if isinstance(v, float) and not math.isfinite(v)
        else v
    )
    return json.dumps(clean(value), allow_nan=False)
