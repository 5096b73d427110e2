"""Tar shards of images and their classes (WebDataset's format), at a URL or below the data root.

Opening reads the headers of every tar once, and keeps what it learnt below the data root; training reads each image by its range. An
epoch goes through the shards in a random order and mixes samples within a sliding window, so that reads stay close together, and the
order is a pure function: nothing needs to be remembered to go on in the middle of it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from powergrad.addresses import PORTS, AddressRefused, AllowList, target
from powergrad.data.decode import SUFFIXES
from powergrad.data.draws import Stream, hashes, integers
from powergrad.data.errors import DataError, DataMissing, DataUnreadable
from powergrad.data.folders import inside
from powergrad.data.images import Beat, Parts

SCHEMES = frozenset({"s3", "gs", "gcs", "az", "abfs", "http", "https"})
"""Where shards may lie, apart from below the data root."""
WINDOW = 4096
"""Samples that are mixed with one another, when nothing else is said."""
MAX_SHARDS = 100_000
MAX_CLASSES = 100_000
MAX_IMAGE_BYTES = 256 * 2**20
_MAX_LABEL_BYTES = 2**20
_INDEX_FOLDER, _INDEX_VERSION = ".index", 1
_THREADS = 16  # a shard's headers are a chain of small reads: it is their latency that costs
_READ_AHEAD = 256 * 2**10  # of small images it spans many, of ImageNet's (110 KB) two; a larger image costs one read
_TRIES, _FIRST_PAUSE_S = 4, 0.5  # a dropped connection must not end a training run
_COUNT = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER, _QUERY = re.compile(r"(?<=://)[^/\s@]*@"), re.compile(r"(://[^\s?'\"]*)\?[^\s'\")]*")
_LABELS = ("cls", "json")  # the first there is counts
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class _Members:
    """What is known of the samples of one shard, in its order; each (n,)."""

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Shards:
    """Samples of one split. Picklable; opens its connections in the process that reads."""

    urls: tuple[str, ...]
    shard: NDArray[np.int64]
    """(N,) which of the urls each sample lies in, rising."""
    members: _Members
    window: int

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.members.labels)

    @property
    def order(self) -> WindowedOrder:
        return WindowedOrder(self.shard, self.window)

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, place: int) -> str:
        """Shard and sample, for people: without what a URL holds of secrets."""
        return f"{shown(self.urls[self.shard[place]])}, sample {os.fsdecode(bytes(self.members.keys[place]))}"

    def fetch(self, index: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """All ranges are asked for at once; what fails is asked for again a few times."""
        places = list(index)
        for place, content in zip(places, self._read(places), strict=True):
            if isinstance(content, Exception):
                raise DataUnreadable(f"{self.name(place)}: cannot be read ({_told(content)})") from content
            if len(content) != self.members.sizes[place]:
                raise DataUnreadable(
                    f"{self.name(place)}: {len(content)} bytes came instead of {self.members.sizes[place]}: the shard has changed, or its "
                    "server ignores ranges"
                )
            yield self.name(place), content

    def names(self) -> Iterator[str]:
        called = ["/".join(PurePosixPath(urlsplit(url).path).parts[-2:]) for url in self.urls]
        return (f"{called[i]}, {os.fsdecode(bytes(key))}" for i, key in zip(self.shard.tolist(), self.members.keys, strict=True))

    def subset(self, index: Tensor) -> Shards:
        chosen = index.numpy()
        return replace(self, shard=self.shard[chosen], members=_chosen(self.members, chosen))

    def _read(self, places: list[int]) -> list[bytes | Exception]:
        read = [self._ranges(places)]
        for pause in (_FIRST_PAUSE_S * 2**i for i in range(_TRIES - 1)):
            again = [i for i, content in enumerate(read[0]) if isinstance(content, Exception) and _may_pass(content)]
            if not again:
                break
            time.sleep(pause)
            for i, content in zip(again, self._ranges([places[i] for i in again]), strict=True):
                read[0][i] = content
        return read[0]

    def _ranges(self, places: list[int]) -> list[bytes | Exception]:
        # found anew each time: fsspec keeps one instance a process, and a forked worker must not use its parent's
        filesystem = _filesystem(self.urls[0])[0]
        starts = self.members.offsets[places]
        paths = [filesystem._strip_protocol(self.urls[i]) for i in self.shard[places]]
        ends = (starts + self.members.sizes[places]).tolist()
        contents: list[bytes | Exception] = filesystem.cat_ranges(paths, starts.tolist(), ends, on_error="return")
        return contents


@dataclass(frozen=True)
class WindowedOrder:
    """Shards in a random order, and each sample moved ahead by less than `window` places."""

    shard: NDArray[np.int64]
    window: int

    def __call__(self, count: int, *, seed: int, epoch: int, device: torch.device | str) -> Tensor:
        shard = torch.from_numpy(self.shard)
        assert count == len(shard)
        sizes = torch.bincount(shard)
        turns = torch.argsort(hashes(torch.arange(len(sizes)), seed=seed, stream=Stream.SHARD_ORDER, epoch=epoch), stable=True)
        before = torch.empty_like(sizes)
        before[turns] = sizes[turns].cumsum(0) - sizes[turns]
        index = torch.arange(count)
        place = index - (sizes.cumsum(0) - sizes)[shard] + before[shard]
        # in whole numbers, so that every device and machine sorts alike: 2**20 steps a place, 2**62 are not reached
        moved = integers(index, 2**20, seed=seed, stream=Stream.SHARD_WINDOW, epoch=epoch) * self.window
        return torch.argsort(place * 2**20 + moved, stable=True).to(device)


def webdataset(
    train: str,
    val: str,
    test: str | None = None,
    *,
    data_root: Path,
    window: int = WINDOW,
    beat: Beat = lambda: None,
    schemes: frozenset[str] = SCHEMES,
) -> Parts:
    """The shards of each split: a URL or a path below the data root; `{000..146}` counts, `*` matches.

    A sample is an image (KEY.jpg, .png, .webp...) and its class, from 0 on, in KEY.cls or as `label` in KEY.json. Classes are as many as
    the training labels say, and named by their numbers.  `beat` is called about once a second.
    Raises DataMissing where nothing is found, DataUnreadable for what is refused or broken: it names shard and member.
    """
    opened = partial(_opened, data_root=data_root, window=window, beat=beat, schemes=schemes)
    training, held_out = opened(train), [opened(val), *([opened(test)] if test else [])]
    classes = int(training.members.labels.max()) + 1
    if classes < 2:
        raise DataMissing(f"{shown(train)}: every label is 0: at least 2 classes are needed")
    for split in held_out:
        if (strange := np.flatnonzero(split.members.labels >= classes)).size:
            label = split.members.labels[strange[0]]
            raise DataUnreadable(f"{split.name(int(strange[0]))}: class {label}, but the training labels end at {classes - 1}")
    return Parts(tuple(map(str, range(classes))), training, held_out[0], held_out[1] if test else None)


def _opened(pattern: str, *, data_root: Path, window: int, beat: Beat, schemes: frozenset[str]) -> Shards:
    urls = shard_urls(pattern, data_root=data_root, schemes=schemes)
    indexed = _all_indexed(urls, inside(data_root / _INDEX_FOLDER, data_root.resolve()), beat)
    shard = np.repeat(np.arange(len(urls)), [len(members.keys) for members in indexed])
    if len(shard) == 0:
        raise DataMissing(f"{shown(pattern)}: the shards hold no sample")
    members = _Members(*(np.concatenate([getattr(one, part) for one in indexed]) for part in ("keys", "offsets", "sizes", "labels")))
    return Shards(urls, shard, members, window)


def shard_urls(pattern: str, *, data_root: Path, schemes: frozenset[str] = SCHEMES) -> tuple[str, ...]:
    """What a pattern stands for: URLs, or absolute paths below the data root; sorted where it is `*` that finds them.

    Raises DataMissing, and DataUnreadable for a pattern that is refused.
    """
    scheme = _SCHEME.match(pattern)
    if "::" in pattern or (scheme and scheme[1].lower() not in schemes):
        raise DataUnreadable(
            f"{shown(pattern)}: must be a path below the data root, or a URL that starts with {', '.join(sorted(schemes))}; files of this "
            "machine are named by their path below the data root"
        )
    found = [url for counted in _counted(pattern) for url in (_remote(counted) if scheme else _local(counted, data_root))]
    packed = next((url for url in found if PurePosixPath(urlsplit(url).path).suffix.lower() in _COMPRESSED), None)
    if packed is not None:
        raise DataUnreadable(f"{shown(packed)}: compressed tars cannot be read by ranges: unpack it to a plain .tar")
    return tuple(found)


def shown(url: str) -> str:
    """The URL without user, password and query, which may be a signature."""
    if not _SCHEME.match(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _counted(pattern: str) -> list[str]:
    """`{08..11}` in full: 08, 09, 10, 11."""
    pieces = _COUNT.split(pattern)  # text, first, last, text, ...
    if any("{" in text or "}" in text for text in pieces[::3]):
        raise DataUnreadable(f"{shown(pattern)}: braces must hold two whole numbers, like {{000000..000146}}")
    ranges = [(int(first), int(last)) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    count = 1
    for first, last in ranges:
        count *= max(0, last - first + 1)
    if not 1 <= count <= MAX_SHARDS:
        raise DataUnreadable(f"{shown(pattern)}: counts {count:,} shards: must be 1 to {MAX_SHARDS:,}, from the lower number to the higher")
    # as a shell does it: a leading zero asks for numbers of one width
    widths = [max(map(len, pair)) if any(n[0] == "0" for n in pair) else 0 for pair in zip(pieces[1::3], pieces[2::3], strict=True)]
    numbers = [[f"{n:0{width}d}" for n in range(first, last + 1)] for (first, last), width in zip(ranges, widths, strict=True)]
    return ["".join(itertools.chain(*zip(pieces[::3], (*chosen, ""), strict=True))) for chosen in itertools.product(*numbers)]


def _local(pattern: str, data_root: Path) -> list[str]:
    root = data_root.resolve()
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise DataUnreadable(f"{pattern}: must be a path below the data root {root}, without ..")
    found = sorted(root.glob(pattern)) if "*" in pattern else [root / pattern]
    if not found:
        raise DataMissing(f"{pattern}: no file below {root} matches")
    for path in found:
        if not inside(path, root).exists():
            raise DataMissing(f"{pattern}: there is no file {path}")
        if not path.is_file():  # opening a pipe would wait for ever
            raise DataUnreadable(f"{path}: not a regular file")
    return [str(inside(path, root)) for path in found]


def _remote(url: str) -> list[str]:
    if "*" not in url:
        return [url]
    filesystem, path = _filesystem(url)
    found = _translated(url, lambda: sorted(filesystem.glob(path)))
    if not found:
        raise DataMissing(f"{shown(url)}: nothing there matches")
    return [filesystem.unstrip_protocol(match) for match in found[: MAX_SHARDS + 1]]


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    scheme = _SCHEME.match(url)
    if not scheme:
        return LocalFileSystem(), url
    try:
        found: tuple[AbstractFileSystem, str] = url_to_fs(url, **(_checking(url) if scheme[1].lower() in PORTS else {}))
    except ImportError as error:
        raise DataMissing(f"{shown(url)}: this scheme needs a package that is not installed ({error})") from error
    return found


def _checking(url: str) -> dict[str, Any]:
    """Options of a file system that calls only hosts which may be called, if the URL itself does not say already that its may not."""
    from powergrad.data import web  # here: it brings aiohttp, for which files of this machine need not wait

    try:
        allow = AllowList.of_environment()
        target(url, allow=allow, schemes=web.SCHEMES)
    except ValueError as error:
        raise DataUnreadable(f"{shown(url)}: refused ({error})") from error
    return {"get_client": web.CheckedClient(allow)}


def _refusal_behind(error: BaseException) -> AddressRefused | None:
    """The refusal that an error of aiohttp or fsspec was made of, if it was one."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, AddressRefused):
        seen = seen.__cause__ or seen.__context__
    return seen


