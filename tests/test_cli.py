"""The command line, as users meet it: real processes, real sockets, exit codes, one line for an error."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvferry

CONTEXT = "Ann has tea in Oslo. Ben has salt in Rome. Cleo has jam in Bath. Dan has rope in Lima."
QUESTION = "Where is the salt?"

pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes to start a process that needs seconds


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvferry", *words]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
    process = start(*words)
    out, err = process.communicate(stdin)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    """A receiver that answers for the whole module."""
    process = start("serve", "--port", "0")
    try:
        yield str(json.loads(process.stdout.readline())["port"])
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_help_loads_nothing_heavy():
    code = "import sys; from typer.testing import CliRunner; from kvferry.cli import app;"
    code += "heavy = {'torch', 'transformers', 'numpy', 'pydantic'};"
    code += "print(CliRunner().invoke(app, ['--help']).exit_code, heavy & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 set()"


def test_help_names_every_verb():
    code, out, _ = run("--help")
    assert code == 0
    assert all(verb in out for verb in ("ask", "serve", "send", "demo", "zoo"))


def test_version():
    assert run("--version") == (0, f"{kvferry.__version__}\n", "")


def test_zoo_list():
    code, out, _ = run("zoo", "list")
    assert code == 0
    assert {"llama", "qwen3"} <= {line.split()[0] for line in out.splitlines()}


def test_ask_answers_and_counts():
    code, out, err = run("ask", "--context", "-", "--question", QUESTION, "--json", stdin=CONTEXT)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["answer"] == "Rome"
    assert found["n_bytes"]["link"] > found["n_bytes"]["message"] > 1000
    assert list(found["latency_ms"]) == [
        "capture",
        "encode",
        "link",
        "decode",
        "align",
        "prefill",
        "generate",
    ]


def test_a_refused_sender_is_told_and_the_receiver_answers_the_next(port: str, tmp_path: Path):
    file = tmp_path / "context.txt"
    file.write_text(CONTEXT)
    words = ("send", "--context", str(file), "--question", QUESTION, "--port", port)
    assert_clean_error(run(*words, "--sender", "qwen3"), 1, "ForeignModel")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "Rome"
    assert out.splitlines()[1].startswith("bytes  message ")


def test_a_port_in_use(port: str):
    assert_clean_error(run("serve", "--port", port), 1, "Choose another port")


def test_nobody_listens():
    found = run("send", "--context", "-", "--question", QUESTION, "--port", "1", stdin=CONTEXT)
    assert_clean_error(found, 1, "Start the receiver there first")


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        (("--context", "-"), "", "- holds no text"),
        (("--context", "-"), " \n\t", "- holds no text"),
        (("--context", "no-such-file"), "", "cannot read no-such-file: No such file"),
        (("--context", "."), "", "cannot read .: Is a directory"),
        (("--context", "-", "--sender", "lama"), CONTEXT, "Did you mean 'llama'?"),
        (("--context", "-", "--codec", "itn(bits=8)"), CONTEXT, "Did you mean 'int'?"),
        (("--context", "-", "--codec", "int(bits"), CONTEXT, "cannot read the spec"),
        (("--context", "-", "--max-bytes", "100"), CONTEXT, "Allow at least"),
    ],
)
def test_bad_questions(words: tuple[str, ...], stdin: str, said: str):
    assert_clean_error(run("ask", "--question", QUESTION, *words, stdin=stdin), 2, said)


@pytest.mark.parametrize("words", [("ask",), ("fly",), ("demo", "--items", "x"), ("serve", "--port", "x")])
def test_bad_calls(words: tuple[str, ...]):
    code, _, err = run(*words)
    assert code == 2
    assert "Traceback" not in err


def test_items_come_in_twins():
    assert_clean_error(run("demo", "--items", "7"), 2, "choose an even number")


def test_no_utf8(tmp_path: Path):
    file = tmp_path / "context.txt"
    file.write_bytes(b"Ann \xff")
    found = run("ask", "--context", str(file), "--question", QUESTION)
    assert_clean_error(found, 2, "no UTF-8 at byte 4")


def test_debug_shows_the_traceback():
    code, _, err = run("--debug", "ask", "--context", "no-such-file", "--question", QUESTION)
    assert code != 0
    assert "Traceback" in err


def assert_clean_error(found: tuple[int, str, str], exit_code: int, said: str) -> None:
    code, out, err = found
    assert (code, out) == (exit_code, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
