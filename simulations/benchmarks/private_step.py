"""What patient-level privacy costs in one discriminator step: time, memory, and the share of the noise.

::

    time      D, 2B images --> plain step: forward, backward, Adam ----------------------------+--> ratio per pair
                           --> private step: clipped_sum("fast"), release, / 2B, Adam ---------+    --> median, spread
                           --> release alone, on sums of D's size                              --> share of the plain step
    memory    one fresh process per engine: D and images made (baseline) --> one step --> peak; added = peak - baseline

Like with like: all steps take the same B reals and B fakes (no generator runs), float32, fused Adam. "fast" and the plain step
run in channels_last, Opacus' hooks in the standard layout, which is the only one that it computes rightly. Sides take turns
(A B, B A, ...), so a noise of the machine that lasts longer than a turn meets both. Run
``python -m xfed.simulations.benchmarks.private_step --help``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import softplus

from xfed.common.console import run_app
from xfed.common.dcgan import Discriminator
from xfed.common.devices import choose_device
from xfed.common.mechanism import SecretMechanism
from xfed.common.per_patient import clipped_sum
from xfed.simulations.benchmarks.speed import Clock, machine

__all__ = ["Cost", "Load", "added_mib", "added_mib_here", "measure"]

WIDTHS = {64: 64, 128: 64, 256: 32}
PLAIN = "non-private"
ENGINES = (PLAIN, "fast", "opacus")
CLIP = 1.0
SIGMA = 1.0
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Load:
    """One discriminator and its batch: `batch` reals and as many fakes."""

    size: int
    width: int
    batch: int
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of neighbouring turns, and MiB added by one step per engine."""

    load: Load
    plain: tuple[float, ...]
    private: tuple[float, ...]
    noise: tuple[float, ...]
    added_mib: dict[str, float]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Private over non-private seconds, per pair."""
        return tuple(a / b for a, b in zip(self.private, self.plain, strict=True))

    @property
    def noise_shares(self) -> tuple[float, ...]:
        """Seconds of the noise over those of the non-private step next to it."""
        return tuple(a / b for a, b in zip(self.noise, self.plain, strict=True))

    @property
    def memory_ratio(self) -> float | None:
        """Peak of "fast" over that of Opacus' hooks; None where memory was not measured."""
        return self.added_mib["fast"] / self.added_mib["opacus"] if self.added_mib else None


def _layout(engine: str) -> torch.memory_format:
    return torch.contiguous_format if engine == "opacus" else torch.channels_last


def _made(load: Load, engine: str) -> tuple[Discriminator, Tensor]:
    rng = torch.Generator().manual_seed(1)
    model = Discriminator(load.size, load.width, rng)
    images = torch.rand(2 * load.batch, 1, load.size, load.size, generator=rng) * 2 - 1
    layout = _layout(engine)
    moved = model.to(load.device, memory_format=layout)  # type: ignore[call-overload]
    return moved, images.to(load.device).contiguous(memory_format=layout)


def _losses(logits: Tensor) -> Tensor:
    real, fake = logits.chunk(2)
    return torch.cat([softplus(-real), softplus(fake)])


def _step(load: Load, engine: str) -> Step:
    """One D step with `engine`, or without privacy."""
    model, images = _made(load, engine)
    adam = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.5, 0.999), fused=True)
    mechanism = SecretMechanism()

    def plain() -> None:
        adam.zero_grad(set_to_none=True)
        (_losses(model(images)).sum() / len(images)).backward()  # type: ignore[no-untyped-call]
        adam.step()

    def private() -> None:
        sums = clipped_sum(engine)(model, images, _losses, CLIP)
        noised = mechanism.release(sums, sensitivity=CLIP, sigma=SIGMA)
        for name, parameter in model.named_parameters():
            parameter.grad = noised[name] / len(images)
        adam.step()

    return plain if engine == PLAIN else private


