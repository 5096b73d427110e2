"""Weights that come from elsewhere: the libraries' published ones, and another run's checkpoint."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
import torchvision  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings  # type: ignore[import-untyped]

from powergrad.models import resnet
from powergrad.models.classifier import classifiers_of
from powergrad.models.libraries import TIMM, timm_library, timm_model, torchvision_family, torchvision_names

REACH_S = 10.0
"""Seconds without an answer after which the network is taken to be away."""
_NAMED_DIFFERENCES = 4
_RESCALING = ("googlenet", "inception_v3")  # torchvision's own way with their weights is a network that turns the input into this:
_RESCALED = (0.5, 0.5, 0.5)  # Szegedy et al.'s mean and deviation


class PretrainedMissing(Exception):
    """Published weights are not where they are kept, and could not be fetched; the message says where that is."""


class Preprocessing(NamedTuple):
    """Mean and standard deviation of the red, green and blue channels, of pixels from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint gave a network. fresh: the tensors it did not give, for a classifier of another size."""

    tensors: int
    fresh: tuple[str, ...]


def refuse_unpublished(name: str, *, norm: str | None, image_size: int) -> None:
    """Raises ValueError for a network, or a form of it, that nobody publishes weights for."""
    if norm not in (None, "batch"):
        raise ValueError(f"pretrained with norm={norm!r}: there are no such weights; set norm to null or batch")
    if not _is_published(name):
        raise ValueError(f"pretrained with model name={name!r}: there are no such weights; describe_models() says which networks have some")
    if name in resnet.PLAIN and image_size <= resnet.SMALL_IMAGE:
        raise ValueError(
            f"pretrained with image_size={image_size}: up to {resnet.SMALL_IMAGE} px {name} has a stem of its own, which has no published "
            f"weights; take images of {resnet.SMALL_IMAGE + 1} px or more, or the network {TIMM}{name}"
        )


def _is_published(name: str) -> bool:
    if name.startswith(TIMM):
        return bool(timm_library().models.get_pretrained_cfg(name.removeprefix(TIMM)).has_weights)
    return name in torchvision_names() and bool(list(torchvision.models.get_model_weights(name)))


def preprocessing(name: str) -> Preprocessing:
    """How the images were normalised that a network's published weights have seen.  Raises ValueError where there are none."""
    refuse_unpublished(name, norm=None, image_size=resnet.SMALL_IMAGE + 1)
    if name in _RESCALING:
        return Preprocessing(_RESCALED, _RESCALED)
    source: Any
    if name.startswith(TIMM):
        source = timm_library().models.get_pretrained_cfg(name.removeprefix(TIMM))
    else:
        source = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Preprocessing(_three(source.mean), _three(source.std))


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def load_torchvision(model: nn.Module, name: str, *, image_size: int, weights_dir: Path | None) -> None:
    """Puts torchvision's best weights into a network of the same name; a classifier of another size stays as it is.

    weights_dir: the files lie below `checkpoints` in it; None is torch.hub's own folder.  Raises PretrainedMissing.
    """
    state = _published(name, weights_dir)
    if torchvision_family(name) == "vision_transformer":
        patches = model.get_submodule("conv_proj")
        assert isinstance(patches, nn.Conv2d)
        state = interpolate_embeddings(image_size, patches.kernel_size[0], state)
    _put(model, state, source=f"torchvision's weights of {name}")


