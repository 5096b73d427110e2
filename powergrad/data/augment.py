"""Training images on their way into the network: cropped, mirrored, altered, normalised, erased, on the device, a batch at a time.

What happens to an image is decided by its place in the data set, the epoch and the seed (powergrad.data.draws). It is computed in
operations that round each element alone, so neither its neighbours in the batch nor the device change it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from powergrad.data.decode import Box
from powergrad.data.draws import Stream, integers, repeated, uniforms
from powergrad.data.policies import RandAugment, TrivialAugment
from powergrad.spec import AugmentSpec

PAD_SHARE = 8  # 4 pixels of 32: the CIFAR recipe of He et al. 2016 (arXiv 1512.03385, section 4.2), scaled to the image
CROP_SCALE = (0.08, 1.0)
"""Share of the area that a resized crop keeps (Szegedy et al. 2015, arXiv 1409.4842, section 6)."""
CROP_RATIO = (3 / 4, 4 / 3)
ERASE_SCALE = (0.02, 0.33)  # this and the next as torchvision has them, after Zhong et al. 2017, arXiv 1708.04896
ERASE_RATIO = (0.3, 3.3)
TRIES = 10
"""Rectangles drawn before giving up on one that fits, as in torchvision."""


@dataclass(frozen=True)
class PadCrop:
    """The image padded with black and cropped back to its size at random."""

    pad: int
    """Pixels on each side."""

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """images: (N, C, S, S); index: (N,) int64. Returns the same shape."""
        steps = torch.arange(images.shape[-1], device=images.device)
        rows, columns = (
            steps + (integers(index, 2 * self.pad + 1, seed=seed, stream=stream, epoch=epoch) - self.pad)[:, None]  # (N, S)
            for stream in (Stream.SHIFT_Y, Stream.SHIFT_X)
        )
        return _take(images, rows, columns)


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, scaled to its size: torchvision's RandomResizedCrop.

    Square images are only ever scaled up here, where torchvision's antialiasing changes nothing.
    """

    scale: tuple[float, float] = CROP_SCALE
    """Smallest and largest share of the area."""
    ratio: tuple[float, float] = CROP_RATIO
    """Smallest and largest width / height."""

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """images: (N, C, S, S) uint8; index: (N,) int64. Returns the same shape."""
        sizes = torch.full((len(index), 2), images.shape[-1], device=index.device)
        return _scaled(images, resized_crop_boxes(index, sizes=sizes, seed=seed, epoch=epoch, scale=self.scale, ratio=self.ratio))


@dataclass(frozen=True)
class FileCrop:
    """A resized crop of encoded images: taken from their original pixels, one by one, where they are decoded."""

    seed: int
    crop: ResizedCrop

    def __call__(self, index: int, epoch: int, height: int, width: int) -> Box:
        place, size = torch.tensor([index]), torch.tensor([[height, width]])
        boxes = resized_crop_boxes(place, sizes=size, seed=self.seed, epoch=epoch, scale=self.crop.scale, ratio=self.crop.ratio)
        return Box(*boxes[0].tolist())


@dataclass(frozen=True)
class Augmentation:
    """A crop, a mirror image half of the time, then a policy; None leaves the part out."""

    seed: int
    crop: PadCrop | ResizedCrop | None
    flip: bool
    policy: TrivialAugment | RandAugment | None = None

    def __call__(self, images: Tensor, index: Tensor, *, epoch: int) -> Tensor:
        """images: (N, 1 or 3, S, S) uint8; index: (N,) int64, their places in the data set, which decide the draws. Returns the same shape."""
        if self.crop is not None:
            images = self.crop(images, index, seed=self.seed, epoch=epoch)
        if self.flip:
            mirrored = integers(index, 2, seed=self.seed, stream=Stream.FLIP, epoch=epoch).bool()
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self.policy is not None:
            images = self.policy(images, index, seed=self.seed, epoch=epoch)
        return images


