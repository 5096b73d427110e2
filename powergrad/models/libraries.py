"""The networks of torchvision and timm as their libraries make them, for a size of image they can take.

timm is imported when the first of its names is asked for: it costs a second in every fresh process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from powergrad.models.initial import seeded

TIMM = "timm/"
IMAGENET_SIZE = 224  # px
_ENCODER = "_enc"  # how timm's names end that give features whatever num_classes is
_SIZE_STEP = 32  # px; what most networks shrink an image by
_LONGEST_REASON = 160  # characters of a library's own words

Make = Callable[[int], nn.Module]
"""The network for images of so many pixels."""


def timm_library() -> ModuleType:
    """The module; imported now if it was not."""
    import timm

    library: ModuleType = timm
    return library


def torchvision_names() -> list[str]:
    """torchvision's classification networks."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


@functools.cache
def timm_names() -> tuple[str, ...]:
    """timm's networks that give logits, each behind `timm/`, without the tags of their weights. Its bare encoders are left out."""
    return tuple(TIMM + name for name in timm_library().list_models(exclude_filters=f"*{_ENCODER}"))


def timm_tagged_names(name: str) -> list[str]:
    """A timm network with each tag of its weights: `timm/resnet50.a1_in1k`. Empty for a name timm does not know."""
    return [TIMM + tagged for tagged in timm_library().models.get_arch_pretrained_cfgs(name.removeprefix(TIMM))]


def torchvision_family(name: str) -> str:
    """The module it lives in: vision_transformer, efficientnet, ..."""
    family: str = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]
    return family


def torchvision_model(name: str, *, num_classes: int, image_size: int) -> nn.Module:
    """A network with torchvision's own initialisation, drawn from torch's global generator, without auxiliary classifiers."""
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **_arguments(name, image_size))
    return model


def _arguments(name: str, image_size: int) -> dict[str, Any]:
    match torchvision_family(name):
        case "vision_transformer":
            return {"image_size": image_size}
        case "maxvit":
            return {"input_size": (image_size, image_size)}
        case "googlenet" | "inception":
            return {"aux_logits": False, "init_weights": True}
        case _:
            return {}


def timm_model(name: str, *, num_classes: int, image_size: int, **pretrained: Any) -> nn.Module:
    """A network with timm's own initialisation, drawn from torch's global generator.

    name: without `timm/`.  pretrained: `create_model`'s arguments about weights.
    """
    timm = timm_library()
    size = {"img_size": image_size} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
    model: nn.Module = timm.create_model(name, num_classes=num_classes, **size, **pretrained)
    return model


def own_size(name: str) -> int:
    """Side in pixels of the images a network was designed for."""
    if name.startswith(TIMM):
        return int(timm_library().models.get_pretrained_cfg(name.removeprefix(TIMM)).input_size[-1])
    return 299 if name == "inception_v3" else IMAGENET_SIZE  # arXiv 1512.00567, section 8


def refuse_wrong_size(name: str, make: Make, *, num_classes: int, image_size: int) -> None:
    """Tries one forward pass. Raises ValueError with sizes that work for images the network cannot take."""
    reason = _misfit(make, image_size, num_classes)
    if reason is None:
        return
    near = image_size // _SIZE_STEP * _SIZE_STEP
    candidates = sorted({near, near + _SIZE_STEP, own_size(name)} - {0, image_size})
    takes = [f"{size} px" for size in candidates if _misfit(make, size, num_classes) is None]
    says = f"takes {' or '.join(takes)}, for instance" if takes else "cannot be built here at any size tried"
    raise ValueError(f"image_size={image_size}: {name} {says}, not this ({reason})")


def _misfit(make: Make, image_size: int, num_classes: int) -> str | None:
    """Why the network does not map such images to logits; None when it does. Computed on the meta device, which computes shapes only."""
    try:
        try:
            logits = _forward(make, image_size, "meta")
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            logits = _forward(make, image_size, "cpu")  # an op without shape rules, or one that reads a value, says nothing of the size
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 # whatever the library raises, it is about the size: all else was checked
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:_LONGEST_REASON]
    return None if tuple(logits.shape) == (1, num_classes) else f"it would give logits of shape {tuple(logits.shape)}"


def _forward(make: Make, image_size: int, device: str) -> Tensor:
    with torch.device(device), torch.no_grad(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without a single element, say: the forward pass tells whether that is wrong
        logits: Tensor = make(image_size).eval()(torch.zeros(1, 3, image_size, image_size))
    return logits
