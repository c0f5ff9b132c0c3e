"""Where another paper's defence does better than ours, in the same runs."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from simulations.matrix import Peers, Point

if TYPE_CHECKING:
    from simulations.matrix_report import Findings, Row

# Scores of a run, as the tidy table names them: of the last round, and of the worst of five.
_WHEN = {"last round": "final", "worst of the last 5": "worst_last5"}


class _Pair(NamedTuple):
    """Our defence and a peer, on the seeds that both were run with; in percent."""

    peer: str
    seeds: int
    asr: float
    ba: float
    our_asr: float
    our_ba: float


def beaten(found: Findings, peers: Peers) -> tuple[list[Row], int, int]:
    """Find the places where a peer does better than our defence.

    A place counts when its undefended ASR is above the file's threshold. A peer is better there if
    our ASR is above its own by more than ``asr_within``; or if its ASR is the lowest of the peers',
    or within ``asr_within`` of it, and our BA is below its own by more than ``ba_within``.

    Returns
    -------
    rows : list of dict
        The places where one is, with the best of those that are, by ASR.
    judged, open : int
        Number of places that were judged, and that cannot be yet, since a peer was not run there.
    """
    rows, judged, unknown = [], 0, 0
    for point in found.points:
        if point.defense != peers.defense or point.attack == found.matrix.no_attacker:
            continue
        undefended = found.mean(found.undefended(point), "asr_final")
        if undefended is not None and undefended <= peers.undefended_asr_above:
            continue
        pairs = {when: _pairs(found, peers, point, key) for when, key in _WHEN.items()}
        better = [
            (pair.asr, -pair.ba, when, pair, reason)
            for when, each in pairs.items()
            for pair, reason in _better(each, peers)
        ]
        run = len(pairs["last round"])
        if undefended is None or (not better and run < len(peers.others)):
            unknown += 1
            continue
        judged += 1
        if better:
            *_, when, pair, reason = min(better, key=lambda each: each[:3])
            rows.append(
                _row(found.matrix.spelled(point), undefended, peers, pair, when, reason, run)
            )
    return rows, judged, unknown


def _row(
    where: str, undefended: float, peers: Peers, pair: _Pair, when: str, reason: str, run: int
) -> dict[str, Any]:
    return {
        "where": where,
        "undefended ASR": f"{undefended:.2f}",
        f"{peers.defense}: BA / ASR": f"{pair.our_ba:.2f} / {pair.our_asr:.2f}",
        "best peer": pair.peer,
        "its BA / ASR": f"{pair.ba:.2f} / {pair.asr:.2f}",
        "better by": f"{reason}, {when}",
        "seeds": pair.seeds,
        "peers run": f"{run} of {len(peers.others)}",
    }


def _pairs(found: Findings, peers: Peers, point: Point, when: str) -> list[_Pair]:
    ours, pairs = found.rows(point), []
    for name in peers.others:
        theirs = found.rows(replace(point, defense=name))
        seeds = ours.keys() & theirs.keys()
        if seeds:
            scores = (
                mean(rows[seed][f"{score}_{when}"] for seed in seeds)
                for rows in (theirs, ours)
                for score in ("asr", "ba")
            )
            pairs.append(_Pair(name, len(seeds), *scores))
    return pairs


def _better(pairs: list[_Pair], peers: Peers) -> list[tuple[_Pair, str]]:
    """Return the peers that are better, each with the score by which it is."""
    lowest = min((pair.asr for pair in pairs), default=0.0)
    found = []
    for pair in pairs:
        if pair.our_asr > pair.asr + peers.asr_within:
            found.append((pair, "ASR"))
        elif pair.asr <= lowest + peers.asr_within and pair.our_ba < pair.ba - peers.ba_within:
            found.append((pair, "BA"))
    return found
