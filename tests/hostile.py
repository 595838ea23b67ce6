"""A text that would do harm wherever it is shown as it is, and what must hold where it is shown."""

import csv
import io
import re
import xml.etree.ElementTree as ET

HOSTILE = (
    '=HYPERLINK("http://x","y")<script>alert(1)</script>&lt;\r\n# title\n| a `b` \\| [c](d) '
    "\x00\x07\x1b]0;t\x9b2J\u202e\ud800[bold]"
)
STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check_markdown(page: str) -> None:
    """No tag, no line or cell more than we wrote, no link."""
    assert page.encode() and "HYPERLINK" in page and not STEERING.search(page)
    assert "<script" not in page and "\n# title" not in page and "](" not in page
    bare = [re.sub(r"\\.", "", line) for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in bare}) <= 1
    assert all("`" not in line for line in bare)


def check_csv(text: str) -> None:
    """No cell is a formula."""
    assert text.encode() and not STEERING.search(text)
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert any(cell.startswith("'=HYPERLINK") for cell in cells)
    assert not any(re.match(r"[=@\t\r+-]", cell) for cell in cells if not _is_number(cell))


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell))


def check_picture(picture: str) -> None:
    """XML, with a name, in which the text is text."""
    root = ET.fromstring(picture.encode())
    assert root.get("role") == "img" and root.get("aria-label")
    assert root[0].tag.endswith("title") and root[0].text == root.get("aria-label")
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    assert any("<script>" in (e.text or "") for e in root.iter())
