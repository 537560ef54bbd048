"""Counting the picks of a preference study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .build import STUDY_FORMAT, key_file

NOTE = (
    "The intervals (Wilson) take picks as independent. Picks of one person, and picks for one prompt, are alike, so the true intervals are "
    "wider."
)


class Share(NamedTuple):
    """Picks of a method, their share of all picks and the ends of the share's 95 % interval."""

    method: str
    picks: int
    share: float
    low: float
    high: float


class Tally(NamedTuple):
    study: str
    people: int
    picks: int
    shares: list[Share]  # most picks first


def wilson(picks: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Ends of Wilson's score interval of the share picks / total (Wilson 1927); z = 1.96 for 95 %.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    share = picks / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def tally(results: Sequence[Path], study: Path) -> Tally:
    """Count the results of the study in the folder `study`, whose key lies beside it.

    Raises:
        ValueError: no key, or a result that is malformed, belongs to another study or to a participant who was counted already.
    """
    key = _read_key(study)
    counts = [0] * len(key["methods"])
    seen: dict[str, Path] = {}
    for file in results:
        participant, picks = _read_result(file, key, study)
        if participant in seen:
            raise ValueError(f"{file}: found participant {participant}, who is in {seen[participant]} already; wanted each once")
        seen[participant] = file
        for asset in picks:
            counts[key["assets"][asset][1]] += 1
    total = sum(counts)
    shares = [Share(method, count, count / total, *wilson(count, total)) for method, count in zip(key["methods"], counts)]
    return Tally(key["study"], len(results), total, sorted(shares, key=lambda share: -share.picks))


def spelled(found: Tally) -> str:
    """The tally as a table of text."""
    width = max(len(share.method) for share in found.shares)
    lines = [f"Study {found.study}: {_many(found.people, 'person', 'people')}, {_many(found.picks, 'pick', 'picks')}"]
    lines.append(f"{'method':{width}}  picks    share  95 % interval")
    for share in found.shares:
        lines.append(f"{share.method:{width}}  {share.picks:5d}  {share.share:7.2%}  {share.low:.2%} to {share.high:.2%}")
    return "\n".join([*lines, NOTE])


def _many(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}), wanted a result that the study's page has saved") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file}: found {type(data).__name__}, wanted a JSON object")
    return data


def _read_key(study: Path) -> dict[str, Any]:
    file = key_file(study)
    if not file.is_file():
        raise ValueError(f"--gallery: found no {file}, wanted the folder that `gallery.py ... --study` wrote, with its key beside it")
    key = _read_json(file)
    if key.get("format") != STUDY_FORMAT + " key":
        raise ValueError(f"{file}: format: found {key.get('format')!r}, wanted {STUDY_FORMAT + ' key'!r}")
    return key


def _read_result(file: Path, key: dict[str, Any], study: Path) -> tuple[str, list[str]]:
    """The participant and the asset picked for each prompt."""
    result = _read_json(file)
    if result.get("format") != STUDY_FORMAT + " result":
        raise ValueError(f"{file}: format: found {result.get('format')!r}, wanted {STUDY_FORMAT + ' result'!r}")
    if result.get("study") != key["study"]:
        raise ValueError(f"{file}: study: found {result.get('study')!r}, wanted {key['study']!r}, which is that in {study}")
    participant = result.get("participant")
    if not isinstance(participant, str) or not participant:
        raise ValueError(f"{file}: participant: found {participant!r}, wanted the name that the page drew")
    given = result.get("picks")
    if not isinstance(given, list) or not all(isinstance(item, dict) and isinstance(item.get("pick"), str) for item in given):
        raise ValueError(f"{file}: picks: found {given!r:.80}, wanted a list of objects with a pick")
    picks = [item["pick"] for item in given]
    unknown = [asset for asset in picks if asset not in key["assets"]]
    if unknown:
        raise ValueError(f"{file}: picks: found {unknown[0]!r}, wanted models of study {key['study']}")
    rows = sorted(key["assets"][asset][0] for asset in picks)
    if rows != list(range(len(key["prompts"]))):
        raise ValueError(f"{file}: picks: found {len(rows)} for {len(set(rows))} prompts, wanted one for each of {len(key['prompts'])}")
    return participant, picks