def _published(name: str, weights_dir: Path | None) -> Mapping[str, Tensor]:
    """The state of torchvision's own network with its own weights, which repairs the names of older files."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    folder = Path(torch.hub.get_dir()) if weights_dir is None else weights_dir
    file = folder / "checkpoints" / Path(urlparse(weights.url).path).name
    try:
        with _hub_folder(folder), _patience(REACH_S):
            model: nn.Module = torchvision.models.get_model(name, weights=weights, progress=False)
    except Exception as error:
        if file.exists():
            raise PretrainedMissing(
                f"{file}: does not hold the weights of {name} ({error}); remove it, or put {weights.url} there"
            ) from error
        raise PretrainedMissing(f"{file}: is not there and could not be fetched ({error}); put {weights.url} there") from error
    return model.state_dict()


@contextlib.contextmanager
def _hub_folder(folder: Path) -> Iterator[None]:
    before = torch.hub.get_dir()
    torch.hub.set_dir(folder)
    try:
        yield
    finally:
        torch.hub.set_dir(before)


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """torch.hub sets no timeout of its own, and would wait for ever on a network that swallows packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def pretrained_timm(name: str, *, num_classes: int, image_size: int, weights_dir: Path | None) -> nn.Module:
    """timm's network with its published weights, fitted by timm to the classes and the image size.

    name: without `timm/`.  weights_dir: the Hugging Face cache, and the folder for weights published elsewhere; None is the libraries' own.
    Weights that lie there are taken without asking the network.  Raises PretrainedMissing.
    """
    config = timm_library().models.get_pretrained_cfg(name)
    found = _cached(config, weights_dir)
    overlay: dict[str, Any] = {}
    if found is not None:  # timm's special readers are for the original files, not for those on the hub
        overlay = {"pretrained_cfg_overlay": {"file": str(found), "custom_load": config.custom_load == "hf"}}
    elif config.hf_hub_id:
        _refuse_unreachable(config, weights_dir)
    try:
        with _patience(REACH_S):
            return timm_model(
                name, num_classes=num_classes, image_size=image_size, pretrained=True, cache_dir=_text(weights_dir), **overlay
            )
    except Exception as error:
        if found is not None:
            raise PretrainedMissing(
                f"{found}: does not hold the weights of timm/{name} ({error}); {_what_to_put(config, weights_dir)}"
            ) from error
        raise _missing(config, weights_dir, error) from error


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _cached(config: Any, weights_dir: Path | None) -> Path | None:
    """The file timm would take from the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    if not config.hf_hub_id:
        return None
    for file in _hub_files(config):
        found = try_to_load_from_cache(config.hf_hub_id, file, cache_dir=_text(weights_dir))
        if isinstance(found, str):
            return Path(found)
    return None


def _hub_files(config: Any) -> list[str]:
    return [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]


def _refuse_unreachable(config: Any, weights_dir: Path | None) -> None:
    """One question without retries: the hub's client would ask for the best part of a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with contextlib.suppress(EntryNotFoundError):  # an answer: timm knows which other file to ask for
            get_hf_file_metadata(hf_hub_url(config.hf_hub_id, _hub_files(config)[0]), timeout=REACH_S)
    except Exception as error:  # whichever HTTP library it stands on
        raise _missing(config, weights_dir, error) from error


def _missing(config: Any, weights_dir: Path | None, error: Exception) -> PretrainedMissing:
    where = "the Hugging Face cache" if weights_dir is None else weights_dir
    return PretrainedMissing(
        f"{where}: does not hold {config.hf_hub_id or config.url}, which could not be fetched ({error}); {_what_to_put(config, weights_dir)}"
    )


def _what_to_put(config: Any, weights_dir: Path | None) -> str:
    if not config.hf_hub_id:
        return f"put {config.url} there"
    option = "" if weights_dir is None else f" --cache-dir {weights_dir}"
    return f"fetch it with: hf download {config.hf_hub_id} {_hub_files(config)[0]}{option}"


def load_weights(model: nn.Module, path: Path) -> Loaded:
    """Puts a run's model.safetensors into a network; a classifier of another size stays as it is, and is named in the report.

    Raises ValueError for a file of another network, with the first few differences, or one that is no safetensors file; FileNotFoundError.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: does not read as safetensors ({error})") from error
    return _put(model, state, source=str(path))


def _put(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> Loaded:
    """Strict about every tensor but the classifier's."""
    own = model.state_dict()
    fresh = _fresh(model, own, state)
    differences = _differences(own, state, leave_out=fresh)
    if differences:
        more = f" and {len(differences) - _NAMED_DIFFERENCES} more" if len(differences) > _NAMED_DIFFERENCES else ""
        raise ValueError(f"{source}: is of another network: {'; '.join(differences[:_NAMED_DIFFERENCES])}{more}")
    taken = {name: state[name] for name in own if name not in fresh}
    model.load_state_dict(taken, strict=False)
    return Loaded(tensors=len(taken), fresh=fresh)


def _fresh(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tensors of a classifier for another number of classes: all of a layer, or none."""
    names: list[str] = []
    for layer in classifiers_of(model):
        mine = [name for name in own if name.startswith(f"{layer}.")]
        if all(name in state and own[name].shape[1:] == state[name].shape[1:] for name in mine):  # (classes, ...)
            names += mine if any(len(own[name]) != len(state[name]) for name in mine) else []
    return tuple(names)


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, leave_out: tuple[str, ...]) -> list[str]:
    found = []
    for name in [*own, *sorted(state.keys() - own.keys())]:
        if name in leave_out:
            continue
        if name not in state:
            found.append(f"{name} is not in it")
        elif name not in own:
            found.append(f"{name} is not in the network")
        elif own[name].shape != state[name].shape:
            found.append(f"{name} is {tuple(state[name].shape)} in it and {tuple(own[name].shape)} in the network")
    return found
