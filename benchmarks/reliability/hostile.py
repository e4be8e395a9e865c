"""Documents gone wrong: mutations of valid ones, documents by a grammar, and random bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Tree = Any

CANARY = "distclip_fuzz_canary"
"""A module whose import, and a YAML tag whose construction, can be seen."""

TOKENS: tuple[bytes, ...] = (
    f"!!python/object/apply:{CANARY}.run []".encode(),
    f"!!python/name:{CANARY}.run ''".encode(),
    b"!!python/object/new:os.system ['true']", b"!!binary ''", b"!!binary not-base64",
    b"!!set {a}",
    b"!!timestamp x", b"!!timestamp 2001-01-01", b"!!int x", b"!!int ''", b"!!float x",
    b"!!bool x",
    b"!!null x", b"!!omap [a: 1]", b"!!pairs x", b"!!map x", b"!!seq x", b"!!str {a: 1}", b"!x y",
    b"! z", b"!<tag:yaml.org,2002:int> 1e", b"%YAML 9.9\n---\n", b"%TAG ! tag:x,2000:\n---\n",
    b"---\n", b"...\n", b"9" * 4301, b"-" + b"9" * 5000, b"0x" + b"f" * 6000, b"1" + b"0" * 400,
    b"1e999", b"-1e999", b".nan", b".inf", b"NaN", b"Infinity", b"1_000", b"0b1", b"1:30",
    b"2001-01-01",
    b"[" * 3000, b"{a: " * 2000, b"- " * 2000, b"? " * 500, b'{"a":' * 3000, b"[" * 50, b"&a ",
    b"*a",
    b"*b ", b"&a [*a]", b"<<: ", b"<<: *a", b"<<: [1, 2]", b"<<: {<<: {<<: 1}}", b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf", b"\xfe\xff\x00p", b"\x80", b"\xc3\x28", b"\xed\xa0\x80", b"\xe2\x80\xae",
    b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[31m", b"\x1b]0;x\x07", b"\\u0000", b"\\ud800",
    b"[red]", b"[/]",
    b"[link=x]", b"$x^$", b"\t", b"\r", b"\n", b" ", b"'", b'"', b"\\", b"#", b":", b"- ", b",",
    b"{", b"}",
    b"[", b"]", b"|\n", b">\n", b"a" * 100_000, b"a: b\n" * 200, b"policy: measure\n",
    b"? [a]\n: b\n",
    b"1: 2\n", b"null: 1\n", b"true: 1\n", f"imports: [{CANARY}]\n".encode(),
)  # fmt: skip
"""Put into text at random places."""

VALUES: tuple[Tree, ...] = (
    None, True, False, 0, -1, 1, 10**4, 10**20, 10**400, -(10**400), 0.0, -0.0, 0.5, 1e308,
    1e-320,
    float("inf"), float("-inf"), float("nan"), "", "x", "inf", "measure", "agc", "auto", "\x00",
    "\x1b[31mx",
    "a\nimports: [" + CANARY + "]", "[red]x[/]", "[/]", "$\\frac$", "\ud800", "‮x", "é" * 300,
    "x" * 10_000, [], {}, [[]], [None], {"": None}, {"name": "agc"}, ["measure", "agc"],
    [[["measure"]]],
    {"name": None}, {"name": ["agc"]}, {"name": {"name": "agc"}}, {"jsonl": "x"}, {"*": None},
    {"[": "agc"},
    [CANARY], ["no_such_module_at_all"], "../x", ["a"] * 300, {str(n): n for n in range(60)},
)  # fmt: skip
"""Put in the place of any part of a tree."""

KEYS: tuple[Any, ...] = (
    "policy", "name", "by_name", "log", "imports", "max_norm", "clip_factor", "distclip",
    "step", "total_norm",
    "$schema", "", "x", "\x1b[2J", "[red]", "a\nb", "gradient_clipping", "gradient_clip_norm",
    "\ud800",
)  # fmt: skip

STRANGE_KEYS: tuple[Any, ...] = (None, True, 3, 2.5, float("nan"), ("a", 1), b"x")
"""Only a mapping in memory, or YAML, has these."""


def mutated(rng: Random, text: bytes) -> bytes:
    """Text after a few accidents."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        text = rng.choice(_ACCIDENTS)(rng, text)
    return text


def _insert(rng: Random, text: bytes) -> bytes:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(TOKENS) + text[at:]


def _replace(rng: Random, text: bytes) -> bytes:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(TOKENS) + text[at + rng.randint(0, 12) :]


