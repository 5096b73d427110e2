"""Unpacking: what an honest archive becomes, and every way a dishonest one is refused, with nothing left behind."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import struct
import subprocess
import sys
import tarfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powergrad import archives
from powergrad.archives import ArchiveError, BadArchive, Limits, TooLarge, Unpacked, packed, stamp_of, unpack, walk
from powergrad.data import decode

FLOWERS = {"rose/1.png": b"one", "rose/2.jpg": b"two", "tulip/1.png": b"three"}
Entry = tuple[str, bytes] | tarfile.TarInfo | zipfile.ZipInfo
MINUTES = float(os.environ.get("POWERGRAD_FUZZ_MINUTES", "0"))


def zipped(entries: dict[str, bytes] | list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, content)
    return out.getvalue()


def tarred(entries: dict[str, bytes] | list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for given_as, content in entries.items() if isinstance(entries, dict) else entries:
            info = tarfile.TarInfo(given_as) if isinstance(given_as, str) else given_as
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def unpacked(content: bytes, folder: Path, **limits: Any) -> Unpacked:
    """Unpack to `folder`/new, which stands in an otherwise empty folder. Nothing may ever be outside, nor be left by a refusal."""
    (folder / "archive").write_bytes(content)
    before = {name for name in everything(folder) if not name.startswith("new")}
    try:
        done = unpack(folder / "archive", folder / "new", Limits(**limits))
    except ArchiveError:
        assert everything(folder / "new") == set()
        raise
    finally:
        assert {name for name in everything(folder) if not name.startswith("new")} == before
    return done


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def files(folder: Path) -> dict[str, bytes]:
    tree = folder / "new" / "tree"
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


KINDS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zipped,
    "stored zip": lambda entries: zipped(entries, zipfile.ZIP_STORED),
    "bzip2 zip": lambda entries: zipped(entries, zipfile.ZIP_BZIP2),
    "lzma zip": lambda entries: zipped(entries, zipfile.ZIP_LZMA),
    "pax tar": tarred,
    "gnu tar": lambda entries: tarred(entries, tarfile.GNU_FORMAT),
    "ustar tar": lambda entries: tarred(entries, tarfile.USTAR_FORMAT),
    "tar.gz": lambda entries: gzip.compress(tarred(entries)),
    "tar.bz2": lambda entries: bz2.compress(tarred(entries)),
    "tar.xz": lambda entries: lzma.compress(tarred(entries)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_archive_gives_the_same_set(kind: str, tmp_path: Path) -> None:
    done = unpacked(KINDS[kind](FLOWERS), tmp_path)
    assert files(tmp_path) == FLOWERS
    assert (done.files, done.bytes, done.left_out) == (3, 11, 0)
    assert done.version == archives.version_of(
        ["rose", "tulip"], [(name, hashlib.sha256(content).hexdigest()) for name, content in FLOWERS.items()]
    )


def test_the_suffixes_are_those_that_training_reads() -> None:
    assert archives.SUFFIXES == decode.SUFFIXES


@pytest.mark.parametrize("kind", ["zip", "pax tar", "gnu tar"])
def test_long_and_foreign_names_survive(kind: str, tmp_path: Path) -> None:
    entries = {f"{'ä' * 100}/{'b' * 180}.png": b"x", f"日本語/{'c' * 60}.png": b"y"}
    unpacked(KINDS[kind](entries), tmp_path)
    assert files(tmp_path) == entries


def test_a_single_folder_around_everything_is_taken_off(tmp_path: Path) -> None:
    done = unpacked(zipped({f"flowers/{name}": content for name, content in FLOWERS.items()}), tmp_path)
    assert files(tmp_path) == FLOWERS
    (tmp_path / "plain").mkdir()
    assert done.version == unpacked(tarred(FLOWERS), tmp_path / "plain").version


def test_a_single_class_is_no_wrapper(tmp_path: Path) -> None:
    unpacked(zipped({"rose/1.png": b"x"}), tmp_path)
    assert files(tmp_path) == {"rose/1.png": b"x"}


def test_splits_are_kept(tmp_path: Path) -> None:
    entries = {f"{split}/{name}": content for split in ("train", "val", "test") for name, content in FLOWERS.items()}
    unpacked(zipped({f"wrapped/{name}": content for name, content in entries.items()}), tmp_path)
    assert files(tmp_path) == entries


def test_hidden_files_and_what_is_no_image_are_left_out(tmp_path: Path) -> None:
    odd = {"__MACOSX/rose/._1.png": b"m", "rose/.DS_Store": b"d", ".git/HEAD.png": b"g", "README.md": b"r", "rose/model.pt": b"p"}
    done = unpacked(zipped(FLOWERS | odd), tmp_path)
    assert files(tmp_path) == FLOWERS
    assert (done.left_out, done.left_out_first) == (2, ["README.md", "rose/model.pt"])


def test_an_empty_class_folder_is_part_of_the_set(tmp_path: Path) -> None:
    for name, entries in (("with", [*FLOWERS.items(), ("daisy/", b"")]), ("without", list(FLOWERS.items()))):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.version").write_text(unpacked(zipped(list(entries)), tmp_path / name).version)
    assert (tmp_path / "with/new/tree/daisy").is_dir()
    assert (tmp_path / "with.version").read_text() != (tmp_path / "without.version").read_text()


def test_the_version_moves_with_every_name_and_byte(tmp_path: Path) -> None:
    sets = [FLOWERS, FLOWERS | {"rose/1.png": b"ome"}, FLOWERS | {"rose/3.png": b"one"}, {"rosa/1.png": b"one", **FLOWERS}]
    found = set()
    for number, entries in enumerate(sets):
        (tmp_path / str(number)).mkdir()
        found.add(unpacked(tarred(entries), tmp_path / str(number)).version)
    assert len(found) == len(sets)


def test_names_are_stored_composed_whatever_machine_packed_them(tmp_path: Path) -> None:
    unpacked(tarred({unicodedata.normalize("NFD", "é/ü.png"): b"x", "b/1.png": b"y"}), tmp_path)
    assert files(tmp_path) == {"b/1.png": b"y", "é/ü.png": b"x"}


HOSTILE_NAMES = {
    "../rose/1.png": "upwards",
    "rose/../../1.png": "upwards",
    "/etc/1.png": "absolute",
    "//host/share/1.png": "absolute",
    "C:/rose/1.png": "drive",
    "c:1.png": "drive",
    "rose\\..\\1.png": "backslash",
    "rose/\n.png": "control",
    "rose/\x1b[31m.png": "control",
    "rose/\u202egnp.png": "control",
    "rose/" + "a" * 256 + ".png": "too long",
    "/".join(["a" * 200] * 6) + ".png": "too long",
    "/".join(["a"] * 17) + ".png": "deep",
}


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_could_lead_elsewhere_are_refused(name: str, make: Callable[[Any], bytes], tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match=HOSTILE_NAMES[name]) as refused:
        unpacked(make(FLOWERS | {name: b"x"}), tmp_path)
    assert refused.value.entry.startswith(name[:4].replace("\n", "\ufffd").replace("\x1b", "\ufffd"))


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize(
    "twin", ["ROSE/1.png", "rose/1.PNG", "Rose/9.png", "\N{LATIN SMALL LETTER LONG S}", "tulip/1.png/2.png", "rose/1.png"]
)
def test_twins_are_refused(twin: str, make: Callable[[Any], bytes], tmp_path: Path) -> None:
    name = "roſe/1.png" if twin.startswith("ſ") else twin
    with pytest.raises(BadArchive, match=r"differs from|there twice|is there"):
        unpacked(make([*FLOWERS.items(), (name, b"x")]), tmp_path)


def test_two_spellings_of_one_name_are_twins(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="there twice"):
        unpacked(tarred({"é/1.png": b"x", "e\u0301/1.png": b"y", "b/1.png": b"z"}), tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        special("rose/evil.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("rose/evil.png", tarfile.LNKTYPE, "rose/1.png"),
        special("rose", tarfile.SYMTYPE, "/tmp"),
        special("rose/evil.png", tarfile.CHRTYPE),
        special("rose/evil.png", tarfile.BLKTYPE),
        special("rose/evil.png", tarfile.FIFOTYPE),
        special("rose/evil.png", tarfile.GNUTYPE_SPARSE),
        special("rose/evil.png", b"V"),
    ],
    ids=["symbolic", "hard", "folder", "character", "block", "pipe", "sparse", "volume"],
)
def test_links_devices_and_the_like_are_refused(entry: tarfile.TarInfo, tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match=r"only files and folders|sparse"):
        unpacked(tarred([(entry, b""), *FLOWERS.items()]), tmp_path)


def test_a_sparse_file_by_pax_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("rose/big.png")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "rose/big.png",
        "GNU.sparse.realsize": "9" * 15,
    }
    with pytest.raises(BadArchive, match="sparse"):
        unpacked(tarred([(info, b"x")]), tmp_path)


def test_links_in_zip_files_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("rose/evil.png")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(BadArchive, match="is a link"):
        unpacked(zipped([*FLOWERS.items(), (info, b"/etc/passwd")]), tmp_path)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    content = bytearray(zipped({"a/1.png": b"x", "b/1.png": b"y"}, zipfile.ZIP_STORED))
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    with pytest.raises(BadArchive, match="encrypted"):
        unpacked(bytes(content), tmp_path)


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    content = zipped({"a/1.png": b"precious", "b/1.png": b"y"}, zipfile.ZIP_STORED).replace(b"precious", b"previous")
    with pytest.raises(BadArchive, match=r"a/1.png: is broken"):
        unpacked(content, tmp_path)


def test_a_nul_in_a_name_is_refused(tmp_path: Path) -> None:
    content = zipped({"a/1.pngX.txt": b"x", "b/1.png": b"y"}).replace(b"a/1.pngX", b"a/1.png\0")
    with pytest.raises(BadArchive, match="NUL"):
        unpacked(content, tmp_path)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """As in D. Fifield, A better zip bomb (2019): every entry of the directory names the same bytes."""
    content = zipped({"a/1.png": b"x" * 1000, "b/1.png": b"y" * 1000}, zipfile.ZIP_STORED)
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content = content[: second + 42] + struct.pack("<L", 0) + content[second + 46 :]
    with pytest.raises(BadArchive, match="shares bytes"):
        unpacked(content, tmp_path)


@pytest.mark.parametrize("pack", [zipped, lambda entries: gzip.compress(tarred(entries))])
def test_a_bomb_is_refused_before_it_goes_off(pack: Callable[[Any], bytes], tmp_path: Path) -> None:
    content = pack({"a/1.bmp": bytes(80 << 20), "b/1.png": b"x"})
    assert len(content) < 1 << 20
    with pytest.raises(BadArchive, match="200 times"):
        unpacked(content, tmp_path)


def test_a_bomb_in_a_file_that_is_left_out_is_refused_too(tmp_path: Path) -> None:
    content = bz2.compress(tarred([("a/1.png", b"x"), ("b/1.png", b"y"), ("notes.txt", bytes(80 << 20))]))
    with pytest.raises(BadArchive, match="200 times"):
        unpacked(content, tmp_path)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_limits_on_count_and_bytes_are_told_apart(pack: Callable[[Any], bytes], tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="2"):
        unpacked(pack(FLOWERS), tmp_path, entries=2)
    with pytest.raises(TooLarge, match="10 bytes"):
        unpacked(pack(FLOWERS), tmp_path, bytes=10)
    unpacked(pack(FLOWERS), tmp_path, bytes=11, entries=3)


def test_a_disk_that_is_too_full_is_no_fault_of_the_archive(tmp_path: Path) -> None:
    with pytest.raises(archives.DiskFull):
        unpacked(zipped(FLOWERS), tmp_path, min_free_bytes=1 << 60)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"1.png": b"x", "a/1.png": b"y"}, "1.png: lies in no class folder"),
        ({"train/1.png": b"x", "val/a/1.png": b"y"}, "train/1.png: lies in no class folder"),
        ({"rose/1.png": b"x", "train/a/1.png": b"y", "val/a/1.png": b"z"}, "rose/1.png: lies in a folder beside train/ and val/"),
        ({"train/a/1.png": b"x", "val/a/1.png": b"y", "extra/a/1.png": b"z"}, "extra/a/1.png: lies beside"),
        ({"train/a/1.png": b"x", "test/a/1.png": b"y"}, "found test/, train/"),
        ({"notes.txt": b"x"}, "holds no image.*notes.txt"),
        ({}, "holds no image"),
    ],
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_another_layout_is_refused_by_what_was_found(
    entries: dict[str, bytes], said: str, pack: Callable[[Any], bytes], tmp_path: Path
) -> None:
    with pytest.raises(BadArchive, match=said):
        unpacked(pack(entries), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 2048, b"hello" * 1000, b"PK\x03\x04" + b"\0" * 100, b"\x1f\x8b" + b"x" * 600, b"\x28\xb5\x2f\xfd1234"]
)
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadArchive):
        unpacked(content, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_archive_is_refused_wherever_it_is_cut(kind: str, tmp_path: Path) -> None:
    content = KINDS[kind](FLOWERS)
    whole = len(content.rstrip(b"\0")) if "tar" in kind and "." not in kind else len(content)
    for end in {*range(0, whole, max(1, whole // 60)), whole - 1}:
        (folder := tmp_path / str(end)).mkdir()
        with pytest.raises(BadArchive):
            unpacked(content[:end], folder)


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(tarred(FLOWERS, tarfile.USTAR_FORMAT))
    content[1024 + 3] ^= 1  # the second header's name, which its checksum covers
    with pytest.raises(BadArchive, match=r"broken header after 'rose/1\.png'"):
        unpacked(bytes(content), tmp_path)


def test_what_follows_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="goes on after its end"):
        unpacked(tarred(FLOWERS) + tarred({"more/1.png": b"x"}), tmp_path)


@pytest.mark.parametrize("size", ["9" * 18, "-1", "1e3"])
def test_a_size_that_lies_is_refused(size: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a/1.png")
    info.pax_headers = {"size": size}
    out = io.BytesIO(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(ArchiveError):
        unpacked(out.getvalue(), tmp_path)


def test_endless_headers_are_counted(tmp_path: Path) -> None:
    record = b"17 comment=abcde\n"
    header = special("x", tarfile.XHDTYPE)
    header.size = len(record)
    one = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    with pytest.raises(TooLarge):
        unpacked(one * 101 + bytes(1024), tmp_path, entries=100)


def test_a_header_of_megabytes_is_refused(tmp_path: Path) -> None:
    header = special("x", tarfile.GNUTYPE_LONGNAME)
    header.size = 1 << 30
    with pytest.raises(BadArchive, match="header of 1,073,741,824 bytes"):
        unpacked(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096), tmp_path)


# --- a folder, packed on the fly


def laid(folder: Path, entries: dict[str, bytes]) -> Path:
    for name, content in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_packed_folder_is_the_set_again(tmp_path: Path) -> None:
    origin = laid(tmp_path / "origin", {**FLOWERS, "rose/.hidden.png": b"h", "notes.txt": b"n", f"ü/{'x' * 150}.png": b"long"})
    (origin / "empty").mkdir()
    seen: list[tuple[int, int]] = []
    content = b"".join(packed(origin, lambda done, total: seen.append((done, total))))
    assert seen[-1] == (15, 15)
    assert content == b"".join(packed(origin))
    (tmp_path / "there").mkdir()
    done = unpacked(content, tmp_path / "there")
    assert set(files(tmp_path / "there")) == {*FLOWERS, f"ü/{'x' * 150}.png"}
    digests = [(found.name, hashlib.sha256((origin / found.name).read_bytes()).hexdigest()) for found in walk(origin) if found.status]
    assert done.version == archives.version_of([found.name for found in walk(origin) if not found.status], digests)


def test_a_stamp_moves_with_what_can_be_seen(tmp_path: Path) -> None:
    folder = laid(tmp_path / "set", FLOWERS)
    first = stamp_of(folder)
    (folder / "notes.txt").write_text("training does not look at it")
    assert stamp_of(folder) == first
    changes: list[Callable[[], object]] = [
        lambda: os.utime(folder / "rose/1.png", ns=(1, 1)),
        lambda: (folder / "rose/9.png").write_bytes(b""),
        (folder / "rose/9.png").unlink,
        (folder / "empty").mkdir,
    ]
    seen = [first]
    for change in changes:
        change()
        seen.append(stamp_of(folder))
    assert len(set(seen)) == 4  # the third change undoes the second
    assert seen[1] == seen[3]


# --- the process


def run(content: bytes, folder: Path, **limits: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    (folder / "archive").write_bytes(content)
    config = {"archive": str(folder / "archive"), "into": str(folder / "new"), "parent": os.getpid(), "limits": limits}
    command = [sys.executable, "-P", "-m", "powergrad.archives", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    return done, json.loads(done.stdout or "{}")


def test_the_process_answers_in_one_line(tmp_path: Path) -> None:
    done, answer = run(zipped(FLOWERS), tmp_path)
    assert (done.returncode, answer["result"]["files"]) == (0, 3)
    _, answer = run(zipped(FLOWERS | {"../x.png": b""}), tmp_path / "new")
    assert answer == {"refusal": {"kind": "bad_archive", "entry": "../x.png", "rule": answer["refusal"]["rule"]}}


def test_the_process_imports_nothing_but_the_standard_library() -> None:
    code = "import sys; import powergrad.archives; print(sorted(n.partition('.')[0] for n in sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert loaded - set(sys.stdlib_module_names) <= {"powergrad", "__main__", "sitecustomize", "__editable__"} | {
        name for name in loaded if name.startswith(("_", "distutils"))
    }


def claiming(count: int) -> bytes:
    """A zip file whose end says that it has so many entries."""
    content = zipped(FLOWERS)
    end = content.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, 50 * count, 0)
    return content[:end] + record + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1) + content[end:]


def test_a_zip_file_of_more_than_a_million_entries_is_refused_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="2,000,000 entries"):
        unpacked(claiming(2_000_000), tmp_path)


@pytest.mark.long
def test_a_million_entries_stay_within_memory_and_time(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for number in range(1_000_000):
            archive.writestr(f"c{number % 100}/{number:07d}.png", b"")
    done, answer = run(out.getvalue(), tmp_path, cpu_s=600)
    assert answer["result"]["files"] == 1_000_000, done.stderr[-500:]


# --- fuzz


NAMES = st.one_of(
    st.sampled_from([*HOSTILE_NAMES, *FLOWERS, "", ".", "./", "a/", "a//b.png", "CON.png", "a/.png", "train/x/1.png", "val/x/1.png"]),
    st.text(min_size=0, max_size=40).map(lambda text: text.encode(errors="replace").decode()),
    st.lists(st.sampled_from(["a", "A", "..", ".", "b.png", "é", "e\u0301", "ß", "SS", "x" * 260, "\u202e"]), min_size=1, max_size=20).map(
        "/".join
    ),
)
CONTENTS = st.binary(max_size=64)
FUZZ = settings(max_examples=max(60, int(MINUTES * 4000)), derandomize=not MINUTES)
PATIENT = pytest.mark.timeout(180 + 600 * MINUTES)


def survives(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Unpacks or is refused; whatever it holds, only images below the folder come of it."""
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        done = unpacked(content, folder, bytes=1 << 24, entries=1000)
    except ArchiveError as error:
        json.dumps([error.entry, error.rule]).encode()  # it can be told
        return
    found = files(folder)
    assert len(found) == done.files
    assert all(archives.is_image(name) for name in found)
    for path in (folder / "new").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or (path.is_file() and stat.S_IMODE(path.stat().st_mode) == 0o644 & ~umask())


