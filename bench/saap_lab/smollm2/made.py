"""Made-up text in which something said early is wanted much later: records, registers, conversations. No two are alike.

Real prose rarely forces a model to look thousands of tokens back; a list of codes that is asked for again does, and that is
what a cache index is for. Everything follows from a fixed seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

_NAMES = (
    "Ada Amir Bela Carlos Chen Dalia Edwin Farah Goran Hana Ines Jonas Kofi Leila Marek Nadia Olga Pavel Quinn Rosa Samir Tove "
    "Uma Viktor Wanda Yusuf Zoe Ingrid Mateo Priya"
).split()
_PLACES = "Alder Brook Cedar Dover Elm Falcon Grove Harbour Iron Juniper Kestrel Linden Maple North Oak Pine Quarry River".split()
_THINGS = (
    "ledger lamp anchor violin telescope carpet barrel compass kettle statue bridge engine basket mirror garden clock letter "
    "medal painting bicycle map coat boat drum saddle vase"
).split()
_COLOURS = "red blue green amber grey white black silver copper violet".split()
_VERBS = "sold lent repaired found measured painted delivered returned weighed hid borrowed inspected".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def records(count: int = 60, seed: int = 1) -> Iterator[tuple[str, str]]:
    """Tables, JSON, logs and lists of codes, each followed by questions about lines far above."""
    writers: list[Callable[[random.Random], str]] = [_table, _json, _log, _codes, _steps]
    for number in range(count):
        rng = random.Random(seed * 100_003 + number)
        yield f"{number}", writers[number % len(writers)](rng)


def talks(count: int = 40, seed: int = 2) -> Iterator[tuple[str, str]]:
    """Conversations and little chronicles whose people, things and places come back."""
    for number in range(count):
        rng = random.Random(seed * 100_003 + number)
        yield f"{number}", (_talk if number % 2 else _chronicle)(rng)


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(_COLOURS)} {rng.choice(_THINGS)}"


def _place(rng: random.Random) -> str:
    return f"{rng.choice(_PLACES)} {rng.choice(('Street', 'Square', 'Lane', 'Hill', 'Gate', 'House'))}"


def _table(rng: random.Random) -> str:
    rows = [
        (f"{rng.randrange(1000, 9999)}-{rng.choice('ABCD')}", rng.choice(_NAMES), _thing(rng), _place(rng), rng.randrange(3, 990))
        for _ in range(rng.randrange(60, 140))
    ]
    separator = rng.choice((",", "\t", " | "))
    lines = [separator.join(("id", "owner", "item", "place", "price"))]
    lines += [separator.join(map(str, row)) for row in rows]
    for key, owner, item, place, price in rng.sample(rows, 25):
        lines.append(f"\nRow {key}: the owner is {owner}, the item is a {item}, it is kept at {place} and costs {price}.")
    return "\n".join(lines)


def _json(rng: random.Random) -> str:
    entries = {
        f"{rng.getrandbits(32):08x}": {
            "name": f"{rng.choice(_NAMES)} {rng.choice(_PLACES)}",
            "address": {"street": _place(rng), "number": rng.randrange(1, 300)},
            "items": [_thing(rng) for _ in range(rng.randrange(1, 4))], "active": rng.random() < 0.5,
        }
        for _ in range(rng.randrange(30, 60))
    }
    lines = [json.dumps(entries, indent=rng.choice((1, 2, 4)))]
    for key in rng.sample(list(entries), 20):
        lines.append(f'get("{key}") -> {json.dumps(entries[key])}')
    return "\n".join(lines)


def _log(rng: random.Random) -> str:
    clock, lines, jobs = rng.randrange(10**5), [], [f"job-{rng.randrange(10**5):05d}" for _ in range(25)]
    nodes = {job: rng.choice(_PLACES).lower() + str(rng.randrange(9)) for job in jobs}
    for _ in range(rng.randrange(120, 220)):
        clock += rng.randrange(1, 90)
        job = rng.choice(jobs)
        stamp = f"{clock // 3600 % 24:02d}:{clock // 60 % 60:02d}:{clock % 60:02d}"
        what = rng.choice(("started", "waiting for input", f"retry {rng.randrange(1, 5)}", "checkpoint", "finished", "failed"))
        lines.append(f"{stamp} {rng.choice(('INFO', 'WARN', 'DEBUG'))} [{nodes[job]}] {job}: {what}")
    lines += [f"{job} ran on {nodes[job]}." for job in rng.sample(jobs, 15)]
    return "\n".join(lines)


def _codes(rng: random.Random) -> str:
    """Needles: numbers said once among filler, and asked for at the end in another order."""
    owners = [f"{name} of {_place(rng)}" for name in rng.sample(_NAMES, 18)]
    codes = {owner: rng.randrange(10**4, 10**7) for owner in owners}
    lines = []
    for owner in owners:
        lines.append(f"The code of {owner} is {codes[owner]}. Remember it.")
        for _ in range(rng.randrange(2, 7)):
            lines.append(f"On {rng.choice(_DAYS)} {rng.choice(_NAMES)} {rng.choice(_VERBS)} a {_thing(rng)} near {_place(rng)}.")
    rng.shuffle(owners)
    lines += [f"What is the code of {owner}? The code of {owner} is {codes[owner]}." for owner in owners]
    return "\n".join(lines)


def _steps(rng: random.Random) -> str:
    """A program that names what it uses again: definitions, then calls."""
    names = [f"{rng.choice(_VERBS)}_{rng.choice(_THINGS)}_{number}" for number in range(30)]
    lines = []
    for number, name in enumerate(names):
        used = rng.sample(names[:number], min(number, 2))
        arguments = ", ".join(rng.sample(_COLOURS, rng.randrange(1, 4)))
        body = " + ".join([f"{other}({rng.choice(_COLOURS)})" for other in used] + [str(rng.randrange(100))])
        told = f"{rng.choice(_VERBS).capitalize()} the {_thing(rng)}."
        lines.append(f'def {name}({arguments}):\n    """{told}"""\n    return {body}\n')
    lines += [f"{rng.choice(_NAMES).lower()} = {rng.choice(names)}({rng.randrange(100)})" for _ in range(60)]
    return "\n".join(lines)


def _talk(rng: random.Random) -> str:
    people = rng.sample(_NAMES, rng.randrange(2, 5))
    facts: list[tuple[str, str, str, str]] = []
    lines = []
    for _ in range(rng.randrange(60, 110)):
        speaker, other = rng.sample(people, 2)
        if len(facts) > 5 and rng.random() < 0.5:
            who, what, where, when = rng.choice(facts)
            lines.append(f"{speaker}: Do you remember where {who} left the {what}, {other}?")
            lines.append(f"{other}: Of course, it was at {where}, on {when}.")
        else:
            fact = (rng.choice(people), _thing(rng), _place(rng), rng.choice(_DAYS))
            facts.append(fact)
            lines.append(f"{speaker}: On {fact[3]} {fact[0]} {rng.choice(_VERBS)} the {fact[1]} and left it at {fact[2]}.")
            lines.append(f"{other}: {rng.choice(('I see.', 'Is that so?', 'I did not know that.', 'Who told you?', 'Strange.'))}")
    return "\n".join(lines)


def _chronicle(rng: random.Random) -> str:
    hero, friend, rival = rng.sample(_NAMES, 3)
    treasure, home = _thing(rng), _place(rng)
    parts = [f"In the year {rng.randrange(1200, 1990)} {hero} lived at {home} and owned a {treasure}."]
    for chapter in range(1, rng.randrange(14, 26)):
        place, thing = _place(rng), _thing(rng)
        parts.append(
            f"\nChapter {chapter}\n\nIt was {rng.choice(_DAYS)} when {hero} came to {place}. {friend}, who had "
            f'{rng.choice(_VERBS)} a {thing} there, asked about the {treasure}. "It is still at {home}," said {hero}, '
            f'"and {rival} must not hear of it." They {rng.choice(_VERBS)} the {thing} together and parted. That night {rival} '
            f"{rng.choice(_VERBS)} the gate of {home}."
        )
    return "\n".join(parts)
