"""The reader of JSON and YAML: strict, bounded, and one sentence for what is wrong."""

import json
import os
import time
from dataclasses import dataclass, field
from typing import Literal

import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.files.records import (
    Damaged,
    build,
    json_lines,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    sealed,
    shown,
    typed,
    unsealed,
)


def bomb(levels):
    line = "&b0 [x,x,x,x,x,x,x,x,x,x]"
    for level in range(1, levels):
        line = f"&b{level} [{line},{','.join([f'*b{level - 1}'] * 9)}]"
    return f"a: {line}"


YAML = {
    "alias": ("a: &x [1]\nb: *x", "line 2 refers to another value"),
    "bomb": (bomb(9), "refers to another value"),
    "merge": ("a: &x {b: 1}\nc: {<<: *x}", "refers to another value"),
    "list as a key": ("{[1]: 2}", "is a key, and keys are texts"),
    "number as a key": ("1: 2", "is a key, and keys are texts"),
    "twice": ("a: 1\nb: 2\na: 3", "line 3: a is given twice"),
    "date": ("a: 2001-99-99", "not valid YAML"),
    "int": ("a: !!int abc", "not valid YAML"),
    "float": ("a: !!float abc", "not valid YAML"),
    "bool": ("a: !!bool maybe", "not valid YAML"),
    "timestamp": ("a: !!timestamp x", "not valid YAML"),
    "binary": ("a: !!binary x", "not valid YAML"),
    "set of lists": ("a: !!set {? [1]}", "not valid YAML"),
    "object": ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    "5,000 digits": ("a: " + "1" * 5000, "not valid YAML"),
    "hexadecimal": ("a: 0x" + "f" * 5000, "more than 38 digits"),
    "sexagesimal": ("a: 1" + ":10" * 5000, "more than 38 digits"),
    "5,000 brackets": ("[" * 5000, "more than 100 deep"),
    "5,000 dashes": ("- " * 5000 + "a", "more than 100 deep"),
    "half": ("a: [", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "control": ("a: \x00", "not valid YAML"),
    "large": ("a: " + "x" * 200_000, "more than the 131,072 that are read"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_refused(name):
    text, message = YAML[name]
    began = time.perf_counter()
    with pytest.raises(Damaged, match=message) as told:
        parse_yaml(text)
    assert len(str(told.value)) < 400 and time.perf_counter() - began < 5


JSON = {
    "twice": (b'{"a": 1, "a": 2}', "'a' is given twice"),
    "nan": (b'{"a": NaN}', "it holds nan"),
    "infinity": (b"[-Infinity]", "it holds -inf"),
    "1e999": (b"[1e999]", "it holds inf"),
    "large number": (b"[" + b"9" * 40 + b"]", "more than 38 digits"),
    "5,000 digits": (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
    "5,000 brackets": (b"[" * 5000 + b"]" * 5000, "more than 100 deep"),
    "200 objects": (b'{"a":' * 200 + b"1" + b"}" * 200, "more than 100 deep"),
    "latin": (b'"\xe4"', "not UTF-8 text"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
    "half": (b'{"a": ', "not valid JSON"),
    "two": (b"{} {}", "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
    "values": (b"[" + b"1," * 2**24 + b"1]", "more than 16,777,216 values"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_refused(name):
    content, message = JSON[name]
    with pytest.raises(Damaged, match=message) as told:
        parse_json(content)
    assert len(str(told.value)) < 400


def test_what_is_allowed():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, true, "\xc3\xa4"]}') == {
        "a": [1, 2.5, None, True, "ä"]
    }
    assert parse_json(b"[NaN]", finite=False)[0] != 0
    assert parse_yaml("\ufeffa: 1e-4\nb: [x, null]") == {"a": "1e-4", "b": ["x", None]}
    assert parse_json(str(2**127).encode()) == 2**127


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_files_are_told_by_their_names(tmp_path, read):
    file = tmp_path / "file"
    for content in (None, b"[1]", b"\xff\xfe", b"a: [", b"{"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file}.*; do this instead$"):
            read(file, "do this instead")
    with pytest.raises(UserError, match=str(tmp_path)):
        read(tmp_path, "")


@pytest.mark.parametrize("read", [read_json, read_yaml, lambda path, _: list(json_lines(path))])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(tmp_path, read, kind):
    path = tmp_path / "some.file"
    if kind == "pipe":  # without a writer, it would be waited for
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="it is a pipe or a device"):
        read(path, "write it again")


def test_lines_that_are_no_objects_are_left_out(tmp_path):
    file = tmp_path / "lines"
    file.write_bytes(b'{"a": 1}\n\nnull\n5\n[1]\n"x"\n{"a": NaN}\n{"b": 2}\n{"c": ')
    assert list(json_lines(file)) == [{"a": 1}, {"b": 2}]
    assert len(list(json_lines(file, finite=False))) == 3


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["one", "two"] = "one"
    inner: Inner = field(default_factory=Inner)
    pair: tuple[float, float] | None = None
    many: tuple[Inner, ...] = ()
    named: dict[int, str] = field(default_factory=dict)


def test_values_become_what_they_are_declared_as():
    made = build(
        Outer,
        {
            "name": "x", "inner": {"rate": "1e-3"}, "pair": [1, 2], "many": [{"size": 1}],
            "named": {"7": "seven"},
        },
    )  # fmt: skip
    assert made == Outer(
        name="x", inner=Inner(rate=1e-3), pair=(1.0, 2.0), many=(Inner(size=1),), named={7: "seven"}
    )
    assert build(Outer, {"name": "x", "other": 1}, strict=False) == Outer(name="x")
    assert typed({"a": int, "b": str}, {"a": 1, "c": 2}) == {"a": 1}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "name is missing; give it a text"),
        ({"name": 5}, "name is 5; it must be a text"),
        ({"name": None}, "name is null; it must be a text"),
        ({"name": "x", "kind": "y" * 10**6}, r"kind is 'yyy.*yyy'; it must be one or two"),
        ({"name": "x", "inner": 5}, "inner is 5; it is a section with keys"),
        ({"name": "x", "inner": {"size": True}}, r"inner\.size is True; it must be a whole number"),
        ({"name": "x", "inner": {"rate": [1] * 10**6}}, r"inner\.rate is \[1, 1, .* number or"),
        ({"name": "x", "inner": {"rate": 10**400}}, r"inner\.rate is a whole number of more than"),
        ({"name": "x", "pair": [1]}, "pair is .*; it must be a list of 2: a number, a n"),
        ({"name": "x", "inner": {"sise": 1}}, r"unknown key inner\.sise; .* inner\.size \(known"),
        ({"name": "x", "size": 1}, r"unknown key size; the nearest known one is inner\.size"),
        ({"name": "x", "y" * 10**6: 1}, "unknown key yyyy"),
        ({"name": "x", "many": [{"size": "a"}]}, r"many\.0\.size is 'a'"),
        ({"name": "x", "named": {"a": "b"}}, "named is .*; it must be keys with values"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_its_key(tree, message):
    with pytest.raises(Damaged, match=message) as told:
        build(Outer, tree)
    assert len(str(told.value)) < 300


def test_a_value_is_shown_short():
    for value in (
        "x" * 10**6,
        [1] * 10**6,
        {"a": "b" * 10**6},
        10**5000,
        b"x" * 10**6,
        [[[[[1]]]]],
    ):
        assert len(shown(value)) < 70
    assert shown(None) == "null" and shown([0.9]) == "[0.9]" and shown("a") == "'a'"


def test_a_seal_shows_every_change():
    values = sealed({"a": {1: [0.1, float("inf")], 10: None}, "b": "x"})
    again = parse_json(json.dumps(values).encode(), finite=False)
    assert unsealed(again) == {"a": {"1": [0.1, float("inf")], "10": None}, "b": "x"}
    for other in ({**again, "b": "y"}, {**again, "c": 1}, {**again, "sha256": None}, {"a": 1}):
        with pytest.raises(Damaged, match="changed"):
            unsealed(other)
