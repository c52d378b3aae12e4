"""The hospital's Flower ClientApp: decode, let the `Site` answer, encode. The only Flower types on this side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from xfed.client.site import Site
from xfed.common.codec import decode_request, encode
from xfed.common.errors import FederationError
from xfed.common.messages import Refusal

__all__ = ["make_client_app"]


def make_client_app(folder_of: Callable[[Context], Path]) -> ClientApp:
    """A ClientApp whose node answers from the site's folder `folder_of(context)`."""
    app = ClientApp()
    sites: dict[Path, Site] = {}  # a site keeps its store open, and its privacy plan worked out

    def answer(message: Message, context: Context) -> Message:
        folder = folder_of(context)
        if folder not in sites:
            sites[folder] = Site(folder)
        site = sites[folder]
        try:
            request = decode_request(message.content)
        except FederationError as error:
            reply = Refusal(site=site.settings.name, error=type(error).__name__, reason=str(error))
            return Message(encode(reply), reply_to=message)
        return Message(encode(site.answer(request)), reply_to=message)

    for register in (app.query("ask"), app.train("gan"), app.train("classifier")):
        register(answer)
    for register in (app.evaluate("classifier"), app.evaluate("archive")):
        register(answer)
    return app
