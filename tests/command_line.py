"""Run commands of the command line in this process."""

from pathlib import Path

from diffsight.gallery.cli import main


def run(*argv):
    """Run a command and return its exit status."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


def refusal(capsys, *argv):
    """Return the one line that an invalid command prints; it writes nothing."""
    before = sorted(Path().rglob("*"))
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(Path().rglob("*")) == before
    return err.strip().splitlines()[-1]
