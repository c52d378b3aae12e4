"""The privacy ledger: what was sent is spent whatever kills the site, nothing is spent twice, and no change goes unnoticed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from xfed.client import ledger as module
from xfed.client.ledger import Ledger, Reservation, ledger_key, open_ledger
from xfed.common import line_file
from xfed.common.accounting import epsilon
from xfed.common.dp_events import Event, merged
from xfed.common.errors import CheckpointError, FederationError, IdentityError, RefusedError, StorageError
from xfed.common.identity import load_private_key, new_key
from xfed.common.ledger_lines import (
    KEYS,
    START,
    LineContent,
    check_endorsement,
    check_head,
    endorse,
    read_line,
    verify_chain,
    write_line,
)

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()
STUDY, OTHER = "a" * 64, "b" * 64
STEP = Event(sampling="poisson", q=0.05, sigma=1.2, steps=20, clip=1.0)
WHOLE = Event(sampling="none", q=1, sigma=6.0, steps=1, clip=1.0)
DIGEST = "0123456789abcdef" * 4
SITE = "site-01"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is counted elsewhere; here it would only be slow."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def ledger(folder: Path, key: Ed25519PrivateKey = KEY, site: str = SITE) -> Ledger:
    return Ledger(folder / "ledger.jsonl", site, key, "xfed tests")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in lines_of(folder)]


def whole_round(
    book: Ledger, number: int = 1, name: str | None = "A", events: tuple[Event, ...] = (STEP,)
) -> Reservation:
    phase = "generators" if name else "classifier"
    made = book.reserve(STUDY, phase, name, number, events)
    book.spend(made)
    book.release(made, DIGEST)
    return made


# The contract


def test_a_line_is_what_the_contract_says(tmp_path: Path) -> None:
    whole_round(ledger(tmp_path))
    data = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    assert (tmp_path / "ledger.jsonl").stat().st_mode & 0o777 == 0o600
    prev = "0" * 64
    for number, (line, kind) in enumerate(zip(data, ("reserve", "spend", "release"), strict=True), start=1):
        values = json.loads(line)
        assert tuple(values) == KEYS
        assert " ".join(values) == "seq time site study phase class round attempt kind event software prev hash sig"
        assert (values["seq"], values["site"], values["study"], values["kind"]) == (number, SITE, STUDY, kind)
        assert (values["phase"], values["class"], values["round"], values["attempt"]) == ("generators", "A", 1, 1)
        assert values["software"] == "xfed tests"
        if kind != "release":
            assert tuple(values["event"]) == ("mechanism", "unit", "sampling", "q", "sigma", "steps", "clip")
            assert Event.from_json(values["event"]) == STEP
        else:
            assert values["event"] == {"sha256": DIGEST}
        assert values["prev"] == prev
        body = line[: line.index(b',"hash"')] + b"}"
        assert values["hash"] == hashlib.sha256(body).hexdigest()
        message = b"xfed ledger-line v1\n" + values["hash"].encode()
        PUBLIC.verify(base64.b64decode(values["sig"]), message)
        with pytest.raises(InvalidSignature):
            PUBLIC.verify(base64.b64decode(values["sig"]), message + b" ")
        prev = values["hash"]


def test_each_distinct_event_has_its_line_and_equal_ones_are_added(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    made = book.reserve(STUDY, "generators", "A", 1, [STEP, WHOLE, STEP.times(5)])
    assert made.events == (STEP.times(25), WHOLE)
    book.spend(made)
    assert kinds(tmp_path) == ["reserve", "reserve", "spend", "spend"]
    assert book.spent() == [("A", STEP.times(25)), ("A", WHOLE)]


def test_attempts_are_counted_per_round(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    places = [
        ("generators", "A", 1),
        ("generators", "A", 1),
        ("generators", "A", 2),
        ("generators", "B", 1),
        ("classifier", None, 1),
    ]
    attempts = [book.reserve(STUDY, *place, [STEP]).attempt for place in places]
    assert attempts == [1, 2, 1, 1, 1]
    book.refuse(STUDY, "generators", "A", 1, "too much")
    assert ledger(tmp_path).reserve(STUDY, "generators", "A", 1, [STEP]).attempt == 4
    assert ledger(tmp_path).reserve(OTHER, "generators", "A", 1, [STEP]).attempt == 1


def test_every_line_is_on_disk_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, int]] = []

    def fsync(handle: int) -> None:
        status = os.fstat(handle)
        synced.append((stat.S_ISDIR(status.st_mode), status.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    book = ledger(tmp_path / "site")
    assert synced[0][0]  # the folder's list of names
    path = tmp_path / "site" / "ledger.jsonl"

    def grows(call: Callable[[], Any], lines: int) -> Any:
        synced.clear()
        found = call()
        assert len(synced) == lines
        assert synced[-1] == (False, path.stat().st_size)
        return found

    made = grows(lambda: book.reserve(STUDY, "scores", None, 1, [STEP, WHOLE]), 2)
    grows(lambda: book.spend(made), 2)
    grows(lambda: book.release(made, DIGEST), 1)
    grows(lambda: book.refuse(STUDY, "scores", None, 1, "no"), 1)


# Order


def test_what_is_released_was_spent_and_what_is_spent_was_reserved(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    made = book.reserve(STUDY, "generators", "A", 1, [STEP])
    with pytest.raises(RefusedError, match="nothing was spent"):
        book.release(made, DIGEST)
    with pytest.raises(RefusedError, match="never reserved"):
        book.spend(replace(made, attempt=2))
    with pytest.raises(RefusedError, match="less was reserved"):
        book.spend(made, [STEP.times(21)])
    with pytest.raises(RefusedError, match="less was reserved"):
        book.spend(made, [replace(STEP, sigma=1.1)])
    with pytest.raises(RefusedError, match="something else"):
        book.spend(made, [])
    assert kinds(tmp_path) == ["reserve"]
    book.spend(made, [STEP.times(12)])
    book.spend(made, [STEP.times(12)])
    with pytest.raises(RefusedError, match="something else"):
        book.spend(made)
    book.release(made, DIGEST)
    book.release(made, DIGEST)
    with pytest.raises(RefusedError, match="another answer"):
        book.release(made, "f" * 64)
    assert kinds(tmp_path) == ["reserve", "spend", "release"]
    assert book.spent(STUDY) == [("A", STEP.times(12))]
    assert book.spent(OTHER) == []
    with pytest.raises(ValueError, match="needs an event"):
        book.reserve(STUDY, "generators", "A", 1, [])


def test_a_closed_attempt_is_not_spent_and_a_spent_one_is_not_closed(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    broken = book.reserve(STUDY, "generators", "A", 1, [STEP])
    elsewhere = book.reserve(STUDY, "generators", "A", 2, [STEP])
    assert book.standing() == [broken, elsewhere]
    assert book.resume(STUDY, "generators", "A", 1) == 1
    assert book.resume(STUDY, "generators", "A", 1) == 0
    assert book.standing() == [elsewhere]
    with pytest.raises(RefusedError, match="closed"):
        book.spend(broken)
    book.spend(elsewhere)
    assert book.resume(STUDY, "generators", "A", 2) == 0
    assert book.standing_for(STUDY, "generators", "A", 2) == elsewhere
    book.release(elsewhere, DIGEST)
    assert book.standing_for(STUDY, "generators", "A", 2) is None
    assert book.standing() == []


def test_a_spend_of_two_lines_is_completed_after_a_kill_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ledger(tmp_path).reserve(STUDY, "generators", "A", 1, [STEP, WHOLE])
    real, calls = module.put, []

    def once(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(module, "put", once)
    with pytest.raises(KeyboardInterrupt):
        ledger(tmp_path).spend(made)
    assert kinds(tmp_path) == ["reserve", "reserve", "spend"]
    book = ledger(tmp_path)
    assert book.resume(STUDY, "generators", "A", 1) == 0
    again = book.standing_for(STUDY, "generators", "A", 1)
    assert again == made
    book.spend(again)
    assert kinds(tmp_path) == ["reserve", "reserve", "spend", "spend"]


# Epsilon


def test_epsilon_is_of_each_class_with_what_reads_all_classes(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    assert book.epsilon_by_class(STUDY, 1e-5) == {None: 0.0}
    assert book.site_epsilon(None, 1e-5) == 0
    whole_round(book, 1, "A")
    whole_round(book, 1, "B", (STEP.times(40),))
    whole_round(book, 1, None, (WHOLE,))
    other = book.reserve(OTHER, "generators", "A", 1, [STEP])
    book.spend(other)
    found = book.epsilon_by_class(STUDY, 1e-5)
    assert found == {
        None: epsilon([WHOLE], 1e-5),
        "A": epsilon([STEP, WHOLE], 1e-5),
        "B": epsilon([STEP.times(40), WHOLE], 1e-5),
    }
    assert book.site_epsilon(STUDY, 1e-5) == found["B"] == max(found.values())
    assert book.epsilon_by_class(None, 1e-5)["A"] == epsilon([STEP.times(40), WHOLE], 1e-5)
    assert book.site_epsilon(STUDY, 1e-5, overlap=2) == epsilon([STEP.times(80), WHOLE.times(2)], 1e-5)


def test_a_budget_counts_what_is_spent_reserved_and_asked(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    two, three = (epsilon([STEP.times(20 * rounds)], 1e-5) for rounds in (2, 3))
    whole_round(book)
    assert book.would_exceed([STEP], "A", STUDY, two, 1e-5) is None
    made = book.reserve(STUDY, "generators", "A", 2, [STEP])
    problem = book.would_exceed([STEP], "A", STUDY, two, 1e-5)
    assert problem is not None
    assert f"{three:.4g} at delta 1e-05, and {two:.4g} is allowed. Spent or reserved so far: {two:.4g}" in problem
    assert book.would_exceed([STEP], "A", STUDY, three, 1e-5) is None
    assert book.would_exceed([STEP], "A", STUDY, three, 1e-5, overlap=2) is not None
    assert book.would_exceed([STEP], "B", STUDY, two, 1e-5) is None  # other patients
    assert book.would_exceed([STEP], None, STUDY, two, 1e-5) is not None  # all patients
    assert book.would_exceed([STEP], "A", OTHER, two, 1e-5) is None
    assert book.would_exceed([STEP], "A", None, two, 1e-5) is not None
    book.spend(made, [STEP.times(1)])
    assert book.would_exceed([STEP], "A", STUDY, two, 1e-5) is not None  # the worst case while it is open
    book.release(made, DIGEST)
    assert book.would_exceed([STEP.times(19)], "A", STUDY, two, 1e-5) is None
    stale = book.reserve(STUDY, "generators", "A", 3, [STEP.times(500)])
    assert book.would_exceed([STEP], "A", STUDY, three, 1e-5) is not None
    book.resume(stale.study, stale.phase, stale.class_name, stale.round)
    assert book.would_exceed([STEP], "A", STUDY, three, 1e-5) is None


# A thousand schedules


class Killed(BaseException):
    """The power goes."""


class Hospital:
    """A site in memory but for its ledger: it keeps answers, is killed, and comes back with the ledger's file alone."""

    def __init__(self, folder: Path, chance: random.Random, hazard: float) -> None:
        self.folder, self.chance, self.hazard = folder, chance, hazard
        self.kept: dict[tuple[str, str | None, int], tuple[Reservation, str]] = {}
        self.sent: dict[tuple[tuple[str, str | None, int], int], tuple[Event, ...]] = {}
        self.made = 0
        self.start()

    def start(self) -> None:
        self.book = ledger(self.folder)

    def danger(self) -> None:
        if self.chance.random() < self.hazard:
            if self.chance.random() < 0.3:  # within a write: half a line stays
                with (self.folder / "ledger.jsonl").open("ab") as file:
                    file.write(b'{"seq":7,"time":"20'[: self.chance.randint(1, 19)])
            raise Killed

    def answer(self, place: tuple[str, str | None, int], event: Event) -> None:
        if place not in self.kept:
            self.book.resume(STUDY, *place)
            self.danger()
            made = self.book.reserve(STUDY, *place, [event])
            self.danger()
            self.made += 1
            digest = hashlib.sha256(str(self.made).encode()).hexdigest()
            self.danger()
            self.kept[place] = (made, digest)
            self.danger()
        self.send(place)

    def send(self, place: tuple[str, str | None, int]) -> None:
        made, digest = self.kept[place]
        self.book.spend(made)
        self.danger()
        self.book.release(made, digest)
        self.danger()
        # the true cost: every different answer that left, however often it was sent
        self.sent[place, int(digest, 16)] = made.events
        self.danger()


