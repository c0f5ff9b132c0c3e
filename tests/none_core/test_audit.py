"""A trail that anybody has touched is found out, and what a run was killed at is explained."""

from __future__ import annotations

import copy
import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from none_core import audit, snapshot, trail
from none_core.audit import ALTERED, INTACT, UNREADABLE, UNSIGNED, main, verify
from none_core.neurons import NeuronMap
from none_core.snapshot import plain
from none_core.trail import Trail, TrailError, canonical, digest_of_model, digest_of_record
from none_core.undo import Undo

State = dict[str, Tensor]
NEURONS = {2: [1, 6], 3: [0]}  # what rounds 2 and 3 reset ...
REPAIRED = {3: {"5.weight": [1]}, 4: {"5.weight": [0, 1], "0.bias": [2]}}  # ... and 3 and 4 repair


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
            nn.Linear(4, 2),
        ).eval()


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def play(log: Trail, server_round: int) -> None:
    """Leave behind what a round does."""
    model = net(server_round)
    before = state_of(model)
    neurons = NeuronMap.trace(model, torch.zeros(2, 3))
    reset = []
    for j in NEURONS.get(server_round, []):
        layer, channel = neurons.label(j)
        reset.append({"layer": layer, "neuron": channel, "rows": neurons.rows(model, j)})
    neurons.reset(model, np.array(NEURONS.get(server_round, []), dtype=int))
    after = state_of(model)
    repaired = REPAIRED.get(server_round, {})
    for name, rows in repaired.items():
        after[name][rows] += 0.5
    if server_round:
        log(
            {
                "round": server_round,
                "decision": "as it wäs, or wörse",
                "reset": reset,
                "how": "zero",
                "repaired_rows": repaired,
                "evidence": {"11": 0.5, "12": float("nan")},
                "aggregated": digest_of_model(before),
                "released": digest_of_model(after),
            }
        )
    for path in (
        trail.checkpoint_of(log.file, server_round),
        trail.undo_of(log.file, server_round),
    ):
        path.parent.mkdir(exist_ok=True)
    if reset or repaired:
        undo = Undo.between(before, after)
        snapshot.write(trail.undo_of(log.file, server_round), plain(undo, [Undo]))
    log.append(trail.RELEASED, round=server_round, model=digest_of_model(after))
    torch.save(after, trail.checkpoint_of(log.file, server_round))


def played(folder: Path, *, close: bool = True, rounds: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = Trail(folder / "audit.jsonl")
    log.open(run={"seed": 0})
    for server_round in range(rounds):
        play(log, server_round)
    if close:
        log.close(rounds=rounds - 1)
    return log.file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(tmp_path_factory.mktemp("run"))


@pytest.fixture
def file(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole.parent, tmp_path / "copy")) / whole.name


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def records_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(file)]


def write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_bytes(b"".join(canonical(record) + b"\n" for record in records))


