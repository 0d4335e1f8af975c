"""How far a training is, in a line: terminal and notebook show the same."""

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TextIO

Rows = Sequence[Mapping[str, Any]]
"""Of a metrics.jsonl."""


def say(line: str, to: TextIO | None = None) -> None:
    """Print a line of what a long work does. A reader that has gone, as ``head`` or a terminal, or a full disk under
    the log is no reason to stop it: what it prints from then on is lost."""
    to = to or sys.stdout
    try:
        print(line, file=to, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())


def last_round(rows: Rows, since: float = 0.0) -> str:
    """The last round of how many: loss or inertia, audio seconds per second, time left, and which clients were left out
    of it; empty where none came ``since`` (seconds of the epoch)."""
    done = [row for row in rows if row["kind"] in ("round", "lloyd") and row["time"] >= since]
    if not done:
        return ""
    last, rounds = done[-1], max((row["rounds"] for row in rows if row["kind"] == "plan"), default=0)
    words = [f"round {last['round']}" + (f" of {rounds}" if rounds else "")]
    names = {"loss": "loss", "accuracy_masked": "masked accuracy", "inertia": "inertia"}
    words += [f"{word} {last[key]:.4g}" for key, word in names.items() if last.get(key) is not None]
    if last.get("audio_seconds_per_second"):
        words.append(f"{last['audio_seconds_per_second']:.4g} audio s/s")
    if rounds > last["round"]:
        left = (rounds - last["round"]) * sum(row.get("seconds", 0.0) for row in done) / len(done)
        words.append(f"{timedelta(seconds=round(left))} left")
    failures = [row for row in rows if row["kind"] == "failure" and row.get("round") == last["round"]]
    repeated = max((place for place, row in enumerate(failures, 1) if not row["client"]), default=0)
    failures = failures[repeated:]  # of the attempt that succeeded
    others = f" and {more} more" if (more := len({row["client"] for row in failures}) - 1) > 0 else ""
    left_out = f"; left out: {failures[0]['client']} ({failures[0]['reason']:.200}){others}" if failures else ""
    return ", ".join(words) + left_out


def at_work(rows: Rows, since: float = 0.0) -> str:
    """Which client of the cohort that was asked last is at work, and how many of it are done; empty between rounds.
    In 02, where answers take long: how many clients have answered.

    Answers come in the order of client ids: engines with several workers are ahead of this.
    """
    if rows and rows[-1]["kind"] == "answers" and rows[-1]["time"] >= since:
        return "{action}: {clients} of {of} clients done".format_map(rows[-1])
    begun = max((place for place, row in enumerate(rows) if row["kind"] == "cohort"), default=None)
    if begun is None or rows[begun]["time"] < since or any(row["kind"] == "round" for row in rows[begun:]):
        return ""
    cohort, answered = rows[begun]["clients"], {row["client"] for row in rows[begun:] if "client" in row}
    waiting = [client for client in cohort if client not in answered]
    words = f"{waiting[0]} at work, " if waiting else ""
    return f"round {rows[begun]['round']}: {words}{len(cohort) - len(waiting)} of {len(cohort)} clients done"