def _release(load: Load) -> Step:
    model, _ = _made(load, "fast")
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    mechanism = SecretMechanism()

    def release() -> None:
        mechanism.release(sums, sensitivity=CLIP, sigma=SIGMA)

    return release


def _seconds(step: Step, device: str, clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    began = now()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - began


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def added_mib_here(load: Load, engine: str) -> float:
    """MiB that the first step adds to this process at its highest; only a fresh process gives a clean answer."""
    if engine == "opacus":
        # what its import takes belongs to the baseline
        import opacus.grad_sample  # noqa: F401
    small = Load(size=8, width=4, batch=2, device=load.device)
    _step(small, engine)()
    step = _step(load, engine)
    before = _peak_mib(load.device)
    step()
    return _peak_mib(load.device) - before


def added_mib(load: Load, engine: str) -> float:
    """`added_mib_here` in a fresh Python. Raises `subprocess.CalledProcessError` when that fails."""
    code = (
        "import json, sys, torch; torch.set_num_threads(1); "
        "from xfed.simulations.benchmarks.private_step import Load, added_mib_here; "
        "print(added_mib_here(Load(**json.loads(sys.argv[1])), sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(load)), engine],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(load: Load, *, repeats: int, clock: str, memory: bool) -> Cost:
    """Each side warmed up, then `repeats` rounds of one step each, the first place alternating."""
    sides = {"plain": _step(load, PLAIN), "private": _step(load, "fast"), "noise": _release(load)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        _seconds(step, load.device, clock)
    for repeat in range(repeats):
        for name in sides if repeat % 2 == 0 else reversed(sides):
            found[name].append(_seconds(sides[name], load.device, clock))
    sides.clear()
    return Cost(
        load=load,
        **{name: tuple(values) for name, values in found.items()},
        added_mib={engine: added_mib(load, engine) for engine in ENGINES} if memory else {},
    )


def _spread(values: tuple[float, ...], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def private_step(
    size: Annotated[list[int] | None, typer.Option(help="image side: 64, 128 or 256; repeat the option")] = None,
    width: Annotated[int, typer.Option(help="channels next to the image; 0: 64, and 32 at 256 px", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="reals, and as many fakes", min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's choice", min=0)] = 1,
    memory: Annotated[bool, typer.Option(help="measure the peak of memory too, in processes of its own")] = True,
    clock: Annotated[
        Clock, typer.Option(help="cpu: processor seconds of this process, for a shared machine; use with --threads 1")
    ] = Clock.wall,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """A private discriminator step against a non-private one, and its memory against Opacus' hooks."""
    if threads:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    found = []
    for side in size or [64, 256]:
        load = Load(size=side, width=width or WIDTHS.get(side, 32), batch=batch, device=chosen.type)
        found.append(measure(load, repeats=repeats, clock=clock.value, memory=memory))
    if as_json:
        results: list[dict[str, Any]] = [
            {**asdict(one), "ratios": one.ratios, "noise_shares": one.noise_shares, "memory_ratio": one.memory_ratio}
            for one in found
        ]
        print(json.dumps({"machine": machine(chosen), "results": results}, indent=2))
        return
    table = Table(title=f"One D step, {batch} reals + {batch} fakes ({clock.value} clock): median \\[least, greatest]")
    for heading in (
        "size",
        "width",
        "non-private s",
        "private s",
        "ratio",
        "noise share",
        "added MiB",
        "fast / Opacus",
    ):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(
            str(one.load.size),
            str(one.load.width),
            _spread(one.plain, 3),
            _spread(one.private, 3),
            _spread(one.ratios),
            _spread(one.noise_shares),
            ", ".join(f"{engine} {value:.0f}" for engine, value in one.added_mib.items()) or "-",
            "-" if one.memory_ratio is None else f"{one.memory_ratio:.2f}",
        )
    console = Console(width=150)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine(chosen).items()), highlight=False)


if __name__ == "__main__":
    run_app(app)
