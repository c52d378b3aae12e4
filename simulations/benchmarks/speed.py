"""Images per second of one site's training steps, against a plain PyTorch loop that does the same mathematics.

::

    phantoms --> images.npy (memory map) --> xfed's own train_gan_round / train_round -----------------+--> ratio per repeat
             --> one PNG per image --> DataLoader --> float32, NCHW, second G forward, unfused Adam ---+    --> median, spread

Both sides take turns (A B, B A, ...), so a noise of the machine that lasts longer than a turn meets both. The reference is what a
first version looks like: standard DataLoader without workers, Pillow decode per item, D's gradients computed and thrown away in
G's step. Models, losses, batch, augmentation and learning rates are the same. Run
``python -m xfed.simulations.benchmarks.speed --help``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DataLoader, Dataset

from xfed.common.augment import augment
from xfed.common.classifier import prepare, train_round
from xfed.common.config import Gan, Study, parse_study
from xfed.common.console import run_app
from xfed.common.dcgan import Discriminator, Generator, draw_latent
from xfed.common.dcnn import DCNN
from xfed.common.devices import choose_device
from xfed.common.diffaugment import differentiable_augment
from xfed.common.gan import build_generator, new_gan_state, train_gan_round
from xfed.common.randomness import torch_generator
from xfed.common.weights import load_parameters, parameters_of
from xfed.simulations.phantom import phantom_arrays

__all__ = ["Comparison", "Workload", "compare", "machine"]

BATCHES = {32: 64, 64: 64, 128: 16, 256: 8}
POOL = 64
Turn = Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured: one model at one size. `seconds`: how long a turn lasts at least, by `clock` ("wall" or "cpu")."""

    model: str
    size: int
    width: int
    batch: int
    repeats: int
    seconds: float
    device: str
    precision: str
    clock: str = "wall"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Images per second of each repeat, in pairs that ran next to each other."""

    workload: Workload
    xfed: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times the reference's speed, per pair."""
        return tuple(a / b for a, b in zip(self.xfed, self.reference, strict=True))


class _PngFolder(Dataset[tuple[Tensor, int]]):
    """One PNG per image, decoded when asked for: float32 [1, S, S] in [0, 1] and its label."""

    def __init__(self, folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        self._paths = [folder / f"{row:05d}.png" for row in range(len(images))]
        self._labels = labels
        for path, image in zip(self._paths, images, strict=True):
            Image.fromarray(image).save(path)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        with Image.open(self._paths[row]) as image:
            pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255
        return torch.from_numpy(pixels)[None], int(self._labels[row])


def _study(work: Workload) -> Study:
    return parse_study(
        {
            "name": "speed",
            "image_size": work.size,
            "precision": work.precision,
            "gan": {"width": work.width, "batch": work.batch, "steps_per_round": 1},
            "classifier": {"width": work.width, "batch": work.batch},
        },
        "speed benchmark",
    )


def _xfed_gan(study: Study, images: npt.NDArray[np.uint8], device: torch.device) -> Turn:
    state = new_gan_state(study, device, "benchmark", "d")
    load_parameters(state.generator, parameters_of(build_generator(study, ("benchmark", "g"))))
    rows = np.arange(len(images), dtype=np.int64)
    rng = torch_generator(study.seed, "benchmark", "xfed")

    def turn() -> int:
        train_gan_round(state, images, rows, study.gan, rng, study.precision)
        return study.gan.batch

    return turn


def _plain_gan(study: Study, data: _PngFolder, device: torch.device) -> Turn:
    settings = study.gan
    g = cast(Generator, build_generator(study, ("benchmark", "g"))).to(device)
    d = Discriminator(study.image_size, settings.width, torch_generator(study.seed, "benchmark", "d")).to(device)
    betas = (settings.momentum, 0.999)
    adam_g = torch.optim.Adam(g.parameters(), settings.learning_rate_g, betas=betas)
    adam_d = torch.optim.Adam(d.parameters(), settings.learning_rate_d, betas=betas)
    rng = torch_generator(study.seed, "benchmark", "plain")
    batches = _endless(data, settings.batch, rng)

    def turn() -> int:
        real = next(batches)[0].to(device) * 2 - 1
        _plain_gan_step(g, d, adam_g, adam_d, real, settings, rng)
        return len(real)

    return turn


def _plain_gan_step(
    g: Generator,
    d: Discriminator,
    adam_g: torch.optim.Adam,
    adam_d: torch.optim.Adam,
    real: Tensor,
    settings: Gan,
    rng: torch.Generator,
) -> None:
    """The textbook step: D on real and on fake, then G on fakes of its own. The losses are read, as for a log."""

    def seen(batch: Tensor) -> Tensor:
        return differentiable_augment(batch, rng, settings.augment)

    def draw() -> Tensor:
        images: Tensor = g(draw_latent(len(real), settings.latent, rng).to(real.device))
        return images

    adam_d.zero_grad()
    loss_d = softplus(-d(seen(real))).mean() + softplus(d(seen(draw().detach()))).mean()
    loss_d.backward()  # type: ignore[no-untyped-call]
    adam_d.step()
    adam_g.zero_grad()
    loss_g = softplus(-d(seen(draw()))).mean()
    loss_g.backward()  # type: ignore[no-untyped-call]
    adam_g.step()
    loss_d.item(), loss_g.item()


def _classifier(study: Study, device: torch.device) -> DCNN:
    settings = study.classifier
    rng = torch_generator(study.seed, "benchmark", "dcnn")
    return DCNN(study.image_size, len(study.classes), settings.width, settings.dropout, rng).to(device)


def _xfed_classifier(
    study: Study, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], device: torch.device
) -> Turn:
    model = _classifier(study, device)
    rng = torch_generator(study.seed, "benchmark", "xfed")
    steps = 4

    def turn() -> int:
        train_round(
            model,
            images,
            labels,
            None,
            None,
            settings=study.classifier,
            learning_rate=study.classifier.learning_rate,
            steps=steps,
            generator=rng,
            precision=study.precision,
            device=device,
        )
        return steps * study.classifier.batch

    return turn


