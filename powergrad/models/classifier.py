"""Which layer of a network gives the logits."""

from __future__ import annotations

from torch import nn


def classifier_of(model: nn.Module) -> str:
    """The dotted name of the linear or convolution layer that gives the logits: `fc`, `heads.head`, `classifier.1`.

    Of several (a distilled network's), the first; `classifiers_of` has all. Raises ValueError for a network without such a layer.
    """
    return classifiers_of(model)[0]


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    """All layers that give logits, as timm's own description names them, else the last one with weights.  Raises ValueError."""
    described = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (described,) if isinstance(described, str) else described
    found = tuple(layer for name in names if (layer := _last_layer(model, name)) is not None)
    if found:
        return found
    if (last := _last_layer(model, "")) is None:
        raise ValueError(f"{type(model).__name__}: has no linear or convolution layer that could give logits")
    return (last,)


def _last_layer(model: nn.Module, below: str) -> str | None:
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and (not below or name == below or name.startswith(f"{below}."))
    ]
    return layers[-1] if layers else None