@dataclass(frozen=True)
class Erasing:
    """A random rectangle of some images set to the mean: torchvision's RandomErasing."""

    seed: int
    p: float
    """Share of the images, in [0, 1]."""

    def __call__(self, images: Tensor, index: Tensor, *, epoch: int) -> Tensor:
        """images: (N, C, S, S) float, normalised, so that 0 is the mean; index: (N,) int64. Returns the same shape."""
        size = images.shape[-1]
        erased = uniforms(index, seed=self.seed, stream=Stream.ERASE, epoch=epoch) < self.p
        left, top, right, bottom = self.boxes(index, size=size, epoch=epoch).unbind(1)
        steps = torch.arange(size, device=images.device)
        rows = (steps >= top[:, None]) & (steps < bottom[:, None])
        columns = (steps >= left[:, None]) & (steps < right[:, None])
        inside = rows[:, None, :, None] & columns[:, None, None, :] & erased[:, None, None, None]  # (N, 1, S, S)
        return torch.where(inside, 0.0, images)  # keeps channels last, as masked_fill does not

    def boxes(self, index: Tensor, *, size: int, epoch: int) -> Tensor:
        """(N, 4) int64: left, top, right, bottom in pixels, smaller than the image; empty where no rectangle fitted."""
        tries = repeated(index, TRIES)
        area = uniforms(tries, seed=self.seed, stream=Stream.ERASE_AREA, epoch=epoch)
        ratio = uniforms(tries, seed=self.seed, stream=Stream.ERASE_RATIO, epoch=epoch)
        # torchvision's aspect ratio is height / width here and width / height in crops
        height, width = _sides(size * size * _between(ERASE_SCALE, area), _log_between(ERASE_RATIO, ratio))
        height, width = _first(height, width, (height < size) & (width < size), otherwise=torch.zeros_like(index))
        top = integers(index, size - height + 1, seed=self.seed, stream=Stream.ERASE_TOP, epoch=epoch)
        left = integers(index, size - width + 1, seed=self.seed, stream=Stream.ERASE_LEFT, epoch=epoch)
        return torch.stack([left, top, left + width, top + height], dim=1)


def build(spec: AugmentSpec, *, size: int, seed: int, flip_default: bool) -> Augmentation | None:
    """What a spec says is done to uint8 images of that side; None where that is nothing.

    flip_default: the data set's own, for a spec that leaves `flip` open.
    """
    crop: PadCrop | ResizedCrop | None = None
    if spec.crop == "pad":
        crop = PadCrop(_pad(size))
    elif spec.crop == "resized":
        crop = ResizedCrop() if spec.crop_scale is None else ResizedCrop(scale=(spec.crop_scale, 1.0))
    flip = flip_default if spec.flip is None else spec.flip
    policy = _policy(spec)
    return Augmentation(seed, crop, flip, policy) if crop or flip or policy else None


def build_erasing(spec: AugmentSpec, *, seed: int) -> Erasing | None:
    """What a spec says is done to normalised images; None where that is nothing."""
    return Erasing(seed, spec.erasing) if spec.erasing > 0 else None


def standard(image_size: int, *, seed: int, flip: bool) -> Augmentation:
    """The standard augmentation for images of that side."""
    return Augmentation(seed=seed, crop=PadCrop(_pad(image_size)), flip=flip)


