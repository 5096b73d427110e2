"""`powergrad keys` and `powergrad quota` on real databases, and what a server makes of the keys they give."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from powergrad.cli.main import main
from powergrad.jobs import keys
from powergrad.jobs.keys import Caller, Scope
from powergrad.jobs.store import Store
from tests.api.conftest import serving, settings_for
from tests.jobs import builders

KEY = re.compile(r"pg_[0-9a-f]{12}_[A-Za-z0-9_-]{43}\n")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command on the data directory `data`, which is not there yet; its code, output and messages."""
    for name in [name for name in os.environ if name.startswith("POWERGRAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("POWERGRAD_DATA_DIR", str(tmp_path / "data"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/data/powergrad.db"


def opened(url: str, key: str) -> Caller | str:
    store = Store(url)
    with store.read() as tx:
        found = keys.opened_by(keys.stored(tx), key, now_ms=tx.now_ms)
    store.close()
    return found


def test_a_key_is_all_of_standard_output(run: Run, url: str) -> None:
    code, out, err = run("keys", "create", "--owner", "ada", "--name", "laptop")
    assert code == 0
    assert KEY.fullmatch(out)
    assert "nothing can show it again" in err
    assert out.strip() not in err
    caller = opened(url, out.strip())
    assert isinstance(caller, Caller)
    assert (caller.owner, caller.scopes, caller.expires_at_ms) == ("ada", frozenset({Scope.READ, Scope.SUBMIT}), None)


def test_the_first_key_says_what_it_changes_and_the_second_does_not(run: Run) -> None:
    assert "from now on the server asks every caller" in run("keys", "create")[2]
    assert "from now on" not in run("keys", "create")[2]


def test_a_first_key_that_manages_nothing_says_what_is_missing(run: Run) -> None:
    told = run("keys", "create", "--owner", "bob")[2]
    assert "No key manages keys and quotas yet" in told
    assert "belong to local" in told


def test_a_fresh_directory_is_its_users_alone(run: Run, tmp_path: Path) -> None:
    run("keys", "list")
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("arguments", "scopes"),
    [
        (["--scope", "read"], {Scope.READ}),
        (["--scope", "read", "--scope", "submit"], {Scope.READ, Scope.SUBMIT}),
        (["--admin"], set(Scope)),
    ],
)
def test_scopes_are_those_given(run: Run, url: str, arguments: list[str], scopes: set[Scope]) -> None:
    caller = opened(url, run("keys", "create", *arguments)[1].strip())
    assert isinstance(caller, Caller)
    assert caller.scopes == frozenset(scopes)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("12h", 43_200), ("30d", 2_592_000), ("1.5w", 907_200)])
