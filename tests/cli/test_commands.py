"""The commands against the real service, run in this process with their output captured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from powergrad.cli.main import main
from powergrad.client import Client, Job
from tests.cli.conftest import endless, tiny

Captured = pytest.CaptureFixture[str]


def written(folder: Path, spec: dict[str, object]) -> str:
    path = folder / "job.json"
    path.write_text(json.dumps(spec))
    return str(path)


def test_submit_and_wait_ends_with_zero_for_a_success(here: Path, capsys: Captured) -> None:
    assert main(["submit", written(here, tiny(name="waited")), "--set", "loss.alpha=0.3", "--wait"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "waited  succeeded" in told.err
    assert "powergrad pull job_" in told.err


def test_a_failed_job_ends_with_one_its_reason_and_what_to_try(here: Path, capsys: Captured) -> None:
    spec = tiny(data={"dataset": "class_folder", "path": "nowhere"}, limits={"max_attempts": 1})
    assert main(["submit", written(here, spec), "--wait"]) == 1
    told = capsys.readouterr().err
    assert "failed" in told
    assert "nowhere" in told
    assert "Try: " in told


def test_a_cancelled_job_ends_with_two(here: Path, client: Client) -> None:
    job = client.submit(endless())
    assert main(["cancel", job.id]) == 0
    assert main(["watch", job.id]) == 2


def test_submit_prints_the_id_alone(here: Path, client: Client, capsys: Captured) -> None:
    assert main(["submit", written(here, endless())]) == 0
    job_id = capsys.readouterr().out.strip()
    assert client.cancel(job_id).id == job_id


def test_a_refused_spec_is_three_with_every_place(here: Path, capsys: Captured) -> None:
    assert main(["submit", written(here, tiny()), "--set", "loss.alpha=1.4", "--set", "epoch=3"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "/loss/alpha  must be at most 1" in told.err
    assert "/epoch       no such field" in told.err


def test_a_dry_run_prints_the_whole_spec(here: Path, capsys: Captured) -> None:
    assert main(["submit", written(here, tiny()), "--dry-run"]) == 0
    assert "nesterov" in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("command", ["jobs", "show JOB", "metrics JOB", "workers", "models", "watch JOB"])
def test_json_is_all_there_is_on_standard_output(here: Path, trained: Job, capsys: Captured, command: str) -> None:
    assert main([*command.replace("JOB", trained.id).split(), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)
    assert told.err == ""


def test_a_list_names_the_job_and_its_score(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["jobs", "--label", "kept=yes"]) == 0
    told = capsys.readouterr().out
    assert trained.id in told
    assert f"{100 * (trained.metrics.best['val_top1'] or 0):.1f} %" in told
    assert main(["jobs", "--label", "kept=yes", "-q"]) == 0
    assert capsys.readouterr().out == f"{trained.id}\n"


@pytest.mark.parametrize(
    "part", [slice(None), slice(-8, None), slice(4, None), slice(18, 27)], ids=["id", "its end", "without job_", "its middle"]
)
def test_part_of_an_id_is_enough(here: Path, trained: Job, capsys: Captured, part: slice) -> None:
    assert main(["show", trained.id[part], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == trained.id


def test_last_is_the_newest(here: Path, client: Client, capsys: Captured) -> None:
    job = client.submit(endless())
    assert main(["cancel", "last"]) == 0
    assert capsys.readouterr().out.startswith(job.id)


def test_an_id_that_fits_many_is_refused(here: Path, client: Client, capsys: Captured) -> None:
    for _ in range(2):
        client.cancel(client.submit(endless()).id)
    for part in ("job_0", "0"):
        assert main(["show", part]) == 3
        told = capsys.readouterr().err
        assert "jobs fit: job_" in told
        assert "Give more of the id" in told


def test_a_part_that_fits_none_says_where_it_looked(here: Path, capsys: Captured) -> None:
    assert main(["show", "ILOU"]) == 3  # letters that no id has
    assert "none of the newest 1,000 jobs has such an id" in capsys.readouterr().err


def test_a_parameter_that_is_refused_is_named(here: Path, capsys: Captured) -> None:
    assert main(["jobs", "--search", 129 * "x"]) == 3
    told = capsys.readouterr().err.splitlines()[1]
    assert told.split()[0] == "q"


@pytest.mark.parametrize("arguments", [["metrics", "last", "--points", "3"], ["logs", "last", "-n", "1000001"]])
def test_a_count_beyond_the_server_s_is_wrong_usage(here: Path, arguments: list[str]) -> None:
    assert main(arguments) == 64


def test_one_refusal_does_not_keep_the_others_from_their_turn(here: Path, client: Client, trained: Job, capsys: Captured) -> None:
    job = client.submit(endless())
    assert main(["cancel", "nonsense", trained.id, job.id]) == 3
    told = capsys.readouterr()
    assert told.out.startswith(job.id)
    assert "nonsense" in told.err
    assert trained.id in told.err


def test_show_tells_reason_scores_and_attempts(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["show", trained.id]) == 0
    told = capsys.readouterr().out
    for word in ("succeeded", "resnet18 on digits", "val_top1", "attempt", "kept=yes"):
        assert word in told


def test_metrics_and_logs_are_printed(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["metrics", trained.id, "--name", "val_top1"]) == 0
    assert "val_top1" in capsys.readouterr().out
    assert main(["metrics", trained.id, "--csv", "--name", "val_top1"]) == 0
    assert capsys.readouterr().out.startswith("step,val_top1\n")
    assert main(["logs", trained.id, "--tail", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["logs", trained.id, "--follow"]) == 0
    assert "val_top1" in capsys.readouterr().out


def test_pull_prints_where_the_weights_are(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["pull", trained.id, "-c", "latest", "-o", "weights/mine.safetensors"]) == 0
    assert capsys.readouterr().out == "weights/mine.safetensors\n"
    assert (here / "weights" / "mine.safetensors").stat().st_size > 40_000_000
    assert main(["pull", trained.id, "-c", "step-00000001"]) == 3
    assert "has no checkpoint 'step-00000001'; it has: step-" in capsys.readouterr().err


def test_pull_makes_the_folder_that_a_slash_names(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["pull", trained.id, "-o", "weights/"]) == 0
    pulled = Path(capsys.readouterr().out.strip())
    assert pulled.parent == Path("weights")
    assert pulled.name.startswith(trained.id)
    assert pulled.is_file()
    assert main(["pull", trained.id, "-o", "nowhere/weights/"]) == 1
    assert "nowhere: cannot be written (No such file or directory)" in capsys.readouterr().err
    assert not (here / "nowhere").exists()


def test_the_doctor_finds_the_server_ready(here: Path, capsys: Captured) -> None:
    assert main(["doctor", "--json", "--data-dir", str(here)]) == 0
    found = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["server"]["verdict"] == "ok"
    assert found["torch"]["verdict"] == "ok"
    assert {one["verdict"] for one in found.values()} <= {"ok", "note"}


def test_artifacts_are_listed_and_pulled(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["artifacts", trained.id]) == 0
    assert "labels.json" in capsys.readouterr().out
    assert main(["pull", trained.id, "--artifact", "labels.json"]) == 0
    assert json.loads(Path("labels.json").read_text()) == [str(i) for i in range(10)]
    assert main(["pull", trained.id, "--artifact", "nothing.json"]) == 3


def test_an_image_is_predicted_by_the_trained_network(here: Path, trained: Job, capsys: Captured) -> None:
    images = load_digits().images[:2]
    for place, pixels in enumerate(images):
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(f"{place}.png")
    assert main(["predict", trained.id, "0.png", "1.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in found] == ["0.png", "1.png"]
    for one in found:
        chances = [guess["probability"] for guess in one["predictions"]]
        assert len(chances) == 5
        assert chances == sorted(chances, reverse=True)
        assert {guess["label"] for guess in one["predictions"]} <= {str(i) for i in range(10)}
    assert main(["predict", trained.id, "0.png", "--top", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_is_no_image_is_refused(here: Path, trained: Job, capsys: Captured) -> None:
    Path("no.png").write_text("no image")
    assert main(["predict", trained.id, "no.png"]) == 3
    assert "unreadable_image" in capsys.readouterr().err
    assert main(["predict", trained.id, "missing.png"]) == 1


def test_presets_are_listed_and_printed(here: Path, capsys: Captured) -> None:
    assert main(["presets"]) == 0
    first = capsys.readouterr().out.splitlines()[1].split()[0]
    assert main(["presets", first]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["dataset"] == "imagenet"
    assert main(["presets", "none"]) == 3


def cancelled(client: Client, **fields: object) -> str:
    job_id = client.submit(endless(**fields)).id
    client.cancel(job_id)
    return client.wait(job_id, 60).id


def test_delete_takes_the_named_and_says_which_it_could_not(here: Path, client: Client, capsys: Captured) -> None:
    gone, alive = cancelled(client), client.submit(endless()).id
    assert main(["delete", gone, alive]) == 3
    told = capsys.readouterr()
    assert told.out.split() == [gone]
    assert "cancel it first" in told.err
    client.cancel(alive)
    assert main(["show", gone]) == 3


def test_delete_by_options_shows_first_and_asks(here: Path, client: Client, capsys: Captured) -> None:
    ids = {cancelled(client, labels={"heap": "old"}) for _ in range(2)}
    chosen = ["delete", "--state", "cancelled", "--label", "heap=old"]
    assert main([*chosen, "--older-than", "30d"]) == 0
    assert "No job fits" in capsys.readouterr().err
    assert main([*chosen, "--dry-run", "--json"]) == 0
    would = json.loads(capsys.readouterr().out)
    assert (set(would["deleted"]), would["dry_run"]) == (ids, True)
    assert main(chosen) == 64, "nobody is there to ask"
    assert "--yes" in capsys.readouterr().err
    assert main([*chosen, "--yes"]) == 0
    assert set(capsys.readouterr().out.split()) == ids
    assert main([*chosen, "--yes"]) == 0
    assert "No job fits" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["last", "--state", "failed"], ["--older-than", "soon"], ["--label", "x"]])
def test_delete_without_a_clear_choice_is_wrong_usage(here: Path, arguments: list[str]) -> None:
    assert main(["delete", *arguments]) == 64


def test_a_checkpoint_is_pinned_and_let_go(here: Path, client: Client, trained: Job, capsys: Captured) -> None:
    assert main(["pin", trained.id]) == 0
    assert "pinned" in capsys.readouterr().out
    assert client.checkpoints(trained.id)[0].pinned
    assert main(["unpin", trained.id, "--checkpoint", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pinned"] is False