def chained(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in a chain without fault, as anybody can make it."""
    head, made = trail.NOTHING, []
    for number, record in enumerate(records):
        made.append(record | {"number": number, "previous": head})
        made[-1]["digest"] = head = digest_of_record(made[-1])
    return made


# --- an honest trail ------------------------------------------------------------------------------


def test_a_run_leaves_an_intact_trail(whole: Path, capsys: Any) -> None:
    assert main(["verify", str(whole)]) == INTACT
    printed = capsys.readouterr().out
    assert "intact and signed: 11 records up to round 4, 5 checkpoints are the models" in printed
    assert "3 times resets or repairs explain" in printed
    assert "note" not in printed


def test_records_are_json_for_everybody(whole: Path) -> None:
    records = records_of(whole)
    assert [r["kind"] for r in records] == [
        "opened",
        "released",
        *["round", "released"] * 4,
        "closed",
    ]
    assert records[2]["decision"] == "as it wäs, or wörse"
    assert records[2]["evidence"] == {"11": 0.5, "12": None}


def test_the_private_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    file = played(tmp_path)
    key = file.with_suffix(".key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    played(tmp_path)
    assert key.read_bytes() == before
    assert before not in file.with_suffix(".pub").read_bytes()
    assert verify(file).status == INTACT


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    trail.private_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(TrailError, match="others may read"):
        Trail(tmp_path / "audit.jsonl", tmp_path / "key").open()


@pytest.mark.parametrize(
    "text", ["", "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(text)
    with pytest.raises(TrailError, match="holds no private key"):
        Trail(tmp_path / "audit.jsonl", tmp_path / "key").open()


# --- tampering ------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field of a record, however deep."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def other(value: Any) -> Iterator[Any]:
    """What might stand there instead."""
    match value:
        case bool():
            yield not value
        case int() | float():
            yield from (value + 1, -1, str(value))
        case str():
            yield from (value + "x", value[1:] if value else "x", value.swapcase() + "0")
        case None:
            yield 0
        case list():
            yield from ([*value, 0], value[:-1] if value else [[]])
        case dict():
            yield from (value | {"new": 1}, *([{}] if value else []))


def set_at(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    target: Any = record
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return record


def tampered(records: list[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for number, record in enumerate(records):
        for path in places(record):
            value = record
            for key in path:
                value = value[key]
            for new in other(value) if path else [{}, record | {"new": 1}]:
                changed = set_at(record, path, new) if path else new
                yield number, [*records[:number], changed, *records[number + 1 :]]


def test_a_changed_field_is_found_whichever_it_is(file: Path) -> None:
    records, tried = records_of(file), 0
    for number, changed in tampered(records):
        write(file, changed)
        assert verify(file).status in (ALTERED, *([] if number else [UNREADABLE]))
        tried += 1
    assert tried > 300


def test_a_changed_field_is_found_even_if_all_digests_are_made_to_fit(file: Path) -> None:
    """The signature holds what the chain cannot."""
    records, tried = records_of(file), 0
    for number, changed in tampered(records):
        changed = chained(changed)
        if changed == records:  # what was changed is what is computed
            continue
        write(file, changed)
        assert verify(file).status in (ALTERED, *([] if number else [UNREADABLE]))
        tried += 1
    assert tried > 200


def test_a_changed_byte_is_found_wherever_it_is(file: Path) -> None:
    whole = file.read_bytes()
    for place in range(0, len(whole) - 1, 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert verify(file).status in (ALTERED, UNREADABLE)


@pytest.mark.parametrize("spoil", [
    lambda lines: [lines[1], lines[0], *lines[2:]],
    lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    lambda lines: [*lines[:4], *lines[5:]],
    lambda lines: lines[1:],
    lambda lines: [*lines[:4], lines[3], *lines[4:]],
    lambda lines: [*lines, lines[-1]],
    lambda lines: [*lines[:3], b"\n", *lines[3:]],
    lambda lines: [*lines[:3], b"{\n", *lines[3:]],
    lambda lines: [lines[0].replace(b'","', b'", "'), *lines[1:]],
    lambda lines: [b'{"kind":"x",' + lines[0][1:], *lines[1:]],
])  # fmt: skip
def test_lines_elsewhere_are_found(file: Path, spoil: Callable[[list[bytes]], list[bytes]]) -> None:
    file.write_bytes(b"".join(spoil(lines_of(file))))
    assert verify(file).status in (ALTERED, UNREADABLE)


def test_a_trail_that_is_cut_off_is_unsigned_wherever_the_cut_is(file: Path) -> None:
    whole = file.read_bytes()
    first, last = len(lines_of(file)[0]), len(whole) - 1
    for length in [*range(first, last, 53), last - 1]:
        file.write_bytes(whole[:length])
        verdict = verify(file)
        assert verdict.status == UNSIGNED
        torn = whole[:length].rpartition(b"\n")[2]
        is_torn = bool(torn) and torn + b"\n" not in lines_of_bytes(whole)
        assert any("is torn" in note for note in verdict.notes) == is_torn
    file.write_bytes(whole[:last])  # without the newline, it is all there
    assert verify(file).status == INTACT


def lines_of_bytes(text: bytes) -> list[bytes]:
    return text.splitlines(keepends=True)


@pytest.mark.parametrize("how", ["beside", "inside", "resigned"])
def test_another_key_is_found(file: Path, tmp_path: Path, how: str) -> None:
    (tmp_path / "mine").mkdir()
    original = shutil.copy(file.with_suffix(".pub"), tmp_path / "original.pub")
    mine = played(tmp_path / "mine")
    if how in ("beside", "resigned"):
        shutil.copy(mine.with_suffix(".pub"), file.with_suffix(".pub"))
    if how in ("inside", "resigned"):
        records = records_of(file)
        records[0]["public_key"] = records_of(mine)[0]["public_key"]
        records = chained(records)
        key = trail.private_key(mine.with_suffix(".key"))
        if how == "resigned":
            records[-1]["signature"] = key.sign(trail.signed_part(records[-1])).hex()
        write(file, chained(records))
    # Who holds a key can write a trail; only a key from elsewhere can tell.
    assert verify(file).status == (INTACT if how == "resigned" else ALTERED)
    assert verify(file, Path(original)).status == (INTACT if how == "beside" else ALTERED)


def test_a_signature_by_another_key_is_found(file: Path) -> None:
    records = records_of(file)
    signature = Ed25519PrivateKey.generate().sign(trail.signed_part(records[-1])).hex()
    write(file, chained([*records[:-1], records[-1] | {"signature": signature}]))
    assert verify(file).status == ALTERED


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"[]\n", b"{}\n", b"1", None])
def test_what_is_no_trail_is_unreadable(tmp_path: Path, content: bytes | None, capsys: Any) -> None:
    if content is not None:
        (tmp_path / "audit.jsonl").write_bytes(content)
    assert main(["verify", str(tmp_path / "audit.jsonl")]) == UNREADABLE
    assert "audit.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN"])
def test_without_a_public_key_it_is_unreadable(file: Path, content: bytes | None) -> None:
    key = file.with_suffix(".pub")
    key.unlink() if content is None else key.write_bytes(content)
    assert verify(file).status == UNREADABLE


# --- models ---------------------------------------------------------------------------------------


def spoil_checkpoint(file: Path, server_round: int, name: str, row: int) -> None:
    path = trail.checkpoint_of(file, server_round)
    state = torch.load(path, weights_only=True)
    state[name][row] += 1
    torch.save(state, path)


@pytest.mark.parametrize("server_round", range(5))
def test_another_model_than_was_released_is_found(file: Path, server_round: int) -> None:
    spoil_checkpoint(file, server_round, "5.weight", 0)
    verdict = verify(file)
    assert verdict.status == ALTERED
    assert f"checkpoint of round {server_round} is not what was released" in verdict.reason


def resigned(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Write what a server would have that decided otherwise."""
    records = records_of(file)
    change(records)
    key = trail.private_key(file.with_suffix(".key"))
    records = chained(records)
    records[-1]["signature"] = key.sign(trail.signed_part(records[-1])).hex()
    write(file, chained(records))


def round_of(records: list[dict[str, Any]], server_round: int) -> dict[str, Any]:
    return next(r for r in records if r["kind"] == "round" and r["round"] == server_round)


def test_a_reset_of_more_than_is_recorded_is_found(file: Path) -> None:
    resigned(file, lambda records: round_of(records, 2)["reset"].pop())
    verdict = verify(file)
    assert verdict.status == ALTERED
    assert "belongs to nothing that it says it reset or repaired" in verdict.reason


def test_a_repair_of_more_than_is_recorded_is_found(file: Path) -> None:
    resigned(file, lambda records: round_of(records, 3)["repaired_rows"].clear())
    assert "changed row 1 of 5.weight" in verify(file).reason


def test_another_aggregated_model_than_is_recorded_is_found(file: Path) -> None:
    resigned(file, lambda records: round_of(records, 2).update(aggregated="0" * 64))
    assert "does not lead to the aggregated model" in verify(file).reason


def test_a_change_without_a_reset_is_found(file: Path) -> None:
    resigned(file, lambda records: round_of(records, 1).update(aggregated="0" * 64))
    assert "reset nothing, but changed the model" in verify(file).reason


def test_a_round_without_a_model_releases_the_last_one(file: Path) -> None:
    nothing = dict.fromkeys(("aggregated", "released"))
    resigned(file, lambda records: round_of(records, 1).update(nothing))
    assert "released another model than it decided on" in verify(file).reason


@pytest.mark.parametrize("how", ["damaged", "another's", "extra", "out of range", "no tensor"])
def test_a_way_back_that_is_not_what_was_changed_is_found(file: Path, how: str) -> None:
    kept = trail.undo_of(file, 2)
    undo = snapshot.restored(snapshot.read(kept), [Undo])
    if how == "damaged":
        kept.write_bytes(kept.read_bytes()[:100])
    elif how == "another's":
        shutil.copy(trail.undo_of(file, 3), kept)
    elif how == "extra":  # rows that did not change lead back, too
        released = torch.load(trail.checkpoint_of(file, 2), weights_only=True)
        undo.rows["5.weight"] = np.array([0])
        undo.values["5.weight"] = released["5.weight"][:1]
        snapshot.write(kept, plain(undo, [Undo]))
    elif how == "out of range":
        undo.rows["0.weight"] = np.array([99] * len(undo.rows["0.weight"]))
        snapshot.write(kept, plain(undo, [Undo]))
    else:
        undo.rows["nowhere"] = np.array([0])
        snapshot.write(kept, plain(undo, [Undo]))
    assert verify(file).status == ALTERED


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_checkpoint_that_cannot_be_read_is_found(file: Path, content: bytes) -> None:
    trail.checkpoint_of(file, 1).write_bytes(content)
    assert verify(file).status == ALTERED


def test_models_that_are_gone_are_said_to_be_unchecked(file: Path, capsys: Any) -> None:
    trail.checkpoint_of(file, 1).unlink()
    trail.undo_of(file, 2).unlink()
    assert main(["verify", str(file)]) == INTACT
    printed = capsys.readouterr().out
    assert "4 checkpoints" in printed
    assert "not compared: 1 rounds" in printed
    assert "what round 2 changed is not kept any more" in printed


# --- undoing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_round", [2, 3, 4])
def test_a_reset_or_a_repair_can_be_undone(file: Path, server_round: int, capsys: Any) -> None:
    assert main(["undo", str(file), "--round", str(server_round)]) == INTACT
    written = torch.load(file.parent / f"before-reset-{server_round:04d}.pt", weights_only=True)
    expected = state_of(net(server_round))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert f"before round {server_round} reset" in capsys.readouterr().out


def test_undoing_writes_where_it_is_told_to(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.pt"
    assert main(["undo", str(file), "--round", "2", "--out", str(out)]) == INTACT
    assert out.exists()
    assert (
        main(["undo", str(file), "--round", "2", "--out", str(tmp_path / "no" / "x")]) == UNREADABLE
    )


@pytest.mark.parametrize("server_round", [1, 9, -1])
def test_a_round_that_reset_nothing_cannot_be_undone(
    file: Path, server_round: int, capsys: Any
) -> None:
    assert main(["undo", str(file), "--round", str(server_round)]) == UNREADABLE
    assert "changed nothing: rounds 2, 3, 4 did" in capsys.readouterr().err
    assert not list(file.parent.glob("before*"))


def test_an_altered_trail_undoes_nothing(file: Path) -> None:
    file.write_bytes(b"".join(reversed(lines_of(file))))
    assert main(["undo", str(file), "--round", "2"]) != INTACT
    assert not list(file.parent.glob("before*"))


def test_a_killed_runs_reset_can_be_undone(tmp_path: Path) -> None:
    file = played(tmp_path, close=False)
    assert main(["undo", str(file), "--round", "2"]) == INTACT


# --- killed and continued -------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"", b"{", b'{"kind":"round","number":'])
def test_a_killed_run_is_continued(tmp_path: Path, torn: bytes) -> None:
    file = played(tmp_path, close=False, rounds=3)
    with file.open("ab") as stream:
        stream.write(torn)
    verdict = verify(file)
    assert verdict.status == UNSIGNED
    assert bool(verdict.notes) == bool(torn)

    log = Trail(file)
    log.resume(after=1)  # the checkpoint of round 2 was written, but the round was not complete
    play(log, 2)
    play(log, 3)
    log.close()

    verdict = verify(file)
    assert (verdict.status, verdict.notes) == (INTACT, [])
    assert list(verdict.rounds) == [0, 1, 2, 3]
    resumed = next(r for r in records_of(file) if r["kind"] == "resumed")
    assert resumed.get("torn", {}).get("bytes", 0) == len(torn)
    assert [r["round"] for r in records_of(file) if r["kind"] == "round"] == [1, 2, 2, 3]


def test_a_line_without_its_end_is_continued(tmp_path: Path) -> None:
    file = played(tmp_path, close=False, rounds=4)
    file.write_bytes(file.read_bytes()[:-1])
    log = Trail(file)
    log.resume(after=3)
    log.close()
    assert verify(file).status == INTACT
    assert len(records_of(file)) == 10


def test_a_finished_run_is_continued_and_signed_again(file: Path) -> None:
    log = Trail(file)
    log.resume(after=4)
    assert verify(file).status == UNSIGNED
    log.close()
    assert verify(file).status == INTACT


def test_a_round_twice_without_a_resumption_is_found(tmp_path: Path) -> None:
    file = played(tmp_path, close=False, rounds=4)
    log = Trail(file)
    log.resume(after=2)
    play(log, 3)
    log(dict(round_of(records_of(file), 3)))
    assert "repeats round 3" in verify(file).reason


def test_an_altered_trail_is_not_continued(file: Path) -> None:
    lines = lines_of(file)
    file.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    before = file.read_bytes()
    with pytest.raises(TrailError, match="cannot be continued: line 4"):
        Trail(file).resume(after=3)
    assert file.read_bytes() == before


def test_another_runs_trail_is_not_continued(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrailError, match="another key"):
        Trail(file, tmp_path / "another.key").resume(after=3)
    with pytest.raises(TrailError, match="round 9 is not in it"):
        Trail(file).resume(after=9)


# --- a full disk ----------------------------------------------------------------------------------


class FullDisk:
    """Lets some bytes be written, and then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, disk, opened = False, self, Path.open

        class Stream:
            def __init__(self, stream: Any) -> None:
                self.stream = stream

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                self.stream.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.stream, name)

            def write(self, data: bytes) -> int:
                if disk.full and len(data) < 20:
                    raise OSError(28, "No space left on device")
                return int(self.stream.write(data[: len(data) // 2] if disk.full else data))

        monkeypatch.setattr(
            Path, "open", lambda self, *args, **kwargs: Stream(opened(self, *args, **kwargs))
        )


def test_what_a_full_disk_does_not_take_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Trail(tmp_path / "audit.jsonl")
    log.open()
    before = log.file.read_bytes()
    with monkeypatch.context() as patch:
        disk = FullDisk(patch)
        disk.full = True
        log.append(trail.RELEASED, round=0, model="0")
        log.append(trail.RELEASED, round=1, model="1")
        assert log.waiting == 2
        assert log.file.read_bytes() == before  # no half line
        with pytest.raises(OSError, match="No space left"):
            log.close()
        disk.full = False
        log.append(trail.RELEASED, round=2, model="2")
    assert log.waiting == 0
    assert "2 records wait: No space left on device" in caplog.text
    log.close()
    kinds = [r["kind"] for r in records_of(log.file)]
    assert kinds == ["opened", "released", "released", "released", "closed"]
    assert verify(log.file).status == INTACT


def test_what_is_no_json_leaves_the_trail_as_it_was(tmp_path: Path) -> None:
    log = Trail(tmp_path / "audit.jsonl")
    log.open()
    with pytest.raises(TypeError):
        log({"round": 1, "bad": object()})
    log({"round": 1, "reset": [], "aggregated": "", "released": ""})
    log.close()
    assert verify(log.file).status == INTACT


def test_the_digest_of_a_model_is_of_all_of_it() -> None:
    state = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(0),
        "c": torch.tensor(1, dtype=torch.bfloat16),
    }
    digests = [digest_of_model(state)]
    assert digest_of_model(dict(reversed(state.items()))) == digests[0]
    assert digest_of_model({**state, "a": torch.zeros(3, 2).t()}) == digests[0]
    for changed in (
        {**state, "a": torch.zeros(3, 2)},
        {**state, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**state, "c": torch.tensor(2, dtype=torch.bfloat16)},
        {**state, "d": torch.zeros(0)},
        {"a": state["a"], "b": state["b"]},
    ):
        digests.append(digest_of_model(changed))
    assert len(set(digests)) == len(digests)


def test_the_module_says_what_its_exit_status_means(capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        audit.main(["--help"])
    assert exit_.value.code == 0
    assert "0 intact, 1 altered, 2 unreadable, 3 unsigned" in capsys.readouterr().out
