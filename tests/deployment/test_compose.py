"""What docker-compose.yml and the Dockerfile promise, read from the files themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment.containers import ATTACKERS, INSIDE, LEAN, PARTICIPANTS, Compose
from simulations.engines.commands import FlowerError

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
PEOPLE = {name: s for name, s in SERVICES.items() if re.match(r"(supernode|attacker)-\d+$", name)}
SERVERS = {name: s for name, s in SERVICES.items() if name not in PEOPLE}
UNITS = {"m": 1 << 20, "g": 1 << 30}


def started(profile: str) -> dict[str, dict[str, Any]]:
    """Services that a profile starts, and those that always are."""
    return {n: s for n, s in SERVICES.items() if profile in s.get("profiles", [profile])}


def sources(service: dict[str, Any]) -> dict[str, str]:
    """What is mounted, relative to the deployment's folder, and how."""
    mounts = [volume.removeprefix("${SITE:-./.deployment}/") for volume in service["volumes"]]
    return {m.rsplit(":", 2)[0]: m.rsplit(":", 1)[1] for m in mounts if m.endswith(":ro")}


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "${OWNER:-10001:10001}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert 0 < service["pids_limit"] <= 256
    assert {entry.split(":")[0] for entry in service["tmpfs"]} == {"/tmp", "/flower"}
    wide = {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "container_name"}
    assert not wide & set(service)
    assert "docker.sock" not in str(service)


@pytest.mark.parametrize("profile", ["honest", "attack"])
def test_a_deployment_without_cuda_fits_into_eight_gigabytes(profile: str) -> None:
    limits = [service["mem_limit"] for service in started(profile).values()]
    assert len(limits) == len(SERVERS) + PARTICIPANTS
    usual, lean = (
        [re.sub(r"\$\{(\w+):-(\w+)\}", value, limit) for limit in limits]
        for value in (r"\2", lambda found: LEAN[found[1]])
    )
    assert size(lean) < 8 << 30
    assert size(lean) < size(usual) < 12 << 30


def size(limits: list[str]) -> int:
    """Bytes of all limits together."""
    return sum(int(limit[:-1]) * UNITS[limit[-1]] for limit in limits)


def test_participants_reach_the_gateway_and_nothing_else() -> None:
    for service in PEOPLE.values():
        assert service["networks"] == ["participants"]
        assert "ports" not in service
        assert "--superlink=gateway:8443" in service["command"]
    assert [n for n, s in SERVERS.items() if "participants" in s["networks"]] == ["gateway"]
    assert FILE["networks"]["participants"]["internal"] is True
    assert FILE["networks"]["control"]["internal"] is True


def test_the_operator_alone_reaches_the_superlink_from_outside() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {"superlink": ["127.0.0.1:${OPERATOR_PORT:-18000}:8000"]}
    assert [n for n, s in SERVICES.items() if "operator" in s["networks"]] == ["superlink"]


def test_everybody_holds_what_is_his_and_no_more() -> None:
    for name, service in PEOPLE.items():
        number = name.rpartition("-")[2]
        assert sources(service) == {"authority.pem": "ro", f"participants/{number}": "ro"}
        assert len(service["volumes"]) == 2
    assert set(sources(SERVICES["gateway"])) == {"authority.pem", "gateway"}
    assert set(sources(SERVICES["superlink"])) == {"authority.pem", "superlink"}
    assert set(sources(SERVICES["server-app"])) == {
        *("authority.pem", "superlink/runner-secret", "server/data")
    }
    writable = {n: [v for v in s["volumes"] if not v.endswith(":ro")] for n, s in SERVICES.items()}
    assert {name: len(volumes) for name, volumes in writable.items() if volumes} == {
        "superlink": 1,  # its database
        "server-app": 1,  # the results
    }


