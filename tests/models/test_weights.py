"""Published weights from real files where the libraries keep them, and checkpoints of other runs."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor, nn

from powergrad.models import Loaded, PretrainedMissing, build_model, load_weights, preprocessing, weights
from powergrad.models.initial import seeded
from powergrad.models.libraries import timm_model, torchvision_model
from tests.models.networks import equal, make_model, noise, state

torch.set_num_threads(1)

PROMPTLY_S = 20.0  # the hub's own client asks for 46 s before it gives up


def published_by_torchvision(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The file torchvision looks for below `folder`, holding the weights of the network returned."""
    with seeded(99):
        model: nn.Module = torchvision.models.get_model(name, weights=None, **({"init_weights": True} if name == "googlenet" else {}))
    model.to(dtype).float()
    file = torchvision_file(name, folder)
    file.parent.mkdir(parents=True)
    torch.save({key: value.to(dtype) if value.is_floating_point() else value for key, value in state(model).items()}, file)
    return model


def torchvision_file(name: str, folder: Path) -> Path:
    return folder / "checkpoints" / Path(urlparse(torchvision.models.get_model_weights(name).DEFAULT.url).path).name


def published_by_timm(name: str, folder: Path, *, image_size: int, num_classes: int = 1000) -> nn.Module:
    """The Hugging Face cache as a download leaves it, without its links to blobs."""
    with seeded(99):
        model = timm_model(name, num_classes=num_classes, image_size=image_size)
    revision = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    repository = folder / f"models--timm--{name}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    save_file({key: value.contiguous() for key, value in state(model).items()}, snapshot / "model.safetensors")
    return model


def pretrained(name: str, folder: Path, *, num_classes: int = 10, image_size: int = 96, generator_seed: int = 0) -> nn.Module:
    return build_model(
        name,
        num_classes=num_classes,
        image_size=image_size,
        norm=None,
        generator_seed=generator_seed,
        pretrained=True,
        weights_dir=folder,
    )


def same_but(classifier: str, one: nn.Module, other: nn.Module) -> bool:
    theirs = state(other)
    return all(torch.equal(value, theirs[key]) for key, value in state(one).items() if not key.startswith(f"{classifier}."))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every connection to the outside is refused at once, whether this machine has a network or not."""
    yield from _behind_proxy("http://127.0.0.1:1", monkeypatch)


@pytest.fixture
def silent_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections are taken and never answered."""
    monkeypatch.setattr(weights, "REACH_S", 0.5)
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take() -> None:
            try:
                while True:
                    taken.append(listener.accept()[0])
            except OSError:  # closed: the test is over
                return

        thread = threading.Thread(target=take)
        thread.start()
        yield from _behind_proxy(f"http://127.0.0.1:{listener.getsockname()[1]}", monkeypatch)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)
    for connection in taken:
        connection.close()


def _behind_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, proxy)
        monkeypatch.setenv(variable.upper(), proxy)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # both clients read the proxy when they are made
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("name", "classifier"), [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3")]
)
def test_torchvisions_weights_are_taken_with_a_new_classifier(name: str, classifier: str, tmp_path: Path, no_network: None) -> None:
    theirs = published_by_torchvision(name, tmp_path)
    model = pretrained(name, tmp_path)
    assert same_but(classifier, model, theirs)
    fresh = make_model(name, image_size=96).get_submodule(classifier)
    assert equal(model.get_submodule(classifier), fresh)
    other_seed = pretrained(name, tmp_path, generator_seed=1)
    assert not equal(other_seed.get_submodule(classifier), fresh)


def test_a_classifier_for_as_many_classes_is_taken_too(tmp_path: Path, no_network: None) -> None:
    theirs = published_by_torchvision("resnet18", tmp_path)
    assert equal(pretrained("resnet18", tmp_path, num_classes=1000), theirs)


def test_torchs_folder_and_generators_are_as_they_were(tmp_path: Path, no_network: None) -> None:
    published_by_torchvision("squeezenet1_1", tmp_path)
    folder, before, timeout = torch.hub.get_dir(), torch.random.get_rng_state(), socket.getdefaulttimeout()
    pretrained("squeezenet1_1", tmp_path)
    assert torch.hub.get_dir() == folder
    assert torch.equal(torch.random.get_rng_state(), before)
    assert socket.getdefaulttimeout() == timeout


