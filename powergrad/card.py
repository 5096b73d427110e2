"""A model card: what a trained network is, where it comes from, how good it is and what is not known, as one Markdown file."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from powergrad.markdown import plain
from powergrad.spec import (
    AdamWSpec,
    AlphaSchedule,
    AugmentSpec,
    ConstantSpec,
    CosineSpec,
    LinearSpec,
    LionSpec,
    MuonSpec,
    OneCycleSpec,
    RandAugmentSpec,
    SGDSpec,
    StepSpec,
    TrainSpec,
)

if TYPE_CHECKING:
    from powergrad.export import Preprocessing

NAMED_CLASSES = 100
"""Classes that the card names; labels.json has all."""
PICTURE_BYTES = 2 * 2**20
"""Largest picture that is put into the card: editors and browsers show such data URIs."""
_MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
_SPLIT = re.compile(r"^(?P<split>(?:ema_)?(?:val|test))_(?P<name>.+)$")
_MEANINGS = {
    "top1": "share of images whose likeliest class is right",
    "top5": "share of images whose class is among the five likeliest",
    "loss": "cross-entropy, nats",
}
"""In the order in which they are wanted; others follow."""

Point = Mapping[str, Any]
"""`step`, `epoch` and values by name; None is a value that is not finite."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run and the weights it left, beside its spec. None is not known."""

    weights: str
    """Which ones these are: best checkpoint, step-00000800."""
    step: int
    """Optimizer updates that made them."""
    epoch: int
    parameters: int
    metrics: Mapping[str, float | None]
    """Of these weights: val_top1, test_loss."""
    points: Sequence[Point] = ()
    """All metric points of the run, in the order of steps."""
    train_images: int | None = None
    val_images: int | None = None
    test_images: int | None = None
    data_sha256: str | None = None
    """Hash of the data set's content."""
    attempts: int | None = None
    """Starts it took: more than one is a run that was paused, moved or taken over."""
    determinism: str | None = None
    """bitwise or statistical, and why, in words."""
    precision: str | None = None
    """What was computed in."""
    cpu_threads: int | None = None
    ece: float | None = None
    """Expected calibration error in [0, 1]."""
    ece_split: str = "validation"
    """Which images it was measured on."""
    curves: Path | None = None
    """A picture of the run's curves, SVG or PNG."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and device by name, of the training."""


def model_card(*, spec: TrainSpec, facts: Facts, class_names: Sequence[str], preprocessing: Preprocessing) -> str:
    """The card in Markdown. Names that come from the data are escaped. Raises OSError if the picture cannot be read."""
    sections = (
        _head(spec, facts, class_names),
        _use(preprocessing),
        _data(spec, facts, class_names),
        _training(spec, facts),
        _scores(facts),
        _calibration(facts),
        _provenance(spec, facts),
        _LIMITS,
    )
    return "\n\n".join(section for section in sections if section) + "\n"


_LIMITS = """\
## Limits

The network knows the classes above and no others: every image gets one of them. Images unlike those it was trained on (another camera, \
crop, time or place) may be classified worse than the figures say, and with undue confidence. Fairness, robustness and fitness for any \
use have not been examined.

## Licence

Not stated here. It is for the owner of the data and of these weights to say under which terms they may be used."""


def _head(spec: TrainSpec, facts: Facts, class_names: Sequence[str]) -> str:
    norm = "" if spec.model.norm is None else f" (normalisation: {spec.model.norm})"
    return (
        f"# {plain(spec.model.name)} on {plain(spec.data.dataset)}\n\n"
        f"An image classifier: {plain(spec.model.name)}{norm}, {facts.parameters:,} parameters, {len(class_names):,} classes. "
        f"These weights: {plain(facts.weights)}, after {facts.epoch} epochs ({facts.step:,} updates)."
    )


def _use(preprocessing: Preprocessing) -> str:
    size = preprocessing.image_size
    grey = " Images are turned grey first: it was trained on grey ones." if preprocessing.channels == 1 else ""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return (
        "## Use\n\n"
        f"Input: float32 (N, 3, {size}, {size}), RGB. An image is turned upright by its EXIF orientation, its shorter side is scaled to "
        f"{size} pixels (bilinear), and the middle square is taken.{grey} Pixels in [0, 1] are normalised with mean {mean} and standard "
        f"deviation {std}; preprocessing.json has the exact values. Output: logits (N, C); softmax makes probabilities of them.\n\n"
        "In the bundle:\n\n"
        "    python inference.py image.jpg --top 5"
    )


