"""The scheduler's files: each read by the parser that is closest to the real one, each command by the real parser."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import click
import kubernetes_validate
import pytest
import yaml
from croniter import croniter

from pipelines.main import build

ROOM = Path(__file__).parents[2] / "pipelines" / "deploy"
SCRIPT = ROOM / "nightly.sh"
CRON = ROOM / "cron" / "mbc"
UNITS = sorted((ROOM / "systemd").glob("mbc-nightly@*"))
MANIFESTS = sorted((ROOM / "kubernetes").glob("*.yaml"))
STEPS = ("all", "set", "train", "add", "compact")
INSTALLED = "/opt/mbc/pipelines/deploy/nightly.sh"

FAKE_MBC = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
[[ -n ${WAIT:-} ]] && { touch "$WAIT"; while [[ -e $WAIT ]]; do sleep 0.05; done; }
if [[ $1 == "${FAIL:-}" ]]; then exit "${CODE:-1}"; fi
while (( $# )); do
  case $1 in
    --write-set) echo set > "$2" ;;
    --out) mkdir -p "$2" ;;
    --checkpoint) mkdir -p "$2" ;;
  esac
  shift
done
echo '{}'
"""


class Machine:
    """Folders, an environment and a `mbc` that notes how it is called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        (folder / "bin" / "mbc").write_text(FAKE_MBC)
        (folder / "bin" / "mbc").chmod(0o755)
        (folder / "inbox").mkdir()
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "CALLS": str(self.calls),
            "MBC_BANK": str(folder / "bank"),
            "MBC_WORK": str(folder / "work"),
        }

    def run(self, step: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **changes}
        command = [str(SCRIPT), step]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def seen(self) -> list[list[str]]:
        lines = self.calls.read_text().split("\n") if self.calls.exists() else []
        return [line.rstrip("\0").split("\0") for line in lines if line]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def parse(arguments: list[str]) -> dict[str, object]:
    """What the real command line makes of the arguments; nothing is run."""
    command, rest, context = build(), list(arguments), None
    while hasattr(command, "resolve_command"):
        context = click.Context(command, parent=context)
        _, command, rest = command.resolve_command(context, rest)
    with command.make_context(command.name, rest, parent=context) as told:
        return dict(told.params)


# ----------------------------------------------------------------------------------------------------------- the script


def test_one_machine_ingests_and_adapts_with_what_the_real_command_line_takes(machine):
    """Expanded by bash, parsed by click."""
    done = machine.run("all", MBC_SOURCES="s3://b/news/%Y-%m-%d/ s3://b/more.jsonl", MBC_MINUTES="7", MBC_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    ingest, adapt = machine.seen()
    told = parse(ingest)
    day = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 86_400))
    assert told["sources"] == (f"s3://b/news/{day}/", "s3://b/more.jsonl")
    assert (told["bank"], told["as_json"]) == (machine.environment["MBC_BANK"], True)
    told = parse(adapt)
    assert (told["minutes"], told["device"], told["checkpoint"]) == (7.0, "cpu", machine.folder / "work/checkpoint")
    assert re.fullmatch(r"(\{\}\n){2}", done.stdout), "one JSON object a step, logs elsewhere"


def test_an_inbox_is_emptied_once_and_what_failed_is_taken_up_again(machine):
    inbox, work = machine.folder / "inbox", machine.folder / "work"
    for name, age in (("a.jsonl", 300), ("b.jsonl", 0), (".hidden", 300), ("c.part", 300)):
        (inbox / name).write_text("{}")
        os.utime(inbox / name, (time.time() - age,) * 2)
    told = {"MBC_INBOX": str(inbox)}
    assert machine.run("all", FAIL="ingest", **told).returncode == 1
    assert [path.name for path in (work / "taken").iterdir()] == ["a.jsonl"]
    assert machine.run("all", **told).returncode == 0
    (kept,) = (work / "done").iterdir()
    assert [path.name for path in kept.iterdir()] == ["a.jsonl"] and not (work / "taken").exists()
    assert sorted(path.name for path in inbox.iterdir()) == [".hidden", "b.jsonl", "c.part"]
    assert [one[0] for one in machine.seen()] == ["ingest", "ingest", "adapt"]
    assert all(parse(one) for one in machine.seen())
    assert "no new documents" in machine.run("all", **told).stderr


def test_two_machines_hand_a_set_and_a_candidate_over_each_once(machine):
    exchange = machine.folder / "work" / "exchange"
    assert machine.run("set", MBC_SOURCES="a.jsonl").returncode == 0
    (found,) = exchange.iterdir()
    assert sorted(path.name for path in found.iterdir()) == ["set.jsonl.gz"]
    without_bank = {"MBC_BANK": ""}
    assert "no new candidate" in machine.run("add").stderr
    assert machine.run("train", FAIL="adapt", **without_bank).returncode == 1
    assert "no new candidate" in machine.run("add").stderr
    assert machine.run("train", MBC_DEVICE="cuda", **without_bank).returncode == 0
    assert "no new set" in machine.run("train", **without_bank).stderr
    assert machine.run("add", FAIL="adapters").returncode == 1, "a lost race"
    assert "no new candidate" in machine.run("add").stderr, "it was stored; it is not stored again"
    calls = machine.seen()
    assert [one[0] for one in calls] == ["ingest", "adapt", "adapt", "adapt", "adapters"]
    first, second, third = parse(calls[1]), parse(calls[3]), parse(calls[4])
    assert first["write_set"].name == "set.jsonl.gz" and first["from_set"] is None
    assert second["from_set"] == found / "set.jsonl.gz" and second["bank"] is None and second["device"] == "cuda"
    assert second["out"].parent == found and third["folder"] == found / "candidate"
    from pipelines.adapt_options import AdaptSettings

    for call in (calls[1], calls[3]):
        AdaptSettings(**{name: value for name, value in parse(call).items() if name != "as_json"}).check()


def test_old_sets_are_cleared_away_and_an_older_one_is_not_trained_on(machine):
    exchange = machine.folder / "work" / "exchange"
    for number in range(9):
        (exchange / f"set-2020010{number}T000000Z").mkdir(parents=True)
        (exchange / f"set-2020010{number}T000000Z" / "set.jsonl.gz").write_text("old")
    assert machine.run("set").returncode == 0
    left = sorted(path.name for path in exchange.iterdir())
    assert len(left) == 7 and left[-1] > "set-2026"
    assert machine.run("train").returncode == 0
    assert (exchange / left[-1] / "candidate").is_dir() and "no new set" in machine.run("train").stderr


def test_a_second_run_does_nothing_and_says_so_by_its_exit_code(machine):
    gate = machine.folder / "gate"
    environment = {**machine.environment, "WAIT": str(gate)}
    running = subprocess.Popen([SCRIPT, "all"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not gate.exists() and time.monotonic() < until:
        time.sleep(0.02)
    second = machine.run("all")
    third = machine.run("set")
    gate.unlink()
    assert running.wait(30) == 0
    assert (second.returncode, third.returncode) == (75, 75) and "another run is still going on" in second.stderr
    assert len(machine.seen()) == 1
    assert machine.run("all").returncode == 0, "free again"


@pytest.mark.parametrize("code", [1, 2])
def test_the_exit_code_is_that_of_the_step_that_failed(machine, code):
    assert machine.run("all", FAIL="adapt", CODE=str(code)).returncode == code
    assert machine.run("compact", FAIL="compact", CODE=str(code)).returncode == code
    assert machine.run("all", MBC_BANK="").returncode == machine.run("sideways").returncode == 2
    assert parse(machine.seen()[1])["bank"] == machine.environment["MBC_BANK"]


# ----------------------------------------------------------------------------------------------------------------- cron


def cron_lines(comments: bool) -> list[str]:
    """Lines of work; with ``comments`` also those that are offered as comments."""
    lines = CRON.read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#") and not re.match(r"\w+=", line)]
    return found + [line[2:] for line in lines if re.match(r"# \d", line)] if comments else found


def test_cron_lines_have_a_time_a_user_and_a_step_that_exists():
    assert len(cron_lines(False)) == 2 and len(cron_lines(True)) == 5
    steps = []
    for line in cron_lines(True):
        *times, user, command = line.split(None, 6)
        assert croniter.is_valid(" ".join(times), strict=True) and user == "mbc"
        assert "%" not in command, "cron would end the command there"
        words = shlex.split(command.partition(">>")[0])
        assert words[-2] == INSTALLED
        steps.append(words[-1])
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
        assert ">> /var/log/mbc/nightly.log 2>&1 || echo" in command, "logged, and failures mailed"
    assert sorted(steps) == sorted(STEPS)
    settings = dict(line.split("=", 1) for line in CRON.read_text().splitlines() if re.match(r"[A-Z_]+=", line))
    assert {"PATH", "SHELL", "MAILTO", "MBC_BANK", "MBC_WORK", "MBC_INBOX"} <= settings.keys()
    for name in (line for line in settings if line.startswith("MBC_")):
        assert name in SCRIPT.read_text(), "the script knows it"


def test_the_nightly_line_is_due_once_a_night():
    times = cron_lines(False)[0].split(None, 5)[:5]
    due = croniter(" ".join(times), 1_767_225_600)  # 2026-01-01
    first, second = due.get_next(float), due.get_next(float)
    assert second - first == 86_400


# -------------------------------------------------------------------------------------------------------------- systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_every_unit(tmp_path):
    """`systemd-analyze verify` on the units, installed in a root of their own."""
    units = tmp_path / "units"
    units.mkdir()
    for path in UNITS:
        text = path.read_text().replace("/opt/mbc", str(ROOM.parents[1])).replace("/etc/mbc", str(tmp_path))
        (units / path.name).write_text(text)
        if path.suffix == ".service":
            for step in STEPS:
                (units / f"mbc-nightly@{step}.service").write_text(text)
    shutil.copy(ROOM / "systemd" / "mbc.env", tmp_path / "mbc.env")
    wanted = sorted(str(path) for path in units.iterdir() if "@." not in path.name)
    assert len(wanted) == 10
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *wanted],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mbc" not in done.stderr, done.stderr
    broken = units / "mbc-nightly@all.timer"
    broken.write_text(broken.read_text().replace("02:17:00", "02:77:00"))
    refused = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(broken)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "02:77:00" in refused.stderr, "the check can fail"


def test_units_run_the_steps_one_at_a_time_and_know_the_exit_codes():
    (service,) = [path.read_text() for path in UNITS if path.suffix == ".service"]
    assert f"ExecStart={INSTALLED} %i" in service and "Type=oneshot" in service and "SuccessExitStatus=75" in service
    timers = {path.stem.partition("@")[2] for path in UNITS if path.suffix == ".timer"}
    assert timers == set(STEPS)
    told = dict(line.split("=", 1) for line in (ROOM / "systemd" / "mbc.env").read_text().splitlines() if "=" in line)
    assert all(name in SCRIPT.read_text() for name in told if name.startswith("MBC_"))


# ----------------------------------------------------------------------------------------------------------- kubernetes


def objects(path: Path) -> list[dict]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
@pytest.mark.parametrize("version", ["1.31", "1.34"])
def test_kubernetes_schemas_take_every_object(path, version):
    for one in objects(path):
        kubernetes_validate.validate(one, version, strict=True)
    broken = json.loads(json.dumps(objects(path)[-1]))
    broken["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_cron_jobs_never_overlap_and_say_what_they_need(path):
    found, claims, steps = objects(path), set(), []
    for one in (one for one in found if one["kind"] == "CronJob"):
        spec = one["spec"]
        assert spec["concurrencyPolicy"] == "Forbid" and croniter.is_valid(spec["schedule"], strict=True)
        pod = spec["jobTemplate"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["command"][0] == INSTALLED and container["resources"]["limits"]["memory"]
        steps.append(container["command"][1])
        names = {entry["name"] for entry in container["env"]}
        assert all(name in SCRIPT.read_text() for name in names - {"MBC_CACHE", "HOME"})
        assert ("MBC_BANK" in names) == (steps[-1] != "train"), "the GPU's machine needs no bank"
        rules = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
        assert {rule["onExitCodes"]["containerName"] for rule in rules} == {container["name"]}
        claims |= {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert wants_gpu == (steps[-1] == "train") == ("nodeSelector" in pod)
    assert claims == {one["metadata"]["name"] for one in found if one["kind"] == "PersistentVolumeClaim"}
    assert set(steps) == ({"set", "train", "add", "compact"} if "two" in path.name else {"all", "compact"})