def test_a_vision_transformers_positions_are_fitted_to_the_image_size(tmp_path: Path, no_network: None) -> None:
    theirs = published_by_torchvision("vit_b_32", tmp_path, dtype=torch.bfloat16)
    model = pretrained("vit_b_32", tmp_path, image_size=96)
    torchvision_file("vit_b_32", tmp_path).unlink()  # 170 MB
    positions, full = state(model).pop("encoder.pos_embedding"), state(theirs).pop("encoder.pos_embedding")
    assert positions.shape == (1, 1 + 3 * 3, 768)
    assert torch.equal(positions[:, 0], full[:, 0])  # the class token has no place in the image
    grid = full[:, 1:].transpose(1, 2).reshape(1, 768, 7, 7)
    expected = nn.functional.interpolate(grid, size=3, mode="bicubic", align_corners=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(positions[:, 1:], expected)
    key = "encoder.layers.encoder_layer_11.mlp.3.weight"
    assert torch.equal(state(model)[key], state(theirs)[key])


def test_googlenet_with_its_preprocessing_computes_what_torchvisions_does(tmp_path: Path, no_network: None) -> None:
    """torchvision turns ImageNet's normalisation into the weights' own inside the network; here it is that of the data."""
    published_by_torchvision("googlenet", tmp_path)
    ours = pretrained("googlenet", tmp_path, num_classes=1000).eval()
    with torch.device("cpu"):
        theirs = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False, transform_input=True).eval()
    theirs.load_state_dict(state(ours))
    pixels, imagenet = noise(2, size=96).sigmoid(), torchvision.models.GoogLeNet_Weights.DEFAULT.transforms()
    mean, std = preprocessing("googlenet")
    with torch.no_grad():
        found = ours(normalised(pixels, mean, std))
        torch.testing.assert_close(found, theirs(normalised(pixels, imagenet.mean, imagenet.std)), rtol=1e-4, atol=1e-4)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("tag", ["", ".r160_in1k"])
def test_timms_weights_are_taken_from_the_hugging_face_cache(tag: str, tmp_path: Path, no_network: None) -> None:
    theirs = published_by_timm("test_vit.r160_in1k", tmp_path, image_size=160)
    model = pretrained(f"timm/test_vit{tag}", tmp_path, image_size=160)
    assert same_but("head", model, theirs)
    assert state(model)["head.weight"].shape[0] == 10
    fresh = make_model("timm/test_vit", image_size=96).get_submodule("head")
    assert equal(model.get_submodule("head"), fresh)
    assert equal(model, pretrained("timm/test_vit", tmp_path, image_size=160))


def test_timms_positions_are_fitted_to_the_image_size(tmp_path: Path, no_network: None) -> None:
    theirs = published_by_timm("test_vit.r160_in1k", tmp_path, image_size=160)
    model = pretrained("timm/test_vit", tmp_path, image_size=96)
    assert state(model)["pos_embed"].shape[1] == 6 * 6 + 1 < state(theirs)["pos_embed"].shape[1]
    assert torch.equal(state(model)["blocks.0.attn.qkv.weight"], state(theirs)["blocks.0.attn.qkv.weight"])