def _plain_classifier(study: Study, data: _PngFolder, device: torch.device) -> Turn:
    settings = study.classifier
    model = _classifier(study, device).train()
    betas = (settings.momentum, 0.999)
    adam = torch.optim.Adam(model.parameters(), settings.learning_rate, betas=betas, weight_decay=settings.weight_decay)
    rng = torch_generator(study.seed, "benchmark", "plain")
    batches = _endless(data, settings.batch, rng)

    def turn() -> int:
        pixels, targets = next(batches)
        images = augment(pixels.to(device), rng)
        adam.zero_grad()
        loss = cross_entropy(model(prepare(images)), targets.to(device), label_smoothing=settings.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        loss.item()
        return len(pixels)

    return turn


def _endless(data: _PngFolder, batch: int, rng: torch.Generator) -> Any:
    """Shuffled batches [B, 1, S, S] and labels [B], epoch after epoch."""
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True, num_workers=0, generator=rng)
    while True:
        yield from loader


def _speed(turn: Turn, seconds: float, device: torch.device, clock: str) -> float:
    """Images per second of `turn`, called until `seconds` have passed, and once at least."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    began, images = now(), 0
    while images == 0 or now() - began < seconds:
        images += turn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return images / (now() - began)


def compare(work: Workload) -> Comparison:
    """Measure one workload: each side warmed up, then `repeats` pairs of turns, the first place alternating."""
    if work.model not in ("dcgan", "dcnn"):
        raise ValueError(f"the models are dcgan and dcnn, not {work.model!r}")
    device = choose_device(work.device)
    study = _study(work)
    per_class = dict.fromkeys(study.classes, -(-max(POOL, work.batch) // len(study.classes)))
    drawn, labels, _ = phantom_arrays(
        classes=study.classes, patients=per_class, images_per_patient=1.0, size=work.size, seed=study.seed
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", drawn)
        images = np.load(folder / "images.npy", mmap_mode="r")
        data = _PngFolder(folder, drawn, labels)
        if work.model == "dcgan":
            turns = (_xfed_gan(study, images, device), _plain_gan(study, data, device))
        else:
            turns = (_xfed_classifier(study, images, labels, device), _plain_classifier(study, data, device))
        speeds: tuple[list[float], list[float]] = ([], [])
        for turn in turns:
            _speed(turn, min(1.0, work.seconds), device, work.clock)
        for repeat in range(work.repeats):
            for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                speeds[side].append(_speed(turns[side], work.seconds, device, work.clock))
    return Comparison(workload=work, xfed=tuple(speeds[0]), reference=tuple(speeds[1]))


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on: processor, its bfloat16 instructions, threads, torch, and the GPU if that is the device."""
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    return {
        "processor": model,
        "bfloat16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags.split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _precision(demand: str, device: torch.device) -> str:
    if demand != "auto":
        return demand
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if machine(device)["bfloat16"] else "float32"


def _spread(values: tuple[float, ...], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


class Clock(StrEnum):
    """What seconds are counted."""

    wall = "wall"
    cpu = "cpu"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def speed(
    size: Annotated[list[int] | None, typer.Option(help="image side: 32, 64, 128 or 256; repeat the option")] = None,
    width: Annotated[int, typer.Option(help="channels next to the image", min=4)] = 32,
    batch: Annotated[int, typer.Option(help="0: 64 up to 64 px, 16 at 128 px, 8 at 256 px", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="of xfed's side: auto, float32 or bfloat16")] = "auto",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="least length of a turn", min=0)] = 2,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's choice", min=0)] = 0,
    clock: Annotated[
        Clock, typer.Option(help="cpu: processor seconds of this process, for a shared machine; use with --threads 1")
    ] = Clock.wall,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Training steps of DCGAN and DCNN: xfed against a plain PyTorch loop, in turns."""
    if threads:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    found = []
    for side in size or [64, 256]:
        for model in ("dcgan", "dcnn"):
            work = Workload(
                model=model,
                size=side,
                width=width,
                batch=batch or BATCHES.get(side, 8),
                repeats=repeats,
                seconds=seconds,
                device=chosen.type,
                precision=_precision(precision, chosen),
                clock=clock.value,
            )
            found.append(compare(work))
    if as_json:
        results = [{**asdict(one), "ratios": one.ratios} for one in found]
        print(json.dumps({"machine": machine(chosen), "results": results}, indent=2))
        return
    table = Table(title=f"Images per second ({clock.value} clock): median \\[least, greatest] of {repeats} turns")
    for heading in ("model", "size", "width", "batch", "precision", "xfed", "plain loop", "ratio"):
        table.add_column(heading, justify="right")
    for one in found:
        work = one.workload
        facts = (work.model, str(work.size), str(work.width), str(work.batch), work.precision)
        table.add_row(*facts, _spread(one.xfed), _spread(one.reference), _spread(one.ratios, 2))
    console = Console(width=130)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine(chosen).items()), highlight=False)


if __name__ == "__main__":
    run_app(app)
