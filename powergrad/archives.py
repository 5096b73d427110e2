"""Archives of class folders, unpacked under limits, and the folders that come of it. Standard library only; no image is looked into.

    python -P -m powergrad.archives '{"archive": …, "into": …, "parent": …, "limits": {…}}'

is the short-lived process in which a server unpacks what strangers send: bounded in memory, processor time and file size, and killed with
its parent. It prints one JSON line: {"result": …} or {"refusal": {kind, entry, rule}}.

Only folders and images (by their suffix) are stored; hidden files and what else an archive holds are counted and left out. Names are
stored in Unicode's NFC, so that an archive made on a Mac and one made on Linux are the same set.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import resource
import shutil
import stat
import struct
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from powergrad.process import die_with_parent

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "val", "test")
TREE = "tree"
"""Below the directory of an upload: what was unpacked."""
MOST_PARTS = 16
LONGEST_PART_BYTES = 255  # of ext4, XFS and APFS
LONGEST_NAME_BYTES = 1024
MOST_NAMED = 100
BLOCK_BYTES = 1 << 20
TAR_BLOCK = tarfile.BLOCKSIZE
LONGEST_HEADER_BYTES = 1 << 16  # of a pax header or a long name: names have 1,024 bytes at most
LONGEST_PADDING_BYTES = 1 << 20
LONGEST_DIRECTORY_BYTES = 1 << 29  # of a zip file's central directory: a million names of 400 bytes
FREE_SPACE_EVERY_BYTES = 64 << 20
RATIO_FREE_BYTES = 64 << 20  # so much may come out of any archive: a small drawing compresses a thousandfold
NICE = 10
MEMORY_BYTES = 3 << 30  # a zip file with a million entries takes 0.9 GiB (measured)
OPEN_FILES = 64

# what the standard library's readers raise on files that are cut short or are not what they say
BROKEN = (
    OSError, EOFError, ValueError, KeyError, IndexError, OverflowError, NotImplementedError, RuntimeError, struct.error, zlib.error,
    lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip


class ArchiveError(Exception):
    """Base of what can be wrong. entry: the name in the archive, "" for all of it; rule: what is broken, and the way out.

    ArchiveError
    ├── BadArchive     broken, hostile, or not class folders
    ├── TooLarge       more entries or bytes than are accepted
    └── DiskFull
    """

    kind = "bad_archive"

    def __init__(self, entry: str, rule: str) -> None:
        self.entry, self.rule = shown(entry), rule
        super().__init__(f"{self.entry}: {rule}" if entry else rule)


class BadArchive(ArchiveError):
    pass


class TooLarge(ArchiveError):
    kind = "too_large"


class DiskFull(ArchiveError):
    kind = "storage_full"


@dataclass(frozen=True)
class Limits:
    """entries: files and folders.  bytes: of all files, unpacked.  ratio: of unpacked to packed, beyond the first RATIO_FREE_BYTES.

    min_free_bytes: what must stay free on the disk.
    """

    entries: int = 1_000_000
    bytes: int = 64 << 30
    ratio: float = 200.0
    min_free_bytes: int = 0
    cpu_s: int = 3600


@dataclass(frozen=True)
class Unpacked:
    """What came of an archive. left_out: files that are no images, the first MOST_NAMED by name."""

    version: str
    files: int
    bytes: int
    left_out: int
    left_out_first: list[str]


def shown(name: str) -> str:
    """A name as it can be put into a message: one line, not too long."""
    clean = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in name)
    return clean if len(clean) <= 200 else clean[:200] + "…"


# --- a set that lies in a folder


@dataclass(frozen=True)
class Found:
    """A folder or an image of a set. name: relative, `/`-separated. status: None of a folder."""

    name: str
    status: os.stat_result | None


def walk(folder: Path) -> Iterator[Found]:
    """The folders and images of a set as training finds them: hidden ones left out, links followed to class folders and files only."""
    yield from _walk(str(folder), "", depth=2 if is_split(folder) else 1)


def is_split(folder: Path) -> bool:
    """Whether train/ and val/ hold the class folders."""
    return (folder / "train").is_dir() and (folder / "val").is_dir()


def _walk(folder: str, prefix: str, *, depth: int) -> Iterator[Found]:
    """depth: so many levels down, folders may be links."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=depth > 0):
            yield Found(name, None)
            yield from _walk(entry.path, name + "/", depth=depth - 1)
        elif is_image(entry.name) and entry.is_file():
            yield Found(name, entry.stat())


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def version_of(folders: Iterable[str], images: Iterable[tuple[str, str]]) -> str:
    """What is in a set, as `sha256:…` of its names and of every image's own SHA-256 (hex)."""
    lines = [(name, f"{name}/\0") for name in folders] + [(name, f"{name}\0{digest}\0") for name, digest in images]
    whole = hashlib.sha256()
    for _, line in sorted(lines):
        whole.update(line.encode(errors="surrogateescape"))
    return f"sha256:{whole.hexdigest()}"


