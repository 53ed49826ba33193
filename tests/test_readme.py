"""The README's Python runs and prints what it says."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_what_its_comments_say():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    said = StringIO()
    with redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    assert said.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", code)
