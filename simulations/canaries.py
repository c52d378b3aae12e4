"""`python -m xfed.simulations.canaries`: the installed mechanism on canaries, for the one-run audit.

::

    INCLUDED.npy (bool [m]: which canaries take part) --> per step: Mechanism.sample, sum of their unit vectors x clip,
        Mechanism.release --> OUT.npy float32 [steps, m]

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
from xfed.common.errors import DataError
from xfed.common.mechanism import SecretMechanism

__all__ = ["main"]

app = typer.Typer(add_completion=False)


@app.command()
def canaries(
    included: Annotated[Path, typer.Argument(help="bool [m], .npy")],
    out: Annotated[Path, typer.Argument(help="float32 [steps, m], .npy")],
    q: Annotated[float, typer.Option(help="Sampling rate.")] = 1.0,
    sigma: Annotated[float, typer.Option(help="Noise multiplier that is run.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Releases.")] = 1,
    clip: Annotated[float, typer.Option(help="Sensitivity.")] = 1.0,
) -> None:
    """Run the mechanism on the canaries."""
    try:
        chosen = np.flatnonzero(np.load(included, allow_pickle=False))
        count = len(np.load(included, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"{included} is not an array of canaries ({error})") from error
    mechanism, released = SecretMechanism(), np.zeros((steps, count), np.float32)
    for step in range(steps):
        total = torch.zeros(count)
        total[torch.from_numpy(chosen[mechanism.sample(len(chosen), q)])] = clip
        released[step] = mechanism.release({"sum": total}, sensitivity=clip, sigma=sigma)["sum"].numpy()
    np.save(out, released)


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