def stamp_of(folder: Path) -> str:
    """What can be seen of a set without reading it: SHA-256 of names, sizes and times of change. Raises OSError."""
    seen = hashlib.sha256()
    for found in walk(folder):
        facts = "" if found.status is None else f"{found.status.st_size}\0{found.status.st_mtime_ns}"
        seen.update(f"{found.name}\0{facts}\0".encode(errors="surrogateescape"))
    return seen.hexdigest()


# --- unpacking


def unpack(archive: Path, into: Path, limits: Limits) -> Unpacked:
    """Unpack class folders to `into`/tree, which must not exist. Raises ArchiveError, and then nothing of it is left there."""
    unpacked = into / "unpacked"
    unpacked.mkdir(parents=True)
    try:
        taken = _Taken(unpacked, limits, packed_bytes=archive.stat().st_size)
        with archive.open("rb") as file:
            _READERS[_kind_of(file)](file, taken)
        return taken.settle(into / TREE)
    except MemoryError:
        raise BadArchive("", "takes more memory to unpack than any archive of images needs") from None
    except OSError as error:
        raise _of_disk(error) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _of_disk(error: OSError) -> ArchiveError:
    full = error.errno in (28, 122)  # ENOSPC, EDQUOT
    return (
        DiskFull("", "no space is left on the disk: delete jobs or data")
        if full
        else BadArchive("", f"cannot be unpacked ({error.strerror or error})")
    )