def normalised(images: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """(N, 1 or 3, S, S) uint8 as (N, 3, S, S) float32, channels last; mean and std: (1, 1 or 3, 1, 1), of pixels in [0, 255]."""
    pixels = ((images - mean) / std).expand(-1, 3, -1, -1)
    return pixels.contiguous(memory_format=torch.channels_last)


def resized_crop_boxes(
    index: Tensor,
    *,
    sizes: Tensor,
    seed: int,
    epoch: int,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Tensor:
    """Which part of each image a resized crop keeps: (N, 4) int64, left, top, right, bottom in pixels, as Pillow's `resize(box=...)` takes it.

    index: (N,) int64; sizes: (N, 2) int64, height and width. Where no rectangle of TRIES fits, the largest central one of a permitted ratio.
    """
    height, width = sizes.unbind(1)
    tries = repeated(index, TRIES)
    # float64: a root that differs in its last bit between devices would else round to another pixel now and then
    area = (height * width).double()[:, None] * _between(scale, uniforms(tries, seed=seed, stream=Stream.CROP_AREA, epoch=epoch))
    wide, high = _sides(area, _log_between(ratio, uniforms(tries, seed=seed, stream=Stream.CROP_RATIO, epoch=epoch)))
    fits = (wide > 0) & (wide <= width[:, None]) & (high > 0) & (high <= height[:, None])
    wide, high = _first(wide, high, fits, otherwise=torch.zeros_like(index))
    found = fits.any(1)
    top = integers(index, height - high + 1, seed=seed, stream=Stream.CROP_TOP, epoch=epoch)
    left = integers(index, width - wide + 1, seed=seed, stream=Stream.CROP_LEFT, epoch=epoch)
    drawn = torch.stack([left, top, left + wide, top + high], dim=1)
    return torch.where(found[:, None], drawn, _central(height, width, ratio))


def _central(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> Tensor:
    """The largest box in the middle whose width / height is within `ratio`."""
    wide = torch.minimum(width, (height.double() * ratio[1]).round().long())
    high = torch.minimum(height, (width.double() / ratio[0]).round().long())
    left, top = (width - wide) // 2, (height - high) // 2
    return torch.stack([left, top, left + wide, top + high], dim=1)


def _sides(area: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Whole sides of rectangles of that area; ratio: first / second."""
    return (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()


def _first(one: Tensor, other: Tensor, fits: Tensor, *, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """The sides (N,) of the first try that fits, of (N, TRIES)."""
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)
    return torch.where(found, one.gather(1, first)[:, 0], otherwise), torch.where(found, other.gather(1, first)[:, 0], otherwise)


def _between(bounds: tuple[float, float], share: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _log_between(bounds: tuple[float, float], share: Tensor) -> Tensor:
    return _between((math.log(bounds[0]), math.log(bounds[1])), share).exp()


def _pad(size: int) -> int:
    return max(1, size // PAD_SHARE)


def _policy(spec: AugmentSpec) -> TrivialAugment | RandAugment | None:
    if spec.policy is None:
        return None
    if spec.policy.name == "trivial":
        return TrivialAugment()
    return RandAugment(num_ops=spec.policy.num_ops, magnitude=spec.policy.magnitude)


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[n, :, rows[n, i], columns[n, j]], black where a row or column lies outside."""
    size = images.shape[-1]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]  # (N, S, S)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    taken = images.permute(0, 2, 3, 1)[each, rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]]  # (N, S, S, C)
    return (taken * inside[..., None]).permute(0, 3, 1, 2)


def _scaled(images: Tensor, boxes: Tensor) -> Tensor:
    """The part of each image in its box, bilinear, at the size of the whole. images: (N, C, S, S) uint8; boxes: (N, 4) as above."""
    left, top, right, bottom = boxes.unbind(1)
    rows = _interpolated(images.float(), top, bottom, dim=2)
    return _interpolated(rows, left, right, dim=3).round().to(torch.uint8)


def _interpolated(images: Tensor, start: Tensor, end: Tensor, *, dim: int) -> Tensor:
    """Linear interpolation of pixels start..end of one dimension, (N,) each, at that dimension's length; edges are repeated."""
    size = images.shape[dim]
    along = [-1, 1, 1, 1]
    along[dim] = size
    centres = torch.arange(size, device=images.device) + 0.5
    place = ((end - start)[:, None] / size * centres - 0.5).clamp(min=0.0)  # (N, S), counted from start
    low = place.long()
    high = torch.minimum(low + 1, (end - start - 1)[:, None])
    weight = (place - low).view(along)
    below, above = (images.gather(dim, (start[:, None] + at).view(along).expand(images.shape)) for at in (low, high))
    return below * (1 - weight) + above * weight
