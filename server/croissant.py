"""The archive described for machines: Croissant 1.0 (JSON-LD), made from the manifest alone.

::

    manifest --croissant--> croissant.json: files with digests, and a record per image (picture, class, seed, scores)
    mlcroissant.Dataset("archive/croissant.json").records("images") --> {images/file_name, images/label, images/image, ..}

Source: the Croissant 1.0 specification of MLCommons (2024), and its vocabulary for responsible AI (RAI 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xfed.server.archive_filter import COLUMNS
from xfed.server.archive_manifest import METADATA, labels_of

__all__ = ["croissant"]

_TERMS = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
}
_CROISSANT_TERMS = (
    "citeAs",
    "column",
    "equivalentProperty",
    "extract",
    "field",
    "fileObject",
    "fileProperty",
    "fileSet",
    "format",
    "includes",
    "isLiveDataset",
    "jsonPath",
    "key",
    "md5",
    "parentField",
    "path",
    "recordSet",
    "references",
    "regex",
    "repeated",
    "replace",
    "samplingRate",
    "separator",
    "source",
    "subField",
    "transform",
)
_SCORES = {
    "contrast": "standard deviation of the pixels, in grey levels",
    "saturated": "share of pixels that are black or white",
    "sharpness": "mean absolute difference of neighbouring pixels, in grey levels",
    "nearest": "RMS difference, at 16 x 16, from the nearest image drawn before, in grey levels",
    "oddity": "largest robust z-score of the image within its class",
}


_STEERED = {
    "findings": ("sc:Text", "classes that the image was steered to show, joined by |"),
    "latent": ("sc:Integer", "number of the latent that the search began from"),
    "probability": ("sc:Float", "of the target in the steering classifier's eyes"),
    "threshold": ("sc:Float", "probability from which an image was accepted"),
    "moves": ("sc:Integer", "moves of the latent until then"),
    "drift": ("sc:Float", "root mean square of the latent's way"),
}


def _label_means(manifest: Mapping[str, Any]) -> str:
    if "steering" in manifest:
        return "What a classifier saw in the image, which steered a generator of all images there; it may be several findings."
    return "The class whose generator drew the image."


def croissant(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON-LD document of the archive with this manifest."""
    about: Mapping[str, Any] = manifest.get("about", {})
    counts = ", ".join(f"{name} {manifest['counts'][name]:,}" for name in labels_of(manifest))
    size = manifest["image_size"]
    return {
        "@context": _TERMS | {term: f"cr:{term}" for term in _CROISSANT_TERMS},
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": manifest["name"],
        "description": f"Labelled synthetic X-rays, {size} x {size}, grey: {counts}. {manifest['privacy']}",
        "version": "1.0.0",
        "license": "Not stated: the coordinator decides before handing the archive on.",
        "url": f"urn:sha256:{manifest['root_sha256']}",
        "citeAs": f"Synthetic X-ray archive {manifest['name']}, root {manifest['root_sha256']}",
        "datePublished": manifest["released"],
        "inLanguage": "en",
        "keywords": ["synthetic", "chest X-ray", "federated learning", *manifest["classes"]],
        "creator": {
            "@type": "sc:Organization",
            "name": f"coordinator of {manifest['name']}, key {manifest['signed_by']}",
        },
        "isLiveDataset": False,
        "rai:dataCollection": "Drawn from generators that were trained at hospitals; no image of a patient is in it.",
        "rai:dataCollectionType": ["Software Collection"],
        "rai:personalSensitiveInformation": manifest["privacy"],
        "rai:dataPreprocessingProtocol": [str(manifest.get("filter", {}).get("statement", "none"))],
        "rai:dataAnnotationProtocol": [f"{_label_means(manifest)} Curation: {manifest['curation']['summary']}"],
        "rai:dataLimitations": str(about.get("verdict") or "Usefulness was not measured."),
        "rai:dataUseCases": "Research and teaching on methods; training beside real images. Not diagnosis, not a test set.",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": METADATA,
                "name": METADATA,
                "description": "A row for each image.",
                "contentUrl": METADATA,
                "encodingFormat": "text/csv",
                "sha256": manifest["files"][METADATA],
            },
            {
                "@type": "cr:FileSet",
                "@id": "pictures",
                "name": "pictures",
                "description": "The images, one folder per class.",
                "encodingFormat": "image/png",
                "includes": "images/*/*.png",
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "images",
                "name": "images",
                "description": "One record per image.",
                "key": {"@id": "images/file_name"},
                "field": [
                    _field("file_name", "sc:Text", "Path of the image in the archive.")
                    | {
                        # the regular expression turns mlcroissant's path into text, which alone can be compared with the column's
                        "source": {
                            "fileSet": {"@id": "pictures"},
                            "extract": {"fileProperty": "fullpath"},
                            "transform": {"regex": "(.+)"},
                        },
                        "references": {"fileObject": {"@id": METADATA}, "extract": {"column": "file_name"}},
                    },
                    _field("image", "sc:ImageObject", "The picture.")
                    | {"source": {"fileSet": {"@id": "pictures"}, "extract": {"fileProperty": "content"}}},
                    _column("label", "sc:Text", _label_means(manifest)),
                    _column("label_index", "sc:Integer", "The class as a number."),
                    _column("seed", "sc:Text", "Seed of the image's latent vector."),
                    _column("generator_sha256", "sc:Text", "Digest of the generator's weights."),
                    *(_column(name, *_STEERED[name]) for name in _STEERED if "steering" in manifest),
                    *(_column(name, "sc:Float", _SCORES[name]) for name in COLUMNS),
                ],
            }
        ],
    }


def _field(name: str, kind: str, description: str) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": f"images/{name}", "name": name, "description": description, "dataType": kind}


def _column(name: str, kind: str, description: str) -> dict[str, Any]:
    return _field(name, kind, description) | {"source": {"fileObject": {"@id": METADATA}, "extract": {"column": name}}}