def test_a_file_that_timm_once_read_in_numpys_format_is_read_as_the_hub_has_it(tmp_path: Path, no_network: None) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    theirs = published_by_timm(name, tmp_path, image_size=224, num_classes=21843)
    assert same_but("head", pretrained(f"timm/{name}", tmp_path, image_size=224), theirs)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("squeezenet1_1", r"checkpoints/squeezenet1_1-\w+\.pth: is not there .* put https://\S+/squeezenet1_1-\w+\.pth there"),
        ("timm/test_vit", r"does not hold timm/test_vit.r160_in1k.*hf download timm/test_vit.r160_in1k model.safetensors --cache-dir "),
        ("timm/dla34.in1k", r"dla34.in1k"),
    ],
)
def test_absent_weights_without_a_network_are_reported_promptly(name: str, place: str, tmp_path: Path, no_network: None) -> None:
    begun = time.monotonic()
    with pytest.raises(PretrainedMissing, match=place) as caught:
        pretrained(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert time.monotonic() - begun < PROMPTLY_S


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/test_vit"])
def test_a_network_that_swallows_everything_is_given_up(name: str, tmp_path: Path, silent_network: None) -> None:
    begun = time.monotonic()
    with pytest.raises(PretrainedMissing):
        pretrained(name, tmp_path)
    assert time.monotonic() - begun < PROMPTLY_S


def test_a_broken_file_is_named(tmp_path: Path, no_network: None) -> None:
    file = torchvision_file("squeezenet1_1", tmp_path)
    file.parent.mkdir()
    file.write_bytes(b"cut short")
    with pytest.raises(PretrainedMissing, match=rf"{file}: does not hold the weights of squeezenet1_1 .*remove it"):
        pretrained("squeezenet1_1", tmp_path)


def test_what_nobody_publishes_is_refused(tmp_path: Path) -> None:
    for name in ("seresnet50", "resnet20", "timm/efficientnet_b8"):
        with pytest.raises(ValueError, match=f"pretrained with model name='{name}': there are no such weights"):
            pretrained(name, tmp_path)
    with pytest.raises(ValueError, match="pretrained with norm='group': there are no such weights"):
        build_model("resnet18", num_classes=2, image_size=96, norm="group", generator_seed=0, pretrained=True)
    with pytest.raises(ValueError, match=r"pretrained with image_size=32: up to 64 px resnet18 .* or the network timm/resnet18"):
        pretrained("resnet18", tmp_path, image_size=32)


def test_preprocessing_is_what_the_weights_have_seen() -> None:
    assert preprocessing("resnet50") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert preprocessing("timm/vit_tiny_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert preprocessing("inception_v3").mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="model name='resnet56': there are no such weights"):
        preprocessing("resnet56")


def checkpoint_of(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(state(model), path)
    return path


@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1", "timm/test_vit"])
def test_a_checkpoint_of_the_same_network_is_taken_whole(name: str, tmp_path: Path) -> None:
    theirs, model = make_model(name, image_size=32, generator_seed=1), make_model(name, image_size=32)
    assert load_weights(model, checkpoint_of(theirs, tmp_path)) == Loaded(tensors=len(state(model)), fresh=())
    assert equal(model, theirs)


@pytest.mark.parametrize(("name", "classifier"), [("resnet20", "fc"), ("squeezenet1_1", "classifier.1"), ("timm/test_vit", "head")])
def test_a_classifier_of_another_size_starts_fresh_and_is_named(name: str, classifier: str, tmp_path: Path) -> None:
    theirs = make_model(name, num_classes=7, image_size=32, generator_seed=1)
    model, untouched = make_model(name, image_size=32), make_model(name, image_size=32)
    report = load_weights(model, checkpoint_of(theirs, tmp_path))
    assert report == Loaded(tensors=len(state(model)) - 2, fresh=(f"{classifier}.weight", f"{classifier}.bias"))
    assert same_but(classifier, model, theirs)
    assert equal(model.get_submodule(classifier), untouched.get_submodule(classifier))


def test_a_checkpoint_of_another_network_is_refused_and_nothing_is_taken(tmp_path: Path) -> None:
    path = checkpoint_of(make_model("resnet32", image_size=32), tmp_path)
    model, untouched = make_model("resnet20"), make_model("resnet20")
    with pytest.raises(ValueError, match=rf"{path}: is of another network: layer1\.3\.bn1\.bias is not in the network; .* and \d+ more"):
        load_weights(model, path)
    assert equal(model, untouched)
    with pytest.raises(ValueError, match=r"is of another network: features\.0\.weight is not in it; .* and \d+ more"):
        load_weights(torchvision_model("squeezenet1_1", num_classes=10, image_size=32), path)


def test_a_classifier_with_other_inputs_is_another_network(tmp_path: Path) -> None:
    ours, theirs = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"0\.weight is \(2, 5\) in it and \(3, 4\) in the network"):
        load_weights(ours, checkpoint_of(theirs, tmp_path))


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=f"{path}: does not read as safetensors"):
        load_weights(make_model("resnet20"), path)
    with pytest.raises(FileNotFoundError):
        load_weights(make_model("resnet20"), tmp_path / "absent.safetensors")