def _data(spec: TrainSpec, facts: Facts, class_names: Sequence[str]) -> str:
    counts = {"training": facts.train_images, "validation": facts.val_images, "test": facts.test_images}
    known = [f"{count:,} {name}" for name, count in counts.items() if count]
    more = len(class_names) - NAMED_CLASSES
    names = ", ".join(plain(name) for name in class_names[:NAMED_CLASSES]) + (f" and {more:,} more (labels.json)" if more > 0 else "")
    lines = [
        f"- Data set: {plain(_data_name(spec))}",
        f"- Images: {', '.join(known)}" if known else "",
        f"- Content (sha256): {facts.data_sha256}" if facts.data_sha256 else "",
        f"- {len(class_names):,} classes: {names}",
    ]
    return "## Data\n\n" + "\n".join(line for line in lines if line)


def _data_name(spec: TrainSpec) -> str:
    path = getattr(spec.data, "path", None)
    return spec.data.dataset if path is None else f"{spec.data.dataset} ({path})"


def _training(spec: TrainSpec, facts: Facts) -> str:
    recipe = "\n".join(f"- {line}" for line in _recipe(spec, facts))
    text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=10**6)
    return f"## Training\n\n{recipe}\n\nThe whole recipe, as it can be run again:\n\n```yaml\n{text}```"


def _recipe(spec: TrainSpec, facts: Facts) -> Iterator[str]:
    yield f"{spec.epochs} epochs, batches of {spec.data.batch_size} images" + (
        f" in {spec.accumulate} parts" if spec.accumulate > 1 else ""
    )
    yield f"PowerGrad Transform: {_alpha(spec)}"
    yield _loss(spec)
    yield _optimizer(spec)
    yield _schedule(spec)
    if spec.clip is not None:
        names = {"norm": "global norm", "value": "value of each entry", "agc": "adaptive, clip factor"}
        yield f"Gradients clipped ({names[spec.clip.mode]} {spec.clip.value:g})"
    yield f"Augmentation: {_augmentation(spec)}"
    if spec.ema is not None:
        yield f"Moving average of the weights, decay {spec.ema.decay:g}"
    yield _start(spec)
    yield f"Computed in {facts.precision or spec.precision}"


def _alpha(spec: TrainSpec) -> str:
    alpha = spec.loss.alpha
    if isinstance(alpha, AlphaSchedule):
        return f"α from {alpha.start:g} to {alpha.end:g} ({alpha.shape}, over {alpha.epochs or spec.epochs} epochs)"
    return "off (α = 1, ordinary cross-entropy)" if alpha == 1.0 else f"α = {alpha:g} in the backward pass"


def _loss(spec: TrainSpec) -> str:
    loss = spec.loss
    weights = (
        "" if loss.class_weights is None else ", classes weighted" + (" by inverse frequency" if loss.class_weights == "balanced" else "")
    )
    return f"Cross-entropy{f', label smoothing {loss.label_smoothing:g}' if loss.label_smoothing else ''}{weights}"


def _optimizer(spec: TrainSpec) -> str:
    optimizer = spec.optimizer
    match optimizer:
        case SGDSpec():
            name = f"SGD, {'Nesterov ' if optimizer.nesterov else ''}momentum {optimizer.momentum:g}"
        case AdamWSpec() | LionSpec():
            name = f"{'AdamW' if isinstance(optimizer, AdamWSpec) else 'Lion'}, betas {optimizer.beta1:g} and {optimizer.beta2:g}"
        case MuonSpec():
            name = f"Muon, momentum {optimizer.momentum:g}"
    where = "" if optimizer.decay_norm_and_bias else ", not on normalisation layers and biases"
    return f"{name}, peak learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}{where if optimizer.weight_decay else ''}"


def _schedule(spec: TrainSpec) -> str:
    schedule = spec.schedule
    match schedule:
        case CosineSpec() | LinearSpec():
            text = f"{schedule.name} from the peak to {schedule.min_lr:g}"
        case StepSpec():
            text = f"times {schedule.gamma:g} at epochs {', '.join(map(str, spec.milestones))}"
        case ConstantSpec():
            text = "constant"
        case OneCycleSpec():
            text = f"one cycle, its peak after {schedule.peak_at:.0%} of the steps"
    warm = f", {spec.warmup_epochs} epochs of warm-up" if spec.warmup_epochs else ""
    cooldown = 0 if isinstance(schedule, ConstantSpec) else schedule.cooldown_epochs
    cool = f", {cooldown} epochs of cool-down" if cooldown else ""
    return f"Learning rate: {text}{warm}{cool}"