@cache
def cost(events: tuple[Event, ...]) -> float:
    return epsilon(events, 1e-5)


def composed(events: list[tuple[str | None, Event]], name: str) -> Counter[Event]:
    steps: Counter[Event] = Counter()
    for of, event in events:
        if of in (None, name):
            steps[event.times(1)] += event.steps
    return steps


def as_events(steps: Counter[Event]) -> tuple[Event, ...]:
    return tuple(merged(event.times(count) for event, count in sorted(steps.items(), key=str)))


def schedule(folder: Path, seed: int) -> tuple[int, int]:
    """Run one schedule; returns kills, and attempts that were never sent."""
    chance = random.Random(seed)
    site = Hospital(folder, chance, hazard=chance.choice([0.0, 0.03, 0.1, 0.25]))
    plan = [("generators", name, number, STEP) for number in range(1, 4) for name in ("A", "B")]
    plan += [("classifier", None, number, replace(STEP, q=0.02)) for number in range(1, 4)] + [
        ("scores", None, 1, WHOLE)
    ]
    kills = 0

    def truth() -> list[tuple[str | None, Event]]:
        return [(place[1], event) for (place, _), events in site.sent.items() for event in events]

    for phase, name, number, event in plan:
        for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):  # dropped out, asked once, asked again and again
            try:
                site.answer((phase, name, number), event)
                site.answer((phase, name, number), event)
            except Killed:
                kills += 1
                site.start()
        spent, sent = site.book.spent(STUDY), truth()
        assert all(composed(sent, one) <= composed(spent, one) for one in ("A", "B"))
    site.hazard = 0.0
    site.start()
    open_before = site.book.standing()
    for place in list(site.kept):  # what was kept goes out when the site is back
        site.send(place)
    for one in ("A", "B"):
        spent, released = composed(site.book.spent(STUDY), one), composed(truth(), one)
        assert released <= spent
        right = cost(as_events(released))
        assert right <= cost(as_events(spent)) <= 1.01 * right
    # reservations are reported apart: each is an attempt that was broken off before its answer was kept
    for left in site.book.standing():
        assert left in open_before
        assert (left.phase, left.class_name, left.round) not in site.kept or site.kept[
            left.phase, left.class_name, left.round
        ][0] != left
    verify_chain((folder / "ledger.jsonl").read_bytes().splitlines(keepends=True), PUBLIC, site=SITE)
    return kills, len(site.book.standing())


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 1000), marks=pytest.mark.slow)])
def test_schedules_of_kills_retries_and_drop_outs(
    seeds: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "verify_chain", _trusting)
    kills = standing = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        found = schedule(folder, seed)
        kills, standing = kills + found[0], standing + found[1]
    assert kills > 2 * len(seeds)
    assert standing > len(seeds) / 10


