"""`xfed-server archive`: check a synthetic archive, write it in other layouts, leave out what people rejected.

::

    verify DIR [--key SHA256:...]                       every byte --> untouched and signed by whom, or what was changed
    export DIR --to FORMAT --out DIR                    imagefolder, huggingface, webdataset, dicom
    score DIR --features NET --sums FILE ...            the hospitals' sums --> figures as of pooled images
    curate DIR --decisions LOG ... --out DIR            archive + logs of the review page --> curated archive, signed
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from xfed.common.console import EXIT_CODES, print_result
from xfed.common.errors import CheckpointError, ConfigError

__all__ = ["archive"]

Folder = Annotated[Path, typer.Argument(help="the archive: the folder that holds manifest.json", metavar="DIR")]
Out = Annotated[Path, typer.Option(help="a new folder, outside of the archive")]
KnownKey = Annotated[
    str | None, typer.Option("--key", help="the coordinator's fingerprint (SHA256:...), as it was told to you")
]
Unsigned = Annotated[
    bool, typer.Option("--unsigned", help="accept an archive that nobody signed: digests are checked alone")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]

archive = typer.Typer(no_args_is_help=True, help="Look after a synthetic archive.")


@archive.callback()
def _archive() -> None:
    """Look after a synthetic archive."""


@archive.command(epilog=EXIT_CODES)
def verify(folder: Folder, key: KnownKey = None, unsigned: Unsigned = False, as_json: Json = False) -> None:
    """Check signature and every file; ends with 0 only when all is untouched (exit code 4 otherwise)."""
    from xfed.server.archive_signature import check_archive

    checked = check_archive(folder, unsigned=unsigned, known_key=key)
    values = {
        "untouched": not checked.problems,
        "problems": list(checked.problems),
        "fingerprint": checked.fingerprint,
        "signed_at": checked.signed_at,
    }
    if checked.problems:
        if as_json:
            print_result(True, values)
        shown = "\n".join(f"  {problem}" for problem in checked.problems[:20])
        signer = f"\nsigned by {checked.fingerprint} ({checked.signed_at})" if checked.fingerprint else ""
        hint = "\n--unsigned checks the digests alone." if _unsigned(checked.problems) else ""
        raise CheckpointError(
            f"{folder}: {len(checked.problems)} differences from what was released; do not use it:\n{shown}{signer}{hint}"
        )
    if checked.fingerprint is None:
        told = "not signed: whoever changed a file could have changed the manifest too"
    elif key is None:
        told = (
            f"signed by {checked.fingerprint} ({checked.signed_at}). Compare this fingerprint with the coordinator's."
        )
    else:
        told = f"signed by {checked.fingerprint} ({checked.signed_at}), the key you named."
    print_result(as_json, values, f"{escape(str(folder))}: untouched", told)


def _unsigned(problems: tuple[str, ...]) -> bool:
    return len(problems) == 1 and "not signed" in problems[0]


@archive.command(epilog=EXIT_CODES)
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="imagefolder, huggingface, webdataset or dicom")],
    out: Out,
    burn_in: Annotated[bool, typer.Option("--burn-in", help="dicom: write SYNTHETIC into the pixels")] = False,
    key: KnownKey = None,
    unsigned: Unsigned = False,
    as_json: Json = False,
) -> None:
    """Write the archive in a layout that other programs read; a changed archive is not exported (exit code 4)."""
    from xfed.server.archive_export import FORMATS, export_archive

    chosen = next((name for name in FORMATS if name == to), None)
    if chosen is None:
        raise ConfigError(f"--to {to}: there is no such format; it is one of {', '.join(FORMATS)}")
    done = export_archive(folder, out, chosen, unsigned=unsigned, known_key=key, burn_in=burn_in)
    signer = f"signed by {done.fingerprint}" if done.fingerprint else "not signed"
    print_result(
        as_json, done.as_json(), f"{escape(str(out))}: {done.images:,} images as {to}", f"from an archive {signer}"
    )


@archive.command(epilog=EXIT_CODES)
def score(
    folder: Folder,
    features: Annotated[Path, typer.Option(help="the network that the hospitals used", metavar="NET")],
    sums: Annotated[list[Path], typer.Option(help="a hospital's file of sums; once for each", metavar="FILE")],
    sha256: Annotated[str | None, typer.Option(help="the digest that the network's file must have")] = None,
    as_json: Json = False,
) -> None:
    """Figures of the pooled real images from sums that hospitals wrote with xfed-client score --sums."""
    from rich.console import Console

    from xfed.common.archive_table import print_figures
    from xfed.common.extractors import load_extractor
    from xfed.server.archive_score import score_pooled

    extractor = load_extractor(features, sha256=sha256)
    scored = score_pooled(folder, extractor, sums)
    if as_json:
        print_result(True, scored)
    else:
        print_figures(scored["quality"], extractor.name, extractor.digest, Console())


@archive.command(epilog=EXIT_CODES)
def curate(
    folder: Folder,
    decisions: Annotated[list[Path], typer.Option(help="log of a review (.jsonl); once for each log", metavar="LOG")],
    out: Out,
    signing_key: Annotated[
        Path | None,
        typer.Option(
            help="key that signs the curated archive, made when absent; default: the run's own, beside the archive"
        ),
    ] = None,
    accepted_only: Annotated[
        bool, typer.Option("--accepted-only", help="leave out what nobody looked at, too")
    ] = False,
    key: KnownKey = None,
    unsigned: Unsigned = False,
    as_json: Json = False,
) -> None:
    """Rebuild the archive without the images that were rejected, with who decided what, signed."""
    from xfed.server.archive_curation import curate_archive
    from xfed.server.run_signature import RUN_KEY

    own = folder.resolve().parent / RUN_KEY
    if signing_key is None and not own.is_file():
        raise ConfigError(f"there is no {own}: name the key that signs the curated archive with --signing-key FILE")
    manifest = curate_archive(
        folder,
        decisions,
        out,
        key=signing_key or own,
        accepted_only=accepted_only,
        unsigned=unsigned,
        known_key=key,
    )
    values = {name: manifest[name] for name in ("counts", "curation", "root_sha256", "signed_by")}
    print_result(
        as_json,
        values,
        f"{escape(str(out))}: {escape(manifest['curation']['summary'])}",
        f"signed by {manifest['signed_by']}",
    )