def umask() -> int:
    os.umask(value := os.umask(0))
    return value


@PATIENT
@FUZZ
@given(entries=st.lists(st.tuples(NAMES, CONTENTS), max_size=6))
def test_hostile_names_in_zip_files(entries: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> None:
    survives(zipped([(zipfile.ZipInfo(name), content) for name, content in entries]), tmp_path_factory)


KIND = st.sampled_from(
    [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"L", b"x", b"?"]
)


@PATIENT
@FUZZ
@given(entries=st.lists(st.tuples(NAMES, KIND, CONTENTS), max_size=6))
def test_hostile_entries_in_tar_files(entries: list[tuple[str, bytes, bytes]], tmp_path_factory: pytest.TempPathFactory) -> None:
    made: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for name, kind, content in entries:
        info = special(name, kind, "../../target")
        info.size = len(content) if kind not in (tarfile.DIRTYPE,) else 0
        made.append((info, content))
    survives(tarred(made), tmp_path_factory)


MUTATIONS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8)


@PATIENT
@FUZZ
@given(kind=st.sampled_from(sorted(KINDS)), mutations=MUTATIONS, cut=st.integers(0, 200))
def test_mutated_archives(kind: str, mutations: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(KINDS[kind]({**FLOWERS, "rose/long.bmp": b"0123456789" * 300}))
    for place, value in mutations:
        content[place % len(content)] = value
    survives(bytes(content[: len(content) - cut] if cut < 100 else content), tmp_path_factory)
