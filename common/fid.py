"""Features and distances between sets of images."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class SmallCNN(nn.Module):
    """Classifier of small images whose penultimate layer serves as feature space (`fd`, protocol `<data>-cnn`; never called FID).

    Input: uint8 [B, C, H, W], H and W divisible by 4. Output: features float32 [B, dim], logits float32 [B, classes].
    """

    def __init__(self, channels=1, size=28, classes=10, width=32, dim=64):
        super().__init__()
        conv = lambda i, o, stride: nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.body = nn.Sequential(conv(channels, width, 1), conv(width, width, 2), conv(width, 2 * width, 1), conv(2 * width, 2 * width, 2))
        self.feat = nn.Linear(2 * width * (size // 4) ** 2, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = images.float().div(127.5).sub(1)
        f = self.feat(self.body(x).flatten(1))
        return f, self.head(F.relu(f))
