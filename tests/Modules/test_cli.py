"""Exit codes, the one line of a user's error, and words that name their nearest relative."""

import subprocess
import sys
from pathlib import Path

import pytest

from Modules import cli
from Modules.cli import Parser, UserError

ROOT = Path(__file__).parents[2]


def run_main(body: str) -> subprocess.CompletedProcess:
    """A process whose `main` has this body."""
    script = f"from Modules import cli\ndef main():\n    {body}\ncli.run(main)\n"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("print('done')", 0),
        ("raise cli.UserError('no such folder')", 2),
        ("raise RuntimeError('a defect')", 1),
        ("raise KeyboardInterrupt", 130),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", 130),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("raise cli.Stopped(15, 'go on with --resume')", 143),
        ("raise OSError(28, 'No space left on device', 'figures/tsne.png')", 2),
        ("raise OSError(2, 'a defect')", 1),
        ("cli.Parser(prog='train.py').parse_args(['--help'])", 0),
    ],
)
def test_exit_codes(body, code):
    assert run_main(body).returncode == code


def test_a_full_disk_is_one_line_that_names_the_file():
    done = run_main("raise OSError(28, 'No space left on device', 'figures/tsne.png')")
    (line,) = done.stderr.splitlines()
    assert "figures/tsne.png: No space left on device; make room" in line


def test_a_defect_keeps_its_traceback():
    assert "RuntimeError: a defect" in run_main("raise RuntimeError('a defect')").stderr


@pytest.mark.parametrize("cause", ["None", "OSError('file vanished')"])
def test_a_users_error_is_one_line_without_traceback(cause):
    done = run_main(f"raise cli.UserError('first:\\n\\n  second   third\\n') from {cause}")
    assert done.stderr.splitlines() == ["-c: first: second third"]
    assert done.stdout == ""


@pytest.mark.parametrize(("word", "known"), [("recpie", "recipe"), ("full-modle", "full-model"), ("mnits", "mnist")])
def test_nearest_names_the_relative(word, known):
    assert cli.nearest(word, ["recipe", "full-model", "mnist"]) == f"did you mean {known}?"


def test_nearest_lists_what_is_known_where_nothing_is_near():
    assert cli.nearest("zzzz", (name for name in ["alpha", "beta"])) == "known: alpha, beta"


@pytest.fixture
def parser():
    parser = Parser(prog="train.py")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--learning-rate", type=float)
    return parser


def test_the_parser_reads_what_is_right(parser):
    options = parser.parse_args(["mnist", "--epochs", "3", "--learning-rate=0.5", "more"])
    assert (options.words, options.epochs, options.learning_rate) == (["mnist", "more"], 3, 0.5)


@pytest.mark.parametrize(
    "arguments", [["--epocs", "3"], ["--epocs=3"], ["mnist", "--epocs", "3", "--seed"], ["--epoch", "3"]]
)
def test_an_unknown_option_names_the_nearest(parser, arguments):
    with pytest.raises(UserError, match=r"unknown option --epocs?h?: did you mean --epochs\?"):
        parser.parse_args(arguments)


@pytest.mark.parametrize("arguments", [["--epochs", "three"], ["--epochs"], ["--epochs", "1.5"]])
def test_a_wrong_value_names_its_option(parser, arguments):
    with pytest.raises(UserError, match="--epochs"):
        parser.parse_args(arguments)