def _augmentation(spec: TrainSpec) -> str:
    augment = spec.data.augment
    if augment is None:
        return "the data set's own"
    if not isinstance(augment, AugmentSpec):
        return augment
    flip = {None: "flips as the data set allows", True: "flips", False: ""}[augment.flip]
    parts = [f"crop {augment.crop}", flip]
    policy = augment.policy
    if policy is not None:
        parts.append(f"RandAugment ({policy.num_ops} × {policy.magnitude})" if isinstance(policy, RandAugmentSpec) else "TrivialAugment")
    parts += [f"{name} {value:g}" for name in ("erasing", "mixup", "cutmix") if (value := getattr(augment, name))]
    return ", ".join(part for part in parts if part)


def _start(spec: TrainSpec) -> str:
    if spec.model.pretrained:
        return "Started from the library's pretrained weights"
    return "Started from random weights" if spec.model.init_from is None else f"Started from the weights of {spec.model.init_from}"


def _scores(facts: Facts) -> str:
    table: dict[str, dict[str, float | None]] = {}
    for name, value in facts.metrics.items():
        if (match := _SPLIT.match(name)) is not None:
            table.setdefault(match["name"], {})[match["split"]] = value
    splits = [split for split in ("val", "ema_val", "test", "ema_test") if any(split in row for row in table.values())]
    lines = ["## Results", ""]
    if splits:
        titles = {"val": "validation", "ema_val": "validation, averaged weights", "test": "test", "ema_test": "test, averaged weights"}
        lines += ["| metric | " + " | ".join(titles[split] for split in splits) + " |", "|---" * (len(splits) + 1) + "|"]
        wanted = list(_MEANINGS)
        rows = sorted(table.items(), key=lambda row: wanted.index(row[0]) if row[0] in wanted else len(wanted))
        lines += [f"| {_titled(name)} | " + " | ".join(_cell(row, split) for split in splits) + " |" for name, row in rows]
        lines += ["", _HONESTY_TESTED if any("test" in split for split in splits) else _HONESTY]
    else:
        lines.append("These weights have not been evaluated.")
    return "\n".join(lines) + _curves(facts.curves)


_HONESTY = (
    "The checkpoint was chosen by its validation accuracy, so that the validation figures are optimistic: expect a little less on new images. "
    "There is no test split that was kept apart from this choice."
)
_HONESTY_TESTED = (
    "The checkpoint was chosen by its validation accuracy, so that the validation figures are optimistic. "
    "The test split was scored once, with the chosen weights, and is the fairer figure."
)


def _titled(name: str) -> str:
    return plain(name) + (f" ({_MEANINGS[name]})" if name in _MEANINGS else "")


def _cell(row: Mapping[str, float | None], split: str) -> str:
    if split not in row:
        return ""
    value = row[split]
    return "not finite" if value is None else f"{value:.4g}"


def _curves(picture: Path | None) -> str:
    if picture is None:
        return ""
    content = picture.read_bytes()
    media_type = _MEDIA_TYPES.get(picture.suffix.lower())
    if media_type is None or len(content) > PICTURE_BYTES:
        return f"\n\nCurves: {plain(picture.name)}"
    return f"\n\n![Curves of the run](data:{media_type};base64,{base64.b64encode(content).decode()})"


def _calibration(facts: Facts) -> str:
    if facts.ece is None:
        return ""
    return (
        f"## Calibration\n\nExpected calibration error on the {plain(facts.ece_split)} images: {facts.ece:.4f} (15 bins): the mean distance "
        "between the probability the network gives its answer and the share of such answers that are right."
    )


def _provenance(spec: TrainSpec, facts: Facts) -> str:
    wanted = "same spec, same machine type and software: same bits" if spec.deterministic else "not asked to be repeatable"
    lines = [
        f"- Seed: {spec.seed}",
        f"- Determinism: {plain(facts.determinism or wanted)}",
        f"- Attempts: {facts.attempts}" if facts.attempts else "",
        f"- CPU threads: {facts.cpu_threads}" if facts.cpu_threads else "",
        *(f"- {plain(name)}: {plain(value)}" for name, value in facts.environment.items()),
    ]
    return "## Provenance\n\n" + "\n".join(line for line in lines if line)
