"""Files to be spoilt: JSON to edit, pickles that run code, parts of a checkpoint."""

import json
import pickle

import numpy as np
import torch

from training.ema import EMA


def edit(path, **changes):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Bomb:
    """Unpickling this creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def write_npz(value, path):
    array = np.array([value], dtype=object)
    arrays = {name: array for name in ("mu", "sigma", "images", "labels")}
    with open(path, "wb") as f:  # np.savez would add .npz to the name
        np.savez(f, **arrays)


def write_npy(value, path):
    with open(path, "wb") as f:
        np.save(f, np.array([value], dtype=object))


def write_old_torch(value, path):
    torch.save(dict(header=value), path, _use_new_zipfile_serialization=False)


# Formats that contain a pickle: write(value, path).
PICKLES = dict(
    pickle=lambda value, path: path.write_bytes(pickle.dumps(value)),
    torch=lambda value, path: torch.save(dict(header=value, ema=value, x=value), path),
    old_torch=write_old_torch,
    npy=write_npy,
    npz=write_npz,
)


def training_parts():
    """{name: part} of a checkpoint, after one step: a student, its optimiser and average."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    net.copy = lambda: torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    opt.zero_grad()
    return dict(student=net, opt_g=opt, ema=EMA(net, 100))
