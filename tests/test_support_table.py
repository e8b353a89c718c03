"""docs/support.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_named_in_the_table_exists():
    table = (TESTS.parent / "docs" / "support.md").read_text()
    named = 0
    for row in (line for line in table.splitlines() if line.startswith("|")):
        file = None
        for module, name in re.findall(r"`(test_\w+\.py)?(?:::)?([\w:]*)`", row):
            if module:
                file = (TESTS / module).read_text()
            test = name.split("::")[-1]
            if test.startswith("test_"):
                assert file is not None and re.search(rf"^ *def {test}\(", file, re.MULTILINE), (test, row)
                named += 1
    assert named > 40
