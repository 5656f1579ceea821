"""`pico-edge verify`: does model.onnx answer here as it did where it was exported?"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_edge.errors import PicoEdgeError
from pico_edge.terminal import (
    Debug,
    Json,
    Provider,
    Quiet,
    Signals,
    Threads,
    folded,
    print_json,
    say,
    write,
)

INDENT = 21  # of what a check says


def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.onnx made by export.")],
    provider: Provider = "auto",
    threads: Threads = "auto",
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Replay on this device what the file answered at export; exit 1 if it differs."""
    with Signals() as signals:
        from pico_edge.runtime.verify import verify as run

        signals.raise_at_once()
        report = run(model, provider=provider, threads=threads)
    if not quiet:
        for notice in report.get("notices", []):
            say(f"note: {notice}")
    if json_:
        print_json(report)
    else:
        write(_table(report))
    failed = [check["name"] for check in report["checks"] if not check["ok"]]
    if failed:
        raise PicoEdgeError(
            f"{model}: {', '.join(failed)}: not what export recorded: copy the file again, or "
            "export it again; if only this machine differs, please report it"
        )


def _table(report: dict[str, Any]) -> str:
    """One line a check, folded to 80 columns where it names weights."""
    lines = []
    for check in report["checks"]:
        label = f"{'ok' if check['ok'] else 'FAIL':4}  {check['name']}"
        lines += folded(label, check["detail"], indent=INDENT)
    if "provider" in report:
        where = f"{report['provider']} of {platform.machine()}, threads {report['threads']}"
        lines.append(f"      on {where}")
    return "\n".join(lines) + "\n"
