"""`python -m sememe` is the command `sememe`."""

import subprocess
import sys

from sememe import __version__


def as_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sememe", *arguments], capture_output=True, text=True)


def test_the_module_takes_the_commands_arguments():
    done = as_module("--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    done = as_module("browse", "--help")  # which imports no torch
    assert done.returncode == 0 and "Usage: sememe browse" in done.stdout


def test_the_module_leaves_with_the_commands_exit_code_and_one_line():
    done = as_module("harvset")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "a command must be one of sememe's, got 'harvset'. Did you mean 'harvest'" in done.stderr