def _translated(url: str, read: Callable[[], _Found]) -> _Found:
    """What it reads; errors of the far side as ours."""
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # each scheme's library has errors of its own
        if (refused := _refusal_behind(error)) is not None:
            raise DataUnreadable(f"{shown(url)}: refused ({refused})") from error
        if isinstance(error, FileNotFoundError):
            raise DataMissing(f"{shown(url)}: not found") from error
        raise DataUnreadable(f"{shown(url)}: cannot be read ({_told(error)})") from error


def _told(error: Exception) -> str:
    return _QUERY.sub(r"\1", _USER.sub("", str(error) or type(error).__name__))


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) and _refusal_behind(error) is None


def _all_indexed(urls: Sequence[str], folder: Path, beat: Beat) -> list[_Members]:
    with ThreadPoolExecutor(_THREADS) as pool:
        running: list[Future[_Members]] = [pool.submit(_indexed, url, folder) for url in urls]
        waiting = set(running)
        while waiting:
            done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            beat()
            if any(one.exception() for one in done):
                pool.shutdown(cancel_futures=True)
                break
    for one in running:
        if not one.cancelled() and (error := one.exception()):
            raise error
    return [one.result() for one in running]


def _indexed(url: str, folder: Path) -> _Members:
    """The samples of a shard, from what was kept of the last time if size and stamp are still the same."""
    filesystem, path = _filesystem(url)
    info: dict[str, Any] = _translated(url, lambda: filesystem.info(path))
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), None)
    if stamp is None:
        return _translated(url, lambda: _headers(filesystem, path, shown(url)))
    identity = json.dumps([_INDEX_VERSION, url, info["size"], stamp])
    kept = folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.npz"
    if (members := _kept(kept)) is None:
        members = _translated(url, lambda: _headers(filesystem, path, shown(url)))
        _keep(members, kept)
    return members


