"""The small classifier that a trained teacher's samples are measured with."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import fid
from common.features import SmallCNN
from common.rng import derive_seed


def random_affine(images):
    """Augmentation. uint8 images [n, C, H, W] -> float [n, C, H, W], each under its own random map:
    rotation +-0.25 rad, scale +-15 %, shear +-0.15, shift +-1/16 of the side.
    """

    def uniform(limit):
        return (torch.rand(len(images)) * 2 - 1) * limit

    angle = uniform(0.25)
    scale = 1 + uniform(0.15)
    top = torch.stack([scale * angle.cos(), -angle.sin() + uniform(0.15), uniform(0.125)], 1)
    bottom = torch.stack([angle.sin(), scale * angle.cos(), uniform(0.125)], 1)
    matrices = torch.stack([top, bottom], 1)  # [n, 2, 3]
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False, padding_mode="border")


def train_classifier(data, epochs, seed):
    """-> SmallCNN trained on 90 % of the images, its accuracy on the other 10 %. data: `Images`."""
    torch.manual_seed(derive_seed(seed, 7))
    order = torch.randperm(len(data))
    held_out, train = order.split([len(data) // 10, len(data) - len(data) // 10])
    net = new_classifier(data)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = math.ceil(len(train) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * steps)
    bar = tqdm(range(epochs), desc="classifier", unit="epoch")
    for _ in bar:
        net.train()
        for index in train[torch.randperm(len(train))].chunk(steps):
            _, logits = net(random_affine(data.images[index]))
            loss = F.cross_entropy(logits, data.labels[index], label_smoothing=0.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            _, logits = net(data.images[held_out])
        accuracy = (logits.argmax(1) == data.labels[held_out]).float().mean().item()
        bar.set_postfix(held_out=f"{accuracy:.4f}")
    return net, accuracy


def new_classifier(data):
    _, channels, _, size = data.images.shape
    return SmallCNN(channels, size, len(data.names))


@torch.no_grad()
def feature_stats(net, data):
    """Mean and covariance of the classifier's features over the whole set: `fid.Stats`."""
    stats = fid.Stats(net.feat.out_features)
    for images in data.images.split(500):
        features, _ = net(images)
        stats.update(features)
    return stats