def test_a_key_ends_after_as_long_as_it_says(run: Run, text: str, seconds: int) -> None:
    made = json.loads(run("keys", "create", "--expires", text, "--json")[1])
    lasts = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert lasts.total_seconds() == seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--expires", "0d"], "--expires 0d: must be a number above 0 and s, m, h, d or w, such as 30d"),
        (["create", "--expires", "-1d"], "--expires -1d: must be"),
        (["create", "--expires", "tomorrow"], "--expires tomorrow: must be"),
        (["create", "--expires", "999999999w"], "ttl_s=6.048e+14: must be greater than 0 and at most"),
        (["create", "--expires", "99999999999999w"], "must be a number below 1,000,000,000 and"),
        (["create", "--admin", "--scope", "read"], "--admin and --scope: give one of the two"),
        (["create", "--owner", "a b"], "owner='a b': must match"),
        (["create", "--name", "x" * 65], "must match"),
        (["create", "--scope", "root"], "--scope root: must be read, submit, admin"),
    ],
)
def test_a_bad_key_is_wrong_usage_and_none_is_made(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run("keys", *arguments)
    assert (code, out) == (64, "")
    assert said in " ".join(err.split())
    assert json.loads(run("keys", "list", "--json")[1]) == []


def test_the_list_shows_no_secret(run: Run) -> None:
    key = run("keys", "create", "--owner", "ada", "--name", "laptop", "--expires", "1d")[1].strip()
    _, table, _ = run("keys", "list")
    _, document, _ = run("keys", "list", "--json")
    assert str(keys.id_of(key)) in table
    assert re.search(r"ada +laptop +read, submit +active", table)
    assert [one["id"] for one in json.loads(document)] == [keys.id_of(key)]
    assert key.split("_", 2)[2] not in table + document


def test_no_keys_are_told_as_what_they_mean(run: Run) -> None:
    code, out, err = run("keys", "list")
    assert (code, out) == (0, "")
    assert "the server is for its own machine" in " ".join(err.split())


@pytest.mark.parametrize("spelled", ["{id}", "pg_{id}", "{key}"])
def test_a_key_is_revoked_by_its_id_or_itself(run: Run, url: str, spelled: str) -> None:
    key = run("keys", "create")[1].strip()
    code, out, err = run("keys", "revoke", spelled.format(id=keys.id_of(key), key=key))
    assert (code, out) == (0, "")
    assert "opens nothing any more" in err
    assert "No working key is left" in err
    assert opened(url, key) == "the key was revoked"


def test_the_last_but_one_key_leaves_a_server_that_opens(run: Run) -> None:
    first = run("keys", "create")[1].strip()
    run("keys", "create")
    code, out, err = run("keys", "revoke", str(keys.id_of(first)), "--json")
    assert (code, json.loads(out)["state"]) == (0, "revoked")
    assert "No working key is left" not in err


def test_a_key_that_is_not_there_is_not_revoked(run: Run) -> None:
    code, _, err = run("keys", "revoke", "000000000000")
    assert code == 1
    assert "no key '000000000000': `powergrad keys list` shows them" in " ".join(err.split())


def test_keys_go_where_the_environment_names_a_database(
    run: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POWERGRAD_DATABASE_URL", empty_database_url)
    key = run("keys", "create", "--owner", "ada")[1].strip()
    assert isinstance(opened(empty_database_url, key), Caller)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://user:S3cret@127.0.0.1:1/jobs", "postgresql+psycopg://user:***@127.0.0.1:1/jobs: "),
        ("S3cret", "POWERGRAD_DATABASE_URL: must be sqlite:"),
        ("nothing://user:S3cret@host/jobs", "POWERGRAD_DATABASE_URL: must be sqlite:"),
    ],
)
def test_a_database_that_is_not_there_is_told_without_its_password(run: Run, monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setenv("POWERGRAD_DATABASE_URL", url)
    code, out, err = run("keys", "list")
    assert (code, out) == (1, "")
    assert said in err
    assert "S3cret" not in err


def test_a_database_of_another_release_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with sqlite3.connect(tmp_path / "data" / "powergrad.db") as database:
        database.execute("CREATE TABLE jobs (id TEXT)")
    code, _, err = run("keys", "create")
    assert code == 1
    assert "its tables are not this release's" in " ".join(err.split())


def test_a_key_made_here_opens_a_server_there(run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without one, every command says what to do."""
    key = run("keys", "create", "--owner", "ada")[1].strip()
    with serving(settings_for(url, tmp_path / "data")) as api:
        monkeypatch.setenv("POWERGRAD_URL", api.url)
        code, _, err = run("jobs")
        assert code == 3
        assert "Refused (401 unauthenticated)" in err
        assert "Set POWERGRAD_API_KEY to a key that works" in " ".join(err.split())
        monkeypatch.setenv("POWERGRAD_API_KEY", key)
        assert run("jobs")[0] == 0
        run("keys", "revoke", key)
        api.parts.key_ring.forget()
        code, _, err = run("jobs")
        assert (code, "the key was revoked" in err, key in err) == (3, True, False)


# --- quota


def test_limits_are_set_one_by_one_shown_and_lifted(run: Run, url: str) -> None:
    assert "no limit" in run("quota", "ada")[1]
    run("quota", "ada", "--queued", "100", "--running", "2")
    _, document, _ = run("quota", "ada", "--gpu-hours", "1.5", "--gib", "0.5", "--json")
    shown = json.loads(document)
    granted = {name: shown[name]["granted"] for name in ("queued", "running", "gpu_seconds", "bytes")}
    assert granted == {"queued": 100, "running": 2, "gpu_seconds": 5400.0, "bytes": 2**29}
    assert run("quota", "ada", "--queued", "none")[0] == 0
    shown = json.loads(run("quota", "ada", "--json")[1])
    assert (shown["queued"]["granted"], shown["running"]["granted"]) == (None, 2)
    shown = json.loads(run("quota", "ada", "--none", "--running", "5", "--json")[1])
    assert [shown[name]["granted"] for name in ("queued", "running", "gpu_seconds", "bytes")] == [None, 5, None, None]


def test_the_table_shows_what_is_used(run: Run, url: str) -> None:
    run("quota", "ada", "--queued", "3", "--gpu-hours", "2")
    store = Store(url)
    builders.submit(store, owner="ada")
    store.close()
    _, table, _ = run("quota", "ada")
    assert re.search(r"queued jobs +1 +3\b", table)
    assert re.search(r"GPU hours +0\.00 +2\.00", table)
    assert re.search(r"GiB +0\.00 +no limit", table)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a b"], "owner='a b': must match"),
        (["ada", "--queued", "-1"], "--queued -1: must be a whole number from 0"),
        (["ada", "--running", "1.5"], "--running 1.5: must be a whole number"),
        (["ada", "--gpu-hours", "many"], "--gpu-hours many: must be a number from 0 to 999999999, or none"),
        (["ada", "--gib", "1e9"], "--gib 1e9: must be a number"),
    ],
)
def test_a_bad_limit_is_wrong_usage(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run("quota", *arguments)
    assert (code, out) == (64, "")
    assert said in " ".join(err.split())


# --- listening


def test_up_goes_on_with_an_address_that_others_reach_where_there_is_a_key(run: Run, tmp_path: Path) -> None:
    """No machine has this address (RFC 5737), so that nothing is bound; without a key it is not even tried (tests.cli.test_main)."""
    run("keys", "create")
    command = [sys.executable, "-P", "-m", "powergrad.cli.main", "up", "--host", "192.0.2.1", "--data-dir", str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "port 8642 on 192.0.2.1: Cannot assign requested address" in ended.stderr


def test_a_revoked_key_is_none_for_up(run: Run, tmp_path: Path) -> None:
    run("keys", "revoke", run("keys", "create")[1].strip())
    code, _, err = run("up", "--host", "0.0.0.0", "--data-dir", str(tmp_path / "data"))
    assert code == 1
    assert "there is no key that they would have to show" in " ".join(err.split())