def _kept(path: Path) -> _Members | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _Members(arrays["keys"], arrays["offsets"], arrays["sizes"], arrays["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, or half written by a crash: read the shard again
        return None


def _keep(members: _Members, path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, keys=members.keys, offsets=members.offsets, sizes=members.sizes, labels=members.labels)
    aside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content.getvalue())
        aside.replace(path)
    except OSError:  # a read-only data root costs time, no more
        aside.unlink(missing_ok=True)


def _headers(filesystem: AbstractFileSystem, path: str, shard: str) -> _Members:
    with filesystem.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead") as file:
        try:
            return read_members(file, shard)
        except (tarfile.TarError, EOFError) as error:
            raise DataUnreadable(f"{shard}: not a whole tar ({error}): write it again") from error


def read_members(file: Any, shard: str) -> _Members:
    """file: seekable, of bytes.  Raises DataUnreadable naming `shard` and member, tarfile.TarError."""
    found: list[_Member] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in filter(_is_content, tar):
            found.append(_Member(info, *_split_name(info.name)))
            if found[-1].extension in _LABELS:  # now, while it lies in what was read ahead
                found[-1].content = _content(tar, info, shard)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes a broken header for the end
            last = found[-1].info.name if found else "its start"
            raise DataUnreadable(f"{shard}: cut short or broken after {last}, at byte {tar.offset}: write it again")
    samples = [_sample(shard, key, list(together)) for key, together in itertools.groupby(found, key=lambda member: member.key)]
    keys, offsets, sizes, labels = zip(*samples, strict=True) if samples else ((), (), (), ())
    numbers = (np.array(column, dtype=np.int64) for column in (offsets, sizes, labels))
    return _Members(np.array([os.fsencode(key) for key in keys], dtype=np.bytes_), *numbers)


@dataclass
class _Member:
    info: tarfile.TarInfo
    key: str
    extension: str
    content: bytes = b""
    """Of a label."""


def _is_content(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not PurePosixPath(member.name).name.startswith((".", "__"))


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, which is all that follows the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, shard: str) -> bytes:
    if info.size > _MAX_LABEL_BYTES:
        raise DataUnreadable(f"{shard}, {info.name}: {info.size:,} bytes: must be a class, of at most {_MAX_LABEL_BYTES:,}")
    file = tar.extractfile(info)
    assert file is not None, "a regular file"
    return file.read()


def _sample(shard: str, key: str, together: list[_Member]) -> tuple[str, int, int, int]:
    """Key, offset and size of the image, class."""
    images = [member.info for member in together if f".{member.extension}" in SUFFIXES]
    if len(images) != 1:
        endings = ", ".join(sorted(SUFFIXES))
        raise DataUnreadable(f"{shard}, sample {key}: {len(images)} images: must be one, of {endings}, beside its class")
    image = images[0]
    if image.sparse is not None or image.size > MAX_IMAGE_BYTES:
        raise DataUnreadable(f"{shard}, {image.name}: {image.size:,} bytes, or with holes: must be whole and at most {MAX_IMAGE_BYTES:,}")
    member = min((one for one in together if one.extension in _LABELS), key=lambda one: _LABELS.index(one.extension), default=None)
    if member is None:
        raise DataUnreadable(f"{shard}, sample {key}: no {key}.cls or {key}.json says its class; files of a sample must lie together")
    return key, image.offset_data, image.size, _label(member, shard)


def _label(member: _Member, shard: str) -> int:
    try:
        text = member.content.decode()
        label = json.loads(text)["label"] if member.extension == "json" else int(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        complaint = f"holds no class ({error}): must be a whole number, in json as label"
        raise DataUnreadable(f"{shard}, {member.info.name}: {complaint}") from error
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < MAX_CLASSES:
        raise DataUnreadable(f"{shard}, {member.info.name}: class {label}: must be a whole number from 0 to {MAX_CLASSES - 1:,}")
    return label


def _chosen(members: _Members, index: NDArray[np.int64]) -> _Members:
    return _Members(members.keys[index], members.offsets[index], members.sizes[index], members.labels[index])
