"""The page of a reader study: one image at a time, and nothing in it that says what the image is.

::

    GET /state          how many answered, of how many
    GET /image/NUMBER   the next image alone: a grey PNG of the same length for all, made from pixels, without metadata
    POST /answer        {number, called, confidence} --> on disk --> {answered}
    GET /result         this reader's figures, and all readers'; refused until the last answer

Every image is made ready before the first is shown, real or synthetic alike, so that neither bytes, names, lengths nor waiting
times differ. PNGs are stored without compression: a compressed noisy image would be longer than a smooth one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, ConfigDict

from xfed.client.reader_result import in_words
from xfed.client.reader_study import ReaderStudy
from xfed.common.durable import write_json
from xfed.common.errors import RefusedError
from xfed.common.pages import AppFactory, add_page, page_app

__all__ = ["plain_png", "reader_page"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    number: int
    called: str
    confidence: int | None


def plain_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A grey PNG of uint8 [S, S] whose length depends on S alone."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def reader_page(study: ReaderStudy, reader: str, pictures: Sequence[npt.NDArray[np.uint8]]) -> AppFactory:
    """The page for one reader; `pictures` uint8 [S, S] in the design's order. Finishing writes reader-study.json."""
    shown = [plain_png(pictures[item]) for item in study.order(reader)]
    folder = Path(str(resources.files("xfed.client")))

    def make(token: str, port: int) -> FastAPI:
        app = page_app(title="Real or synthetic?", token=token, port=port)
        assets = {name: folder / name for name in ("reader_page.js", "reader_page.css")}
        add_page(app, token=token, page=folder / "reader_page.html", assets=assets)

        @app.get("/state")
        def state() -> dict[str, Any]:
            return {
                "reader": reader,
                "total": len(study),
                "answered": len(study.answers(reader)),
                "confidence": study.design.confidence,
            }

        @app.get("/image/{number}")
        def image(number: int) -> Response:
            if number != len(study.answers(reader)) or number >= len(shown):
                raise HTTPException(404, "Only the next image is shown.")
            return Response(shown[number], media_type="image/png")

        @app.post("/answer")
        def answer(said: _Answer) -> dict[str, int]:
            try:
                answered = study.record(reader, said.number, said.called, said.confidence)
            except RefusedError as error:
                raise HTTPException(409, str(error)) from error
            if answered == len(study):
                write_json(study.folder / "reader-study.json", study.figures())
            return {"answered": answered}

        @app.get("/result")
        def result() -> dict[str, Any]:
            if len(study.answers(reader)) < len(study):
                raise HTTPException(403, "The result is shown after the last image.")
            figures = study.figures()
            mine, pooled = figures["readers"][reader], figures["pooled"]
            return {
                "you": {**mine, "words": in_words(mine)},
                "all": {**pooled, "words": in_words(pooled)},
                "agreement": figures["agreement"],
            }

        return app

    return make
