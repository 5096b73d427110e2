"""torchvision's ResNets with a choice of normalisation and a stem for small images, and the same with squeeze-and-excitation."""

from __future__ import annotations

from typing import Any

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck  # type: ignore[import-untyped]
from torchvision.ops import SqueezeExcitation  # type: ignore[import-untyped]

from powergrad.models.norms import Norm, add_biases, norm_layer

PLAIN = {
    "resnet18": "resnet",
    "resnet34": "resnet",
    "resnet50": "resnet",
    "resnet101": "resnet",
    "resnet152": "resnet",
    "resnext50_32x4d": "resnext",
    "resnext101_32x8d": "resnext",
    "wide_resnet50_2": "wide_resnet",
    "wide_resnet101_2": "wide_resnet",
}
"""Family by name."""
REDUCTION = 16  # Hu et al. 2018, arXiv 1709.01507, section 6.2
SMALL_IMAGE = 64  # px; ImageNet's stem would leave a 64 px image 2 x 2 at the end, and a 32 px one a single pixel


class SEBasicBlock(BasicBlock):  # type: ignore[misc]
    """The block of ResNet-18 and -34 whose residual is rescaled channel by channel before it is added (arXiv 1709.01507, figure 3)."""

    def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se = SqueezeExcitation(planes * self.expansion, planes * self.expansion // REDUCTION)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += identity
        result: Tensor = self.relu(out)
        return result


class SEBottleneck(Bottleneck):  # type: ignore[misc]
    """The block of ResNet-50 and deeper, with the same rescaling."""

    def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se = SqueezeExcitation(planes * self.expansion, planes * self.expansion // REDUCTION)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        out += identity
        result: Tensor = self.relu(out)
        return result


SQUEEZED: dict[str, tuple[type[SEBasicBlock | SEBottleneck], list[int]]] = {
    "seresnet18": (SEBasicBlock, [2, 2, 2, 2]),
    "seresnet34": (SEBasicBlock, [3, 4, 6, 3]),
    "seresnet50": (SEBottleneck, [3, 4, 6, 3]),
    "seresnet101": (SEBottleneck, [3, 4, 23, 3]),
}
"""Block and blocks a stage by name: He et al. 2016, table 1."""


def skeleton(name: str, *, num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """The layers without memory (meta device): nothing is allocated, and nothing is drawn only to be overwritten."""
    with torch.device("meta"):
        model: nn.Module
        if name in SQUEEZED:
            block, blocks = SQUEEZED[name]
            model = torchvision.models.ResNet(block, blocks, num_classes=num_classes, norm_layer=norm_layer(norm))
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, norm_layer=norm_layer(norm))
        if image_size <= SMALL_IMAGE:
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
    if norm == "none":
        add_biases(model)
    return model