@pytest.mark.parametrize(("profile", "attackers"), [("honest", 0), ("attack", ATTACKERS)])
def test_a_profile_starts_every_participant_once(profile: str, attackers: int) -> None:
    people = {name: s for name, s in started(profile).items() if name in PEOPLE}
    numbers = sorted(int(name.rpartition("-")[2]) for name in people)
    assert numbers == list(range(PARTICIPANTS))
    attacking = [int(n.rpartition("-")[2]) for n, s in people.items() if "--attack" in s["command"]]
    assert sorted(attacking) == list(range(PARTICIPANTS - attackers, PARTICIPANTS))


def test_the_superlink_asks_for_keys_and_keeps_what_it_knows() -> None:
    command = SERVICES["superlink"]["command"]
    for flag in (
        *("--enable-supernode-auth", "--isolation=process", "--database=/state/state.db"),
        *("--ssl-keyfile=/site/superlink/key.pem", "--disable-runtime-dependency-installation"),
    ):
        assert flag in command
    assert "--insecure" not in TEXT
    data, test_data, results = INSIDE
    for folder, service in ((test_data, "server-app"), (results, "server-app")):
        assert any(f":{folder}" in volume for volume in SERVICES[service]["volumes"])
    assert data.startswith("/participant/")


def test_what_is_written_for_old_and_new_compose() -> None:
    assert not {"version", "name", "include"} & set(FILE)
    for unknown in ("dockerfile_inline", "host_ip", ":+", "develop:", "required:"):
        assert unknown not in TEXT
    assert all(isinstance(port, str) for s in SERVICES.values() for port in s.get("ports", []))


def test_the_image_is_unprivileged_and_holds_no_app() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.split() for line in lines if re.match(r"[A-Z]+ ", line)]
    assert [step[1] for step in steps if step[0] == "USER"] == ["10001:10001"]
    copied = [source for step in steps if step[0] == "COPY" for source in step[1:-1]]
    assert copied == ["docker/*.lock", "docker/wheelhouse*/*.whl", "deployment"]
    text = "\n".join(lines)
    assert "# syntax" not in text  # would fetch an image
    assert "--mount" not in text  # needs BuildKit