def _trusting(lines: Any, key: Any, *, site: str, after: Any = START) -> list[Any]:
    """Without signatures, which `schedule` checks at its end: a thousand ledgers are read at every start."""
    return [read_line(line) for line in lines]


def test_the_schedules_would_notice_a_spend_that_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "spend", lambda self, made: None)
    monkeypatch.setattr(Ledger, "release", lambda self, made, digest: None)
    with pytest.raises(AssertionError):
        schedule(tmp_path, 0)


def test_the_schedules_would_notice_a_spend_that_is_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ledger.spent
    monkeypatch.setattr(Ledger, "spent", lambda self, study=None: 2 * real(self, study))
    with pytest.raises(AssertionError):
        schedule(tmp_path, 0)


# The file


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_torn_line_is_cut_off_in_sight_wherever_it_tore(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("site")
    whole_round(ledger(folder))
    path = folder / "ledger.jsonl"
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    cut = data.draw(st.integers(1, last - 1))
    path.write_bytes(whole[:-cut])
    torn = whole[len(whole) - last : len(whole) - cut]
    book = ledger(folder)
    assert kinds(folder) == ["reserve", "spend", "resume"]
    told = lines_of(folder)[-1]
    assert (told["study"], told["phase"], told["class"], told["round"], told["attempt"]) == (None,) * 5
    assert (told["event"]["bytes"], told["event"]["sha256"]) == (len(torn), hashlib.sha256(torn).hexdigest())
    assert len(book.standing()) == 1
    book.release(book.standing()[0], DIGEST)
    assert book.spent() == [("A", STEP)]
    assert len(verify_chain(path.read_bytes().splitlines(keepends=True), PUBLIC, site=SITE)) == 4


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = ledger(tmp_path)
    made = book.reserve(STUDY, "generators", "A", 1, [STEP])
    before = (tmp_path / "ledger.jsonl").read_bytes()
    real = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if len(data) > 100:
            return real(file, data[:100], at)
        raise OSError(28, "No space left on device")

    def half(file: int, data: bytes, at: int) -> int:
        if at == len(before):
            return real(file, data[:100], at)
        raise OSError(28, "No space left on device")

    for fault in (half, full):
        monkeypatch.setattr(os, "pwrite", fault)
        with pytest.raises(StorageError):
            book.spend(made)
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
        assert book.spent() == []
    monkeypatch.setattr(os, "pwrite", real)
    book.spend(made)
    assert ledger(tmp_path).spent() == [("A", STEP)]


def test_a_ledger_that_was_changed_is_not_opened(tmp_path: Path) -> None:
    whole_round(ledger(tmp_path))
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    for changed in (
        whole.replace(b'"steps":20', b'"steps":10', 1),
        first + third,
        second + first + third,
        first + first + second + third,
        second + third,
        whole + b"{}\n",
        whole + b"\n",
    ):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="is not whole"):
            ledger(tmp_path)
        assert path.read_bytes() == changed
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="forged"):
        ledger(tmp_path, Ed25519PrivateKey.generate())
    with pytest.raises(CheckpointError, match="foreign"):
        ledger(tmp_path, site="site-02")
    assert ledger(tmp_path).spent() == [("A", STEP)]


