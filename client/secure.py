"""The site's side of a secure sum: sessions on its disk, and the plain answer that never leaves it.

::

    AdvertiseKeys --> secure/<session> (0600) written --> SessionKeys, signed with the site's registered key
    ShareKeys     --> every signature compared with the plan's members --> SessionShares (sealed letters)
    a request with this session --> plain answer (answers/, stays) --> masked --> secure/<session> written --> Masked
    Unmask        --> was any of these answers part of another sum already? --> summed/<digest>, secure/<session> closed
                  --> UnmaskShares

`xfed.common.secure_sum` says what this protects. What it needs of the disk: the session is written before anything made
from it leaves. A session that the disk lost is never made anew under its name: the coordinator starts another.

One answer goes into sums over one set of sites only. The difference of a sum over sites 1, 2, 3 and one over 1, 2 would be
site 3's answer, so what an answer was summed with is kept for good (summed/<digest>), and any other set is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric import ec

from xfed.common import messages as m
from xfed.common import secure_sum as ss
from xfed.common.durable import append_line, write_bytes, write_text
from xfed.common.errors import IdentityError, RefusedError
from xfed.common.identity import parse_public_key, sign_bytes, verify_bytes
from xfed.common.packing import digest_of_request
from xfed.common.secure_masks import Partition, Verify
from xfed.common.summable import SUMMABLE, to_vectors

__all__ = ["SecureSums", "verifier"]

KEPT = 8
_KIND = "secure-keys"
_SESSION_FILE = re.compile(r"[0-9a-f]{32}")


def verifier(members: Mapping[str, str]) -> Verify:
    """Checks a signature of session keys against the registered keys (name to OpenSSH public key)."""

    def verify(site: str, statement: bytes, signature: bytes) -> bool:
        try:
            key = parse_public_key(members[site])
            verify_bytes(_KIND, statement, signature.decode("ascii"), key)
        except (IdentityError, KeyError, UnicodeDecodeError):
            return False
        return True

    return verify


class SecureSums:
    """The sessions of `site` for one study, in `folder`. `members` are the registered keys that it trusts."""

    def __init__(
        self, folder: Path, site: str, study: str, key: ec.EllipticCurvePrivateKey, members: Mapping[str, str]
    ) -> None:
        self._folder, self._site, self._study = folder, site, study
        self._key, self._members = key, members

    def _path(self, session: str) -> Path:
        return self._folder / hashlib.sha256(session.encode()).hexdigest()[:32]

    def _save(self, session: ss.Session) -> None:
        write_bytes(self._path(session.session), session.to_bytes(), private=True)

    def _load(self, name: str) -> ss.Session:
        path = self._path(name)
        if not path.is_file():
            raise RefusedError(
                f"secure sum {name}: this site takes no part in it (or has forgotten it). Start a new session."
            )
        return ss.session_from_bytes(path.read_bytes())

    def advertise(self, request: m.AdvertiseKeys) -> m.SessionKeys:
        """Keys for a session among `request.peers`, the same at every call. Raises `RefusedError`."""
        peers = _names(request.peers)
        strangers = sorted(set(peers) - self._members.keys())
        if strangers:
            raise RefusedError(
                f"secure sum: {', '.join(strangers[:5])} is no member that this site's approved plan names"
            )
        if self._path(request.session).is_file():
            session = self._load(request.session)
            if session.peers != tuple(sorted(peers)):
                raise RefusedError(f"secure sum {request.session}: it was begun with other sites. Start a new session.")
        else:
            session = ss.new_session(request.session, self._study, self._site, peers)
            self._save(session)
            self._prune()
        advert = ss.advertise(session, lambda data: sign_bytes(_KIND, data, self._key).encode("ascii"))
        return m.SessionKeys(site=self._site, arrays={"advert": _as_array(advert)})

    def share(self, request: m.ShareKeys) -> m.SessionShares:
        """Accept everybody's keys and hand out sealed shares. Raises `RefusedError`."""
        adverts = {name: array.tobytes() for name, array in request.arrays.items()}
        session = ss.exchange(self._load(request.session), adverts, verifier(self._members))
        self._save(session)
        return m.SessionShares(
            site=self._site, arrays={peer: _as_array(letter) for peer, letter in session.letters.items()}
        )

    def mask(self, request: m.Request, plain: m.Request, reply: m.Reply, classes: int) -> m.Masked:
        """The answer to `plain` (the request without its session) under this session's masks. Raises `RefusedError`."""
        session = self._load(request.session)
        if session.peers != tuple(sorted(_names(request.peers))):
            raise RefusedError(f"secure sum {request.session}: the request names other sites than the session has")
        words32, words64 = to_vectors(request, reply, classes, len(session.peers))
        session, vectors = ss.mask(session, bytes.fromhex(digest_of_request(request)), words32, words64)
        self._save(session)
        append_line(self._path(request.session).with_suffix(".asked"), digest_of_request(plain))
        kind = SUMMABLE[type(request)].__name__
        return m.Masked(site=self._site, kind=kind, arrays={"weights": vectors[0], "statistics": vectors[1]})

    def unmask(self, request: m.Unmask, minimum: int) -> m.UnmaskShares:
        """This site's shares for one list of survivors, and for no second one. Raises `RefusedError`."""
        letters = {name: array.tobytes() for name, array in request.arrays.items()}
        partition = Partition(survivors=_names(request.survivors), dropped=_names(request.dropped))
        session, shares = ss.reveal(self._load(request.session), partition, letters, minimum=minimum)
        self._only_one_sum(request.session, ",".join(sorted(partition.survivors)))
        self._save(session)
        return m.UnmaskShares(site=self._site, arrays={name: _as_array(share) for name, share in shares.items()})

    def _only_one_sum(self, session: str, survivors: str) -> None:
        asked = self._path(session).with_suffix(".asked")
        mine = sorted(set(asked.read_text().split())) if asked.is_file() else []
        records = {digest: self._folder / "summed" / digest for digest in mine}
        for record in records.values():
            if record.is_file() and (before := record.read_text().strip()) != survivors:
                raise RefusedError(
                    f"secure sum {session}: an answer in it was summed over {before} before; a second sum over {survivors} "
                    "would show single sites by difference. Repeat the round when the same sites are there."
                )
        for record in records.values():
            if not record.is_file():
                write_text(record, survivors)

    def _prune(self) -> None:
        paths = [path for path in self._folder.iterdir() if _SESSION_FILE.fullmatch(path.name)]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            path.unlink(missing_ok=True)
            path.with_suffix(".asked").unlink(missing_ok=True)


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(",")) if joined else ()


def _as_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
