"""The thin ResNets for small images of He et al. 2016 (arXiv 1512.03385), section 4.2: three stages of 16, 32 and 64 channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from powergrad.models.norms import Norm, add_biases, norm_layer

DEPTHS = {"resnet8": 8, "resnet14": 14, "resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56, "resnet110": 110}
"""Layers with weights, by name: 6 n + 2 for n blocks a stage. The paper begins at 20."""
CHANNELS = (16, 32, 64)


class ThinBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (option A): every second pixel, and zeros for the channels that are new."""

    def __init__(self, inplanes: int, planes: int, norm: Norm) -> None:
        super().__init__()
        self.stride, self.new_channels = (1, 0) if inplanes == planes else (2, planes - inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm)(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = norm_layer(norm)(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.stride == 1 else nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return nn.functional.relu(out + shortcut)


class ThinResNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes); every size from one pixel works, 16 to 64 px are what it is made for."""

    def __init__(self, blocks: int, *, num_classes: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = norm_layer(norm)(CHANNELS[0])
        self.layer1 = _stage(CHANNELS[0], CHANNELS[0], blocks, norm)
        self.layer2 = _stage(CHANNELS[0], CHANNELS[1], blocks, norm)
        self.layer3 = _stage(CHANNELS[1], CHANNELS[2], blocks, norm)
        self.fc = nn.Linear(CHANNELS[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


def _stage(inplanes: int, planes: int, blocks: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(*(ThinBlock(inplanes if block == 0 else planes, planes, norm) for block in range(blocks)))


def skeleton(name: str, *, num_classes: int, norm: Norm) -> nn.Module:
    """The layers without memory (meta device)."""
    with torch.device("meta"):
        model = ThinResNet((DEPTHS[name] - 2) // 6, num_classes=num_classes, norm=norm)
    if norm == "none":
        add_biases(model)
    return model