def test_a_ledger_cut_or_replaced_while_it_is_in_use_is_not_continued(tmp_path: Path) -> None:
    path, book = tmp_path / "ledger.jsonl", ledger(tmp_path)
    whole_round(book)
    whole = path.read_bytes()
    for other in (b"", b"".join(whole.splitlines(keepends=True)[:2]), whole[:-3] + b"xx\n"):
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match="shorter, or was replaced"):
            book.reserve(STUDY, "generators", "A", 2, [STEP])
    path.unlink()
    with pytest.raises(CheckpointError, match="shorter, or was replaced"):
        book.spent()
    path.write_bytes(whole)
    whole_round(book, 2)


def test_single_bits_are_found(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for number in range(1, 4):
        whole_round(book, number)
    data = (tmp_path / "ledger.jsonl").read_bytes()
    chance = random.Random(7)
    for _ in range(2000):
        place = chance.randrange(len(data) * 8)
        changed = bytearray(data)
        changed[place // 8] ^= 1 << (place % 8)
        with pytest.raises(FederationError):
            verify_chain(_cut(bytes(changed)), PUBLIC, site=SITE)
    assert len(verify_chain(_cut(data), PUBLIC, site=SITE)) == 9


def _cut(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def test_the_chain_says_what_is_wrong(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    whole_round(book)
    lines = _cut(book.lines_from(1).encode())
    heads = [line.head for line in verify_chain(lines, PUBLIC, site=SITE)]
    assert verify_chain(lines[1:], PUBLIC, site=SITE, after=heads[0])[-1].head == heads[2]
    assert verify_chain([], PUBLIC, site=SITE, after=heads[2]) == []
    fork = write_line(
        LineContent(
            kind="spend", event=WHOLE.as_json(), study=STUDY, phase="generators", class_name="A", round=1, attempt=1
        ),
        (1, "e" * 64),
        site=SITE,
        software="x",
        key=KEY,
    )
    for what, given_lines, after in (
        ("gap", lines[2:], heads[0]),
        ("rewrite", lines[:1], heads[1]),
        ("rewrite", [lines[0], lines[0]], START),
        ("fork", [fork], heads[0]),
        ("changed", [lines[0][:-1]], START),
        ("changed", [lines[0].replace(b'"seq":1', b'"seq": 1')], START),
        ("changed", [b"x" * 20_000], START),
        ("changed", [b"[" * 10_000 + b"\n"], START),
    ):
        with pytest.raises(FederationError, match=f"{SITE} does not continue at line {after[0] + 1}.*{what}|{what}"):
            verify_chain(given_lines, PUBLIC, site=SITE, after=after)
    with pytest.raises(FederationError, match="foreign"):
        verify_chain(lines, PUBLIC, site="site-02")
    with pytest.raises(FederationError, match="forged"):
        verify_chain(lines, Ed25519PrivateKey.generate().public_key(), site=SITE)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "gift"},
        {"phase": "training"},
        {"phase": None},
        {"study": None},
        {"study": ""},
        {"class_name": ""},
        {"round": -1},
        {"round": True},
        {"attempt": 0},
        {"attempt": None},
        {"event": {}},
        {"event": {**STEP.as_json(), "sigma": 0}},
        {"event": {**STEP.as_json(), "more": 1}},
        {"kind": "release"},
        {"kind": "release", "event": {"sha256": "A" * 64}},
        {"kind": "refuse", "event": {"reason": 3}},
        {"kind": "resume", "event": {"reason": "x", "bytes": 3, "sha256": DIGEST}},
    ],
)
def test_content_that_is_none_is_refused(change: dict[str, Any]) -> None:
    values = {"kind": "reserve", "event": STEP.as_json(), "study": STUDY, "phase": "scores", "round": 1, "attempt": 1}
    LineContent(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is|need|told|hold|not"):
        LineContent(**{**values, **change})  # type: ignore[arg-type]


def test_reasons_of_any_kind_are_one_line(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.refuse(STUDY, "generators", "A\u2028B", 1, "two\nlines \u2028 \ud800 " + "x" * 5000)
    (line,) = book.lines_from(1).splitlines()
    assert line.isascii()
    assert json.loads(line)["event"]["reason"].startswith("two\nlines \u2028 ")
    assert ledger(tmp_path).lines_from(2) == ""


def test_two_processes_share_one_chain(tmp_path: Path) -> None:
    key = ledger_key(tmp_path, SITE)
    code = (
        "import sys; from pathlib import Path; from xfed.client.ledger import open_ledger\n"
        "from xfed.common.dp_events import Event\n"
        "book = open_ledger(Path(sys.argv[1]), 'site-01')\n"
        "step = Event(sampling='none', q=1, sigma=2.0, steps=1, clip=1.0)\n"
        "for number in range(15): book.spend(book.reserve('s', 'scores', None, 1, [step]))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    book = Ledger(tmp_path / "ledger.jsonl", SITE, key)
    assert len(book.spent()) == 30
    assert sorted(line["attempt"] for line in lines_of(tmp_path) if line["kind"] == "spend") == list(range(1, 31))


def test_opening_a_ledger_loads_no_accountant(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from xfed.client.ledger import open_ledger\n"
        "open_ledger(Path(sys.argv[1]), 'site-01').head()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'opacus', 'dp_accounting', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60).returncode == 0


# Heads and keys


def test_a_head_is_signed(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    whole_round(book)
    head = json.loads(book.head_text())
    last = lines_of(tmp_path)[-1]
    assert check_head(head, PUBLIC, site=SITE) == (3, last["hash"])
    for change in (
        {"seq": 2},
        {"hash": "f" * 64},
        {"site": "site-02"},
        {"time": "2030-01-31T12:00:00.000+00:00"},
        {"public_key": "x"},
        {"sig": head["sig"][:-3] + "B=="},
        {"sig": None},
        {"seq": -1},
        {"more": 1},
    ):
        with pytest.raises(FederationError):
            check_head({**head, **change}, PUBLIC, site=SITE)
    with pytest.raises(FederationError):
        check_head(head, PUBLIC, site="site-02")
    with pytest.raises(FederationError):
        check_head(head, Ed25519PrivateKey.generate().public_key(), site=SITE)


def test_the_key_is_made_once_and_vouched_for(tmp_path: Path) -> None:
    identity = new_key(tmp_path / "key")
    book = open_ledger(tmp_path, SITE)
    assert (tmp_path / "ledger.key").stat().st_mode & 0o777 == 0o600
    text = (tmp_path / "ledger.pub").read_text()
    key = ledger_key(tmp_path, SITE)
    assert (tmp_path / "ledger.pub").read_text() == text
    values = json.loads(book.key_text())
    assert values == json.loads(text)
    assert isinstance(found := check_endorsement(values, identity.public_key(), site=SITE), Ed25519PublicKey)
    assert found.public_bytes_raw() == key.public_key().public_bytes_raw()
    stranger = new_key(tmp_path / "stranger")
    for change, admitted, site in (
        ({}, stranger, SITE),
        ({}, identity, "site-02"),
        ({"public_key": endorse(SITE, PUBLIC, identity)["public_key"]}, identity, SITE),
        ({"signature": None}, identity, SITE),
        ({"more": 1}, identity, SITE),
    ):
        with pytest.raises(IdentityError):
            check_endorsement({**values, **change}, admitted.public_key(), site=site)
    (tmp_path / "key").unlink()
    rotated = new_key(tmp_path / "key")
    assert ledger_key(tmp_path, SITE).private_bytes_raw() == key.private_bytes_raw()
    check_endorsement(json.loads((tmp_path / "ledger.pub").read_text()), rotated.public_key(), site=SITE)
    assert load_private_key(tmp_path / "key").public_key() == rotated.public_key()


def test_a_key_that_is_lost_open_or_damaged_is_said(tmp_path: Path) -> None:
    open_ledger(tmp_path, SITE)
    path = tmp_path / "ledger.key"
    text = path.read_bytes()
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        ledger_key(tmp_path, SITE)
    path.chmod(0o600)
    path.write_bytes(text[:100])
    with pytest.raises(IdentityError, match="damaged"):
        ledger_key(tmp_path, SITE)
    path.unlink()
    with pytest.raises(IdentityError, match="not its key"):
        ledger_key(tmp_path, SITE)
    assert not path.exists()
    new_key(path)
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        ledger_key(tmp_path, SITE)


def test_lines_are_read_from_the_end_of_what_is_known(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    whole_round(book)
    path = tmp_path / "ledger.jsonl"
    with line_file.locked(path) as file:
        last, torn = line_file.tail(file, path.stat().st_size)
    assert (json.loads(last)["seq"], torn) == (3, b"")
    assert [json.loads(line)["seq"] for line in book.lines_from(2).splitlines()] == [2, 3]
    assert book.lines_from(4) == ""
