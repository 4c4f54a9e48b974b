"""The small network whose features a trained teacher's samples are measured in.

A network that only classifies ignores what tells nothing about the class: noise and blur, and of
classes that differ in colour also the shape. For own images it therefore learns a second task: how
much an image was spoilt, see `spoil`. Both tasks share the features.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import fid
from common.distributed import bar_interval
from common.features import SmallCNN
from common.rng import derive_seed

SPOILT_WEIGHT = 4  # of the second loss; the first one cannot fall below its label smoothing


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


# ---- images that are spoilt by a known amount ----------------------------------------------------


def spoil(images):
    """Images [n, C, H, W] in 0..255 -> spoilt ones, rounded, and by how much: float [n, C + 2].

    Each of these has an even chance to be applied: an offset of +-40 grey levels in each channel, a
    Gaussian blur of 0.3 to 2.5 pixels, Gaussian noise of 2 to 80 grey levels. The amounts are
    scaled to about 1; that of the noise grows like its logarithm.
    """
    n, channels = images.shape[:2]
    shift = (torch.rand(n, channels) * 2 - 1) * 40 * (torch.rand(n, 1) < 0.5)
    blur = random_amount(n, 0.3, 2.5)
    noise = random_amount(n, 2, 80)

    x = images + shift.view(n, channels, 1, 1)
    x = torch.where(blur.view(n, 1, 1, 1) > 0, gaussian_blur(x, blur), x)
    x = x + noise.view(n, 1, 1, 1) * torch.randn_like(x)
    amounts = torch.cat([shift / 20, blur[:, None], torch.asinh(noise / 4)[:, None]], 1)
    return x.round().clip(0, 255), amounts


def random_amount(n, low, high):
    """[n]: 0 for half of them, else from low to high, uniform in the logarithm."""
    amount = low * (high / low) ** torch.rand(n)
    return torch.where(torch.rand(n) < 0.5, amount, 0)


def gaussian_blur(x, sigma, reach=4):
    """x [n, C, H, W], each image blurred by its own sigma [n] in pixels."""
    distance = torch.arange(-reach, reach + 1.0)
    weights = torch.exp(-(distance**2) / (2 * sigma[:, None].clamp(min=0.1) ** 2))
    weights = (weights / weights.sum(1, keepdim=True)).view(len(x), 1, 1, -1)
    # images as groups of channels: one convolution with a kernel for each image
    x = F.pad(x, [reach] * 4, mode="replicate").transpose(0, 1)
    x = F.conv2d(x, weights, groups=len(sigma))
    x = F.conv2d(x, weights.transpose(2, 3), groups=len(sigma))
    return x.transpose(0, 1)


# ---- training ------------------------------------------------------------------------------------


def train_classifier(data, epochs, seed, spoilt=False):
    """-> SmallCNN trained on 90 % of the images, its accuracy on the other 10 %. data: `Images`.

    spoilt: learns the second task as well, and each feature is scaled to a standard deviation of 1
    over the images.
    """
    torch.manual_seed(derive_seed(seed, 7))
    order = torch.randperm(len(data))
    held_out, train = order.split([len(data) // 10, len(data) - len(data) // 10])
    net = new_classifier(data)
    second_head = None
    if spoilt:
        second_head = nn.Linear(net.feat.out_features, data.images.shape[1] + 2)
    both = nn.ModuleList([net, second_head] if spoilt else [net])
    opt = torch.optim.AdamW(both.parameters(), weight_decay=0.05)
    steps = math.ceil(len(train) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * steps)
    bar = tqdm(range(epochs), desc="classifier", unit="epoch", mininterval=bar_interval())
    for _ in bar:
        net.train()
        for index in train[torch.randperm(len(train))].chunk(steps):
            images = random_affine(data.images[index])
            if spoilt:
                images, amounts = spoil(images)
            features, logits = net(images)
            loss = F.cross_entropy(logits, data.labels[index], label_smoothing=0.05)
            if spoilt:
                guess = second_head(F.relu(features))
                loss = loss + SPOILT_WEIGHT * F.smooth_l1_loss(guess, amounts)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            _, logits = net(data.images[held_out])
        accuracy = (logits.argmax(1) == data.labels[held_out]).float().mean().item()
        bar.set_postfix(held_out=f"{accuracy:.4f}", refresh=False)
    if spoilt:
        scale_features(net, data)
    return net, accuracy


@torch.no_grad()
def scale_features(net, data):
    """Divides each feature by its standard deviation over the images. The logits stay the same.

    Otherwise a feature in which clean images hardly differ, such as noise, would count for little
    beside those that separate the classes.
    """
    variance = feature_stats(net, data).mean_cov()[1].diagonal()
    least = 1e-6 * variance.max() + 1e-12  # of a feature that is the same for all images
    std = torch.maximum(variance, least).sqrt().float()
    net.feat.weight /= std[:, None]
    net.feat.bias /= std
    net.head.weight *= std


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
