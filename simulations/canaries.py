"""`python -m xfed.simulations.canaries`: the installed mechanism on canaries, for the one-run audit.

::

    INCLUDED.npy (bool [m]: which canaries take part) --> per step of each event: Mechanism.sample, sum of their unit
        vectors x clip, Mechanism.release --> OUT.npy float32 [all steps, m], events in the order given

A canary is a patient whose clipped gradient is one coordinate alone (Dirac): nothing is easier to see, so what an attacker
finds here bounds what any can find from below. This is the audited software in a box: `xfed-audit empirical` draws who takes
part, starts it, and guesses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from xfed.common.console import run_app
from xfed.common.errors import ConfigError, DataError
from xfed.common.mechanism import SecretMechanism

__all__ = ["main"]

app = typer.Typer(add_completion=False)


@app.command()
def canaries(
    included: Annotated[Path, typer.Argument(help="bool [m], .npy")],
    out: Annotated[Path, typer.Argument(help="float32 [steps, m], .npy")],
    event: Annotated[
        list[str],
        typer.Option(help="Q,SIGMA,STEPS: sampling rate, noise multiplier that is run, releases. Several times."),
    ],
    clip: Annotated[float, typer.Option(help="Sensitivity.")] = 1.0,
) -> None:
    """Run the mechanism on the canaries."""
    try:
        taking_part = np.load(included, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{included} is not an array of canaries ({error})") from error
    events = [_event(text) for text in event]
    chosen, mechanism = np.flatnonzero(taking_part), SecretMechanism()
    released = np.zeros((sum(steps for _, _, steps in events), len(taking_part)), np.float32)
    rows = iter(released)
    for q, sigma, steps in events:
        for _ in range(steps):
            total = torch.zeros(len(taking_part))
            total[torch.from_numpy(chosen[mechanism.sample(len(chosen), q)])] = clip
            next(rows)[:] = mechanism.release({"sum": total}, sensitivity=clip, sigma=sigma)["sum"].numpy()
    np.save(out, released)


def _event(text: str) -> tuple[float, float, int]:
    try:
        q, sigma, steps = text.split(",")
        return float(q), float(sigma), int(steps)
    except ValueError as error:
        raise ConfigError(f"--event {text!r:.80}: write it as Q,SIGMA,STEPS, for instance 0.05,1.2,400") from error


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
