"""Trace, tabulate and draw: ``python -m benchmarks.scale`` (minutes; no hardware, no data).

Writes ``benchmarks/results/DATE-scale.json``, the tables of ``docs/scale.md`` and
``docs/images/scale.png``. ``--render`` does the tables and the picture again from the last record.
Peers are traced where they can be imported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import peers, render, tracing
from distclip import policies
from distclip.policies import Policy

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scale.md"
PICTURE = ROOT / "docs" / "images" / "scale.png"
RESULTS = ROOT / "benchmarks" / "results"

LOOSE = 1e9
"""Thresholds that never clip: the gradients of ranks that are not there are not there either."""

POLICIES: dict[str, Policy] = {
    "global_norm": policies.global_norm(LOOSE),
    "parameter_norm, p=inf": policies.parameter_norm(LOOSE, float("inf")),
    "agc": policies.agc(LOOSE),
    'agc(unit="tensor")': policies.agc(LOOSE, unit="tensor"),
}

CASES = [
    (1024, "fsdp2", "8B"),
    (1024, "hsdp", "8B"),
    (1024, "fsdp2_tp", "8B"),
    (16384, "fsdp2", "405B"),
    (16384, "hsdp", "8B"),
    (16384, "fsdp2_tp", "405B"),
    (16384, "fsdp2_ep", "671B"),
]
MODELS = {"8B": tracing.LLAMA_8B, "405B": tracing.LLAMA_405B, "671B": tracing.DEEPSEEK_671B}

PEERS_ON = (1024, 16384)


def trace_ours() -> list[dict[str, Any]]:
    """Every case and policy, as rank 0."""
    rows = []
    for ranks, layout, model in CASES:
        with tracing.world(ranks):
            dtype = torch.bfloat16 if model in ("405B", "671B") else torch.float32
            mesh = tracing.mesh_of(layout, ranks)
            named = tracing.sharded(MODELS[model], layout, mesh, dtype)
            for name, policy in POLICIES.items():
                taken = asdict(tracing.clipper(named, policy))
                rows.append(
                    {"ranks": ranks, "layout": layout, "model": model, "policy": name, **taken}
                )
                print(ranks, layout, model, name, f"{taken['seconds']:.1f} s", flush=True)
    return rows


def trace_peers() -> list[dict[str, Any]]:
    """Every group of peers in a process of its own."""
    rows = []
    for ranks in PEERS_ON:
        for group in peers.GROUPS:
            command = [sys.executable, "-m", "benchmarks.scale.peers", group, str(ranks)]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
            )
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{group} on {ranks} ranks: exit code {done.returncode}")
            for peer in json.loads(done.stdout.splitlines()[-1]):
                rows.append({"ranks": ranks, **peer})
                print(ranks, peer["name"], flush=True)
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--render", action="store_true", help="from the last record")
    if not parser.parse_args().render:
        document = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "distclip": trace_ours(),
            "peers": trace_peers(),
        }
        file = RESULTS / f"{document['date']}-scale.json"
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    document = json.loads(last_record().read_text(encoding="utf-8"))
    PAGE.write_text(render.fill(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
    render.draw(document, PICTURE)


def last_record() -> Path:
    """The newest recorded trace."""
    return max(RESULTS.glob("*-scale.json"))


if __name__ == "__main__":
    main()