class _Taken:
    """What has been taken from an archive so far: every entry is first admitted, then stored."""

    def __init__(self, root: Path, limits: Limits, *, packed_bytes: int) -> None:
        self.limits, self.packed_bytes = limits, packed_bytes
        self._root = str(root)
        self._entries = self._bytes = self._written = self._stored_bytes = 0
        self._spelled: dict[str, str] = {}  # folded name -> name
        self._folders: set[str] = set()
        self._made: set[str] = set()
        self._images: list[tuple[str, str]] = []
        self._left_out: list[str] = []
        self._left_out_count = 0

    def count(self) -> None:
        """One more entry of any kind. Raises TooLarge."""
        self._entries += 1
        if self._entries > self.limits.entries:
            raise TooLarge("", f"more than {self.limits.entries:,} entries: split the set, or register a folder")

    def admit(self, raw: str, *, is_folder: bool, size: int) -> str | None:
        """The name it is to be stored under; None if it is left out. size: what the archive says. Raises ArchiveError."""
        self.count()
        self._bytes += size
        if self._bytes > self.limits.bytes:
            raise TooLarge(raw, f"more than {self.limits.bytes:,} bytes come out of the archive: split the set, or register a folder")
        self.check_ratio(self._bytes, raw)
        parts = parts_of(raw)
        if not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return None
        name = "/".join(parts)
        self._claim(name, raw, is_folder=is_folder)
        if is_folder or is_image(name):
            return name
        self._left_out_count += 1
        if len(self._left_out) < MOST_NAMED:
            self._left_out.append(name)
        return None

    def check_ratio(self, size: int, entry: str = "") -> None:
        """Raises BadArchive when so many bytes are too many to come out of this archive."""
        if size > RATIO_FREE_BYTES and size > self.limits.ratio * self.packed_bytes:
            raise BadArchive(entry, f"unpacks to more than {self.limits.ratio:g} times its size, as no archive of images does")

    def _claim(self, name: str, raw: str, *, is_folder: bool) -> None:
        """Refuse what some file system could not tell from what is there."""
        if is_folder and name in self._folders:
            return
        parent = name.rpartition("/")[0]
        if parent and parent not in self._folders:
            self._claim(parent, raw, is_folder=True)
        folded = _folded(name)
        earlier = self._spelled.setdefault(name if folded == name else folded, name)
        if earlier is not name and earlier != name:
            raise BadArchive(raw, f"differs from {shown(earlier)!r} only in case or in how Unicode spells it: rename one of them")
        if earlier is not name:
            raise BadArchive(raw, "is there twice: leave one out")
        if is_folder:
            self._folders.add(name)

    def make_folder(self, name: str) -> None:
        if name and name not in self._made:
            self.make_folder(name.rpartition("/")[0])
            os.mkdir(f"{self._root}/{name}", 0o755)
            self._made.add(name)

    def store(self, name: str, size: int, blocks: Iterable[bytes]) -> None:
        """Write an image. size: what it must have. Raises BadArchive, DiskFull, OSError."""
        self.make_folder(name.rpartition("/")[0])
        digest, written = hashlib.sha256(), 0
        descriptor = os.open(f"{self._root}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
                written += len(block)
                self._watch_space(len(block))
        if written != size:
            raise BadArchive(name, f"has {written:,} bytes where the archive says {size:,}")
        self._images.append((name, digest.hexdigest()))
        self._stored_bytes += size

    def _watch_space(self, written: int) -> None:
        before, self._written = self._written, self._written + written
        if before // FREE_SPACE_EVERY_BYTES == self._written // FREE_SPACE_EVERY_BYTES and before:
            return
        if shutil.disk_usage(self._root).free < self.limits.min_free_bytes:
            raise DiskFull("", f"less than {self.limits.min_free_bytes:,} bytes are free on the disk: delete jobs or data")

    def settle(self, tree: Path) -> Unpacked:
        """Move the class folders to `tree`, without a single folder around them. Raises BadArchive where there are none."""
        names = [name for name, _ in self._images]
        wrapper = _wrapper(self._made, names)
        cut = len(wrapper) + 1 if wrapper else 0
        images = [(name[cut:], digest) for name, digest in self._images]
        folders = [name[cut:] for name in self._made if name != wrapper]
        _check_layout(set(folders), [name for name, _ in images], left_out=self._left_out)
        os.rename(f"{self._root}/{wrapper}" if wrapper else self._root, tree)
        return Unpacked(version_of(folders, images), len(images), self._stored_bytes, self._left_out_count, self._left_out)


def parts_of(raw: str) -> list[str]:
    """A name's parts, in NFC. Raises BadArchive for one that could mean anything but a file below the folder it is unpacked to."""
    for wrong, rule in (
        ("\\" in raw, "has a backslash: names must be separated by /"),
        (raw.startswith("/"), "is an absolute name: pack the folder by a relative one"),
        (re.match(r"[A-Za-z]:", raw) is not None, "begins with a drive letter: pack the folder by a relative name"),
        (_has_odd_characters(raw), "has control characters, or is not Unicode: rename it"),
    ):
        if wrong:
            raise BadArchive(raw, rule)
    parts = [part for part in unicodedata.normalize("NFC", raw).split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BadArchive(raw, "leads upwards (..): pack the folder by a relative name")
    if len(parts) > MOST_PARTS:
        raise BadArchive(raw, f"lies {len(parts) - 1} folders deep, of at most {MOST_PARTS - 1}")
    if any(len(part.encode()) > LONGEST_PART_BYTES for part in parts) or sum(len(part.encode()) + 1 for part in parts) > LONGEST_NAME_BYTES:
        raise BadArchive(raw, f"is too long: {LONGEST_PART_BYTES} bytes a name, {LONGEST_NAME_BYTES:,} in all")
    return parts


def _has_odd_characters(name: str) -> bool:
    """Control characters, line breaks, halves of surrogate pairs, and what turns the direction of writing round."""
    return not (name.isascii() and name.isprintable()) and any(
        unicodedata.category(one) in {"Cc", "Cs", "Zl", "Zp"} or "\u202a" <= one <= "\u202e" or "\u2066" <= one <= "\u2069" for one in name
    )


def _folded(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())


def _wrapper(folders: set[str], images: list[str]) -> str:
    """The single folder that everything lies in, if it holds folders and no image; else ""."""
    tops = {name.partition("/")[0] for name in folders}
    if len(tops) != 1 or any("/" not in name for name in images):
        return ""
    (top,) = tops
    holds_images = any(name.count("/") == 1 for name in images)
    return "" if holds_images or folders == {top} else top


def _check_layout(folders: set[str], images: list[str], *, left_out: list[str]) -> None:
    """Raises BadArchive that says what was found instead of class folders."""
    wanted = "put a folder per class at the top, or train/ and val/ (and test/) with a folder per class in each"
    if not images:
        other = f"; it holds {shown(left_out[0])!r}, for one" if left_out else ""
        raise BadArchive("", f"holds no image ({', '.join(sorted(SUFFIXES))}){other}: {wanted}")
    tops = {name for name in folders if "/" not in name}
    loose = next((name for name in images if "/" not in name), None)
    if loose is not None:
        raise BadArchive(loose, f"lies in no class folder: {wanted}")
    if "train" in tops and "val" in tops:
        in_split = next((name for name in images if name.count("/") == 1), None)
        if in_split is not None:
            where = "lies in no class folder" if in_split.partition("/")[0] in SPLITS else "lies in a folder beside train/ and val/"
            raise BadArchive(in_split, f"{where}: {wanted}")
        beside = next((name for name in images if name.partition("/")[0] not in SPLITS), None)
        if beside is not None:
            raise BadArchive(beside, f"lies beside train/ and val/: {wanted}")
    elif tops <= {*SPLITS, "valid", "validation", "training", "testing"}:
        raise BadArchive("", f"found {', '.join(f'{name}/' for name in sorted(tops))}: {wanted}")


# --- kinds of archives


def _kind_of(file: IO[bytes]) -> str:
    """By its first bytes, as the formats' specifications give them. Raises BadArchive."""
    head = file.read(TAR_BLOCK)
    file.seek(0)
    for magic, kind in ((b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"\x1f\x8b", "gz"), (b"BZh", "bz2"), (b"\xfd7zXZ\x00", "xz")):
        if head.startswith(magic):
            return kind
    if not head:
        raise BadArchive("", "is empty: send a zip or tar file")
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise BadArchive("", "is compressed with zstd, which is not read here: use gzip, or none")
    if head[257:262] == b"ustar" or not any(head) or _is_old_tar(head):
        return "tar"
    raise BadArchive("", "is neither a zip nor a tar file (plain, gzip, bzip2 or xz)")


def _is_old_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _read_zip(file: IO[bytes], taken: _Taken) -> None:
    _check_claims(file, taken.limits)
    try:
        archive = zipfile.ZipFile(file)
    except BROKEN as error:
        raise BadArchive("", _broken(error)) from error
    with archive:
        entries = archive.infolist()
        _refuse_overlaps(entries, archive.start_dir)
        admitted = [(info, _admitted(info, taken)) for info in entries]  # all of them before the first byte is unpacked
        for info, name in admitted:
            if name is None:
                continue
            if info.is_dir():
                taken.make_folder(name)
            else:
                taken.store(name, info.file_size, _zip_blocks(archive, info))


def _check_claims(file: IO[bytes], limits: Limits) -> None:
    """Refuse a zip file by what its end says of it, before its directory is read into memory. Raises TooLarge."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - (1 << 16) - 22)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    file.seek(0)
    if end < 0 or len(tail) - end < 22:
        return  # zipfile says what is wrong
    count, directory_bytes = struct.unpack_from("<HL", tail, end + 10)
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":  # zip64: APPNOTE.TXT 4.3.14
        (offset,) = struct.unpack_from("<Q", tail, end - 12)
        file.seek(min(offset, size))
        record = file.read(56)
        file.seek(0)
        if len(record) == 56:
            count, directory_bytes = struct.unpack_from("<QQ", record, 32)
    if count > limits.entries or directory_bytes > LONGEST_DIRECTORY_BYTES:
        raise TooLarge("", f"{count:,} entries, of at most {limits.entries:,}: split the set, or register a folder")


def _refuse_overlaps(entries: list[zipfile.ZipInfo], directory_at: int) -> None:
    """A bomb has its entries share their bytes. Raises BadArchive."""
    end, before = 0, ""
    for info in sorted(entries, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise BadArchive(info.filename, f"shares bytes with {shown(before)!r}, as no honest archive does")
        end, before = info.header_offset + 30 + info.compress_size, info.filename  # 30: the local header, its name and extra left out
    if end > directory_at:
        raise BadArchive(before, "reaches into the archive's directory")


def _admitted(info: zipfile.ZipInfo, taken: _Taken) -> str | None:
    if not info.filename or "\0" in info.orig_filename:
        raise BadArchive(info.orig_filename, "has a NUL in its name" if info.orig_filename else "an entry has no name")
    if info.flag_bits & 0x41:
        raise BadArchive(info.filename, "is encrypted: pack it without a password")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadArchive(info.filename, f"is a {_SPECIAL.get(kind, 'special file')}: only files and folders are unpacked")
    if info.is_dir() and info.file_size:
        raise BadArchive(info.filename, "is a folder with content")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        raise BadArchive(info.filename, f"is compressed by method {info.compress_type}, which is not read here: use deflate")
    return taken.admit(info.filename, is_folder=info.is_dir(), size=info.file_size)


_SPECIAL = {
    stat.S_IFLNK: "link", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket",
}  # fmt: skip


def _zip_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(info) as file:
            while block := file.read(BLOCK_BYTES):  # its CRC is compared at its end
                yield block
    except BROKEN as error:
        raise BadArchive(info.filename, _broken(error)) from error


def _broken(error: Exception) -> str:
    """What a reader stumbled over, and what to do about it."""
    told = str(error)
    if isinstance(error, EOFError) or told == "File is not a zip file":
        return "is cut off: send the whole archive"
    if isinstance(error, gzip.BadGzipFile):
        return "has something else behind its end: pack it anew"
    return f"is broken: {error}"


@dataclass
class _Stream:
    """An unpacked tar file, read from front to end."""

    file: IO[bytes]
    taken: _Taken
    done: int = 0
    at: str = field(default="")

    def read(self, size: int) -> bytes:
        """As many bytes, fewer at the end. Raises BadArchive."""
        try:
            data = self.file.read(size)
        except BROKEN as error:
            raise BadArchive(self.at, _broken(error)) from error
        self.done += len(data)
        self.taken.check_ratio(self.done, self.at)
        return data

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) != size:
            raise BadArchive(self.at, "is cut off: send the whole archive")
        return data

    def blocks(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes; then comes the next header."""
        for left in range(size, 0, -BLOCK_BYTES):
            yield self.exactly(min(left, BLOCK_BYTES))
        self.exactly(-size % TAR_BLOCK)


def _read_tar(file: IO[bytes], taken: _Taken) -> None:
    """tarfile parses headers; it does not read the archive, because it takes a broken header for the end and keeps long ones in memory."""
    stream = _Stream(file, taken)
    long_name: str | None = None
    pax: dict[str, str] = {}
    while (info := _next_header(stream)) is not None:
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            taken.count()
            text = _extension(stream, info)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type != tarfile.XGLTYPE:  # a global header may hold a comment, and nothing that counts here
                pax |= _pax_records(text)
            continue
        name, size = pax.get("path", long_name or info.name), int(pax.get("size", info.size))
        long_name, pax = None, {}
        _take(stream, taken, info, name, size)


def _take(stream: _Stream, taken: _Taken, info: tarfile.TarInfo, name: str, size: int) -> None:
    stream.at = name
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise BadArchive(name, f"is a {_TAR_TYPES.get(info.type, 'special file')}: only files and folders are unpacked")
    if size < 0 or (info.isdir() and size):
        raise BadArchive(name, f"has an impossible size ({size:,} bytes)")
    stored_as = taken.admit(name, is_folder=info.isdir(), size=size)
    if stored_as is None:
        for _ in stream.blocks(size):
            pass
    elif info.isdir():
        taken.make_folder(stored_as)
    else:
        taken.store(stored_as, size, stream.blocks(size))


_TAR_TYPES = {
    tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link", tarfile.GNUTYPE_LONGLINK: "link", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe", tarfile.GNUTYPE_SPARSE: "sparse file",
}  # fmt: skip


def _next_header(stream: _Stream) -> tarfile.TarInfo | None:
    """None at the archive's end. Raises BadArchive."""
    header = stream.exactly(TAR_BLOCK)
    if not any(header):
        _expect_padding(stream)
        return None
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        where = f"after {stream.at!r}" if stream.at else "at its beginning"
        raise BadArchive("", f"has a broken header {shown(where)} ({error})") from error


def _expect_padding(stream: _Stream) -> None:
    """Zeros, and the end of the compressed stream with its checksum."""
    stream.at, read = "", 0
    while block := stream.read(BLOCK_BYTES):
        read += len(block)
        if any(block) or read > LONGEST_PADDING_BYTES:
            raise BadArchive("", "goes on after its end: pack everything into one archive")


def _extension(stream: _Stream, info: tarfile.TarInfo) -> bytes:
    if not 0 <= info.size <= LONGEST_HEADER_BYTES:
        raise BadArchive(info.name, f"is a header of {info.size:,} bytes, of at most {LONGEST_HEADER_BYTES:,}")
    return b"".join(stream.blocks(info.size))


def _pax_records(text: bytes) -> dict[str, str]:
    """`path` and `size` of an extended header: lines of "LENGTH KEY=VALUE". Raises BadArchive."""
    found: dict[str, str] = {}
    while text:
        length = re.match(rb"(\d{1,8}) ", text)
        record = text[: int(length[1])] if length else b""
        if length is None or len(record) <= length.end() or not record.endswith(b"\n"):
            raise BadArchive("", "has a broken extended header")
        key, _, value = record[length.end() : -1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise BadArchive(value.decode("utf-8", "replace"), "is a sparse file: pack it without --sparse")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                raise BadArchive("", "has an impossible size in an extended header")
            found["size"] = value.decode()
        text = text[len(record) :]
    return found


def _decompressed(opened: Callable[[IO[bytes]], Any]) -> Callable[[IO[bytes], _Taken], None]:
    def read(file: IO[bytes], taken: _Taken) -> None:
        with opened(file) as inner:
            _read_tar(inner, taken)

    return read


_READERS: dict[str, Callable[[IO[bytes], _Taken], None]] = {
    "zip": _read_zip,
    "tar": _read_tar,
    "gz": _decompressed(lambda file: gzip.GzipFile(fileobj=file, mode="rb")),
    "bz2": _decompressed(bz2.BZ2File),
    "xz": _decompressed(lzma.LZMAFile),
}


# --- packing


def packed(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> Iterator[bytes]:
    """The set in a folder as a tar file, made as it is read; the same files give the same bytes.

    on_progress: called with (bytes of images read, of all). Raises OSError, and BadArchive for a file that changes meanwhile.
    """
    everything = list(walk(folder))
    total, done = sum(found.status.st_size for found in everything if found.status), 0
    for found in everything:
        info = tarfile.TarInfo(unicodedata.normalize("NFC", found.name))
        if found.status is None:
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            yield info.tobuf(tarfile.PAX_FORMAT)
            continue
        info.size = found.status.st_size
        yield info.tobuf(tarfile.PAX_FORMAT)
        for block in _blocks(folder / found.name, info.size):
            yield block
            done += len(block)
            if on_progress is not None:
                on_progress(done, total)
        if padding := -info.size % TAR_BLOCK:
            yield bytes(padding)
    yield bytes(2 * TAR_BLOCK)


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        left = size
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            left -= len(block)
            yield block
        if left or file.read(1):
            raise BadArchive(str(path), "changed while it was read: try again when nothing writes to it")


# --- the process


def main(config_json: str) -> int:
    config = json.loads(config_json)
    die_with_parent(config["parent"])
    limits = Limits(**config["limits"])
    _limit(limits)
    try:
        done = unpack(Path(config["archive"]), Path(config["into"]), limits)
        os.sync()  # what is answered for survives a power cut
        answer: dict[str, Any] = {"result": vars(done)}
    except ArchiveError as error:
        answer = {"refusal": {"kind": error.kind, "entry": error.entry, "rule": error.rule}}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _limit(limits: Limits) -> None:
    """Memory, processor time, file size, open files; no core file. A limit that is lower already stays."""
    os.nice(NICE)
    wanted = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