def pins(file: str) -> dict[str, str]:
    """Name and version of each requirement that is pinned to one."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s+;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_image_has_the_versions_of_every_other_installation_and_their_hashes() -> None:
    known, locked = pins("constraints.txt"), pins("docker/requirements.lock")
    torch, cuda = pins("docker/torch.lock"), pins("docker/cuda.lock")
    assert locked | torch == {name: known[name] for name in locked | torch}
    assert cuda
    assert not cuda.keys() & (known.keys() | locked.keys())
    wanted = (ROOT / "docker" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split(r"[<>=]", line)[0] for line in wanted if line and line[0] != "#"}
    assert names == names & (locked.keys() | torch.keys())
    for file, pinned in (("requirements", locked), ("torch", torch), ("cuda", cuda)):
        text = (ROOT / "docker" / f"{file}.lock").read_text(encoding="utf-8")
        entries = re.split(r"^(?=[a-zA-Z])", text, flags=re.MULTILINE)[1:]
        assert len(entries) == len(pinned)
        assert all("--hash=sha256:" in entry for entry in entries)


def test_nothing_is_installed_into_the_image_but_what_the_locks_hold() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert text.count("pip install") == 1  # defines $install
    assert "--only-binary :all: --no-deps --require-hashes" in text
    named = re.findall(r"\$install((?: -r [a-z]+\.lock)+)", text)
    files = {word for words in named for word in words.split() if word != "-r"}
    assert files == {file.name for file in (ROOT / "docker").glob("*.lock")}


@pytest.mark.parametrize(("version", "cuda"), [("2.13.0+cpu", False), ("2.13.0", True)])
@pytest.mark.parametrize("wheels", [False, True])
def test_cudas_libraries_are_installed_with_a_torch_that_needs_them(
    tmp_path: Path, version: str, cuda: bool, wheels: bool
) -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    match = re.search(r"^RUN (cd /wheelhouse(?:.*\\\n)+.*)$", text, re.MULTILINE)
    assert match is not None
    folder, asked = tmp_path / "wheelhouse", tmp_path / "asked"
    folder.mkdir()
    if wheels:
        (folder / "torch.whl").touch()
    stand_in = tmp_path / "python"
    shown = f"Name: torch\\nVersion: {version}\\nRequires: filelock"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nprintf "{shown}\\n"\n')
    stand_in.chmod(0o755)

    script = match[1].replace("/wheelhouse", str(folder))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["sh", "-e", "-c", script], env=environment, check=True, capture_output=True)

    installs = [line for line in asked.read_text().splitlines() if " install " in line]
    files = [re.findall(r"-r (\S+)", line) for line in installs]
    assert files == [["requirements.lock", "torch.lock"], *([["cuda.lock"]] * cuda)]
    assert all(("--no-index --find-links ." in line) == wheels for line in installs)
    assert not folder.exists()


IMPORTED = """
import sys
from importlib import metadata
import client.app, server.app
packages = {name.partition(".")[0] for name in sys.modules}
known = metadata.packages_distributions()
print(*{name for package in packages for name in known.get(package, [])})
"""


def test_the_image_holds_what_the_apps_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = {re.sub(r"[-_.]+", "-", name).lower() for name in done.stdout.split()}
    held = pins("docker/requirements.lock").keys() | pins("docker/torch.lock").keys()
    # Torch imports these if they happen to be there, and Python 3.11 brings setuptools along.
    assert imported - held - {"none-defense"} <= {"opt-einsum", "setuptools", "tqdm"}


@pytest.mark.parametrize(("works_with", "asked"), [("1", "1"), ("0", "10"), ("never", "10")])
def test_an_image_is_built_without_buildkit_where_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works_with: str, asked: str
) -> None:
    program = tmp_path / "docker-compose"
    program.write_text(
        f'#!/bin/sh\nprintf %s "$DOCKER_BUILDKIT" >> {tmp_path}/asked\n'
        f'echo "$@" >> {tmp_path}/words\ntest "$DOCKER_BUILDKIT" = {works_with}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with (tmp_path / "log").open("wb") as log:
        compose = Compose({}, "honest", log)
        if works_with == "never":
            with pytest.raises(FlowerError, match="`docker-compose build superlink` exited with 1"):
                compose.build("superlink")
        else:
            compose.build("superlink")
    assert (tmp_path / "asked").read_text() == asked
    assert (
        (tmp_path / "words")
        .read_text()
        .splitlines()[0]
        .endswith("--profile honest build superlink")
    )


@pytest.mark.parametrize("cuda", [False, True])
def test_an_image_without_cuda_is_given_less_memory_unless_somebody_said_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    """The stand-in runs what it is told, so that the question itself is asked, and not in vain."""
    program = tmp_path / "docker-compose"
    program.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        f"case $* in *' run '*) exec {sys.executable} -S -c \"$last\";; esac\n"
        f'echo "$PARTICIPANT_MEMORY $SERVER_APP_MEMORY" >> {tmp_path}/granted\n'
    )
    program.chmod(0o755)
    (tmp_path / "packages" / ("nvidia" if cuda else "other")).mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SERVER_APP_MEMORY", "2g")
    with (tmp_path / "log").open("wb") as log:
        compose = Compose({}, "honest", log)
        assert compose.grant_memory("superlink") is not cuda
        compose("up")
    granted = (tmp_path / "granted").read_text().strip()
    assert granted == ("2g" if cuda else f"{LEAN['PARTICIPANT_MEMORY']} 2g")


def test_an_image_that_cannot_be_run_is_not_taken_for_one_with_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "docker-compose"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with (tmp_path / "log").open("wb") as log, pytest.raises(FlowerError, match="exited with 1"):
        Compose({}, "honest", log).grant_memory("superlink")