def _cut(rng: Random, text: bytes) -> bytes:
    at = rng.randint(0, len(text))
    return text[:at] + text[at + rng.randint(1, 30) :]


def _truncate(rng: Random, text: bytes) -> bytes:
    return text[: rng.randint(0, len(text))]


def _double(rng: Random, text: bytes) -> bytes:
    at = rng.randint(0, len(text))
    return text[: at + rng.randint(0, 60)] + text[at:]


def _flip(rng: Random, text: bytes) -> bytes:
    changed = bytearray(text or b"x")
    changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _recode(rng: Random, text: bytes) -> bytes:
    plain = text.decode("utf-8", "replace")
    return plain.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")))


_ACCIDENTS: Sequence[Callable[[Random, bytes], bytes]] = (
    _insert, _insert, _insert, _replace, _replace, _cut, _truncate, _double, _flip, _flip,
    _recode,
)  # fmt: skip


def noise(rng: Random) -> bytes:
    """Random bytes, or a heap of tokens."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.choice((0, 1, 2, 30, 300, 3000)))
    return b"".join(rng.choice(TOKENS) for _ in range(rng.randint(1, 8)))


def bent(rng: Random, tree: Tree, *, strange: bool = False) -> Tree:
    """A copy of a tree with one to three parts replaced, renamed, removed or put deeper."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = holders_of(tree)
        if not holders:
            return rng.choice(VALUES)
        holder = rng.choice(holders)
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        place = rng.choice(places) if places else "x"
        keys = KEYS + STRANGE_KEYS if strange else KEYS
        how = rng.randrange(6)
        if isinstance(holder, list) and (not holder or how == 0):
            holder.append(copy.deepcopy(rng.choice(VALUES)))
        elif how == 0 or not places:
            holder[rng.choice(keys)] = copy.deepcopy(rng.choice(VALUES))
        elif how == 1:
            del holder[place]
        elif how == 2 and isinstance(holder, dict):
            holder[rng.choice(keys)] = holder.pop(place)
        elif how == 3:
            holder[place] = rng.choice(({"name": holder[place]}, [holder[place]] * 2))
        else:
            holder[place] = copy.deepcopy(rng.choice(VALUES))
    return tree


def holders_of(tree: Tree) -> list[Any]:
    """Every mapping and list in a tree."""
    if not isinstance(tree, (dict, list)):
        return []
    parts = tree.values() if isinstance(tree, dict) else tree
    return [tree, *(holder for part in parts for holder in holders_of(part))]


def grown(rng: Random, names: Sequence[str], depth: int = 0) -> Tree:
    """A configuration by a grammar that knows the names and not the rules."""

    def policy() -> Tree:
        spec: dict[str, Tree] = {"name": rng.choice([*names, "nothing", "Own"])}
        for _ in range(rng.randint(0, 3)):
            key = rng.choice(("max_norm", "clip_factor", "eps", "window", "percentile",
            "unit_dims", "sigma",
                              "norm_type", "clip_value", "threshold", "alpha",
                              "unit"))  # fmt: skip
            spec[key] = rng.choice(
                (*VALUES[:22], rng.random() * 10, rng.randint(-3, 300), {"*": [0, 1]})
            )
        return rng.choice((spec, spec, spec["name"]))

    document: dict[str, Tree] = {}
    if rng.random() < 0.9:
        chain = [policy() for _ in range(rng.randint(0, 4))]
        document["policy"] = policy() if rng.random() < 0.7 else chain
    if rng.random() < 0.4:
        keys = rng.sample(("*", "*.bias", "head.*", "[", "", "é", "a" * 50), 3)
        document["by_name"] = {key: rng.choice((policy(), None, [policy()])) for key in keys}
    for key, choices in (
        ("on_nonfinite", ("skip", "error", "zero", "pass", "nothing", 3)),
        ("norms", (True, False, "yes", None)),
        ("verify_replicas", ("first", "never", 3, 0, -1, 10**30)),
        ("fold", (True, 1)), ("overlap", (False, "no")),
        ("log", ({"jsonl": "r.jsonl"}, {"jsonl": "\x00"}, {"jsonl": "r", "every": 0}, "r.jsonl")),
        ("imports", ([CANARY], [CANARY, "no_such_module_at_all"], ["a b"], CANARY, [3])),
    ):  # fmt: skip
        if rng.random() < 0.2:
            document[key] = rng.choice(choices)
    return document


def as_yaml(tree: Tree) -> bytes:
    """With whatever tags it takes to write the tree."""
    import yaml

    return yaml.dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def as_json(tree: Tree) -> bytes:
    return json.dumps(tree, default=repr).encode()
