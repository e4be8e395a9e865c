"""YAML and JSON files of strangers that are no configuration."""

import json
import time
from pathlib import Path

import pytest

from distclip import config, policies
from distclip.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("policy: !!python/object/apply:canary.run []", "line 1: the tag 'tag:yaml.org,"),
        ("policy: !!binary ''", "line 1: the tag 'tag:yaml.org,2002:binary' makes no value"),
        ("policy: !!timestamp x", "makes no value"),
        ("policy: !own x", "the tag '!own' makes no value"),
        ("a: 1\nb: !!int x", "line 2: 'x' is no int"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!float 1:30", "'1:30' is no float"),
        ("a: !!map x", "not valid YAML: expected a mapping node"),
        ("a: " + "9" * 4301, "a number of 4301 digits"),
        ("a: 0x" + "f" * 9999, "a number of 10001 digits"),
        ("[" * 5000, "nested too deeply"),
        ("&a [*a]", "line 1: the alias *a stands inside of what it repeats"),
        ("a: &a {<<: *a}", "the alias *a stands inside"),
        ("a: 1\n? [b]\n: 2", "found unhashable key"),
        ("policy: measure\n3: x\nnull: y", "2 problems"),
        ("\x00", "not valid YAML"),
        ("[" + "1," * 21_000 + "]", "more than 20,000 keys and values"),
        ("#" * 70_000, "longer than 65,536 characters"),
    ],
    ids=range(18),
)  # fmt: skip
def test_yaml_that_is_no_configuration(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        config.load(tmp_path / "p.yaml")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("merge", [False, True])
def test_aliases_that_unfold_to_a_billion(tmp_path: Path, merge: bool) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for n in range(9):
        repeated = ", ".join([f"*a{n}"] * 10)
        value = f"{{<<: [{repeated}]}}" if merge else f"[{repeated}]"
        lines.append(f"a{n + 1}: &a{n + 1} {value}")
    (tmp_path / "p.yaml").write_text("\n".join(lines))
    start = time.process_time()
    with pytest.raises(ConfigurationError, match="keys and values, aliases unfolded"):
        config.load(tmp_path / "p.yaml")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"policy": ' + "9" * 4301 + "}", "a number of 4301 digits"),
        ('{"a":' * 5000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"\x1b[31mred": 1}', "not valid JSON"),
        ('{"\\u001b[31mred": 1, "policy": "agc"}', '["\\x1b[31mred"]: unknown key'),
        (" " * 600_000, "longer than 524,288 bytes"),
    ],
)  # fmt: skip
def test_json_that_is_no_configuration(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        config.load(tmp_path / "p.json")
    assert told in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_byte_order_mark_and_other_encodings(tmp_path: Path) -> None:
    text = "policy: measure  # é"
    (tmp_path / "p.yaml").write_bytes(text.encode("utf-8-sig"))
    assert config.load(tmp_path / "p.yaml").policy == policies.measure()
    for encoding in ("utf-16", "utf-32", "latin-1"):
        (tmp_path / "p.yaml").write_bytes(text.encode(encoding))
        with pytest.raises(ConfigurationError, match=r"it is not UTF-8 text .*; save it as UTF-8"):
            config.load(tmp_path / "p.yaml")


def test_thousands_of_faults_are_counted_and_twenty_told(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({f"key{n}": n for n in range(20_000)}))
    with pytest.raises(ConfigurationError) as caught:
        config.load(tmp_path / "p.json")
    assert "20,001 problems" in str(caught.value)
    assert str(caught.value).endswith("and 19,981 more")
