"""What stands in tools/: where the book is, the rows of make portable, a notebook's shell."""

import os
import sys
from types import SimpleNamespace

import pytest

from tools import portable

GITHUB = "https://github.com/someone/a-book"


@pytest.fixture
def address(monkeypatch):
    pytest.importorskip("sphinx.errors")  # a GPU host without the book has none
    from tools import address

    monkeypatch.delenv("BOOK_URL", raising=False)
    monkeypatch.setattr(address, "remote", lambda: "")
    return address


def filled(address):
    config = SimpleNamespace(html_theme_options={"launch_buttons": {}})
    address.fill(None, config)
    text = "\n".join(config.myst_substitutions.values())
    return text, config.html_theme_options


@pytest.mark.parametrize("found", [GITHUB, f"{GITHUB}.git", f"{GITHUB}/"])
@pytest.mark.parametrize("given", [True, False])
def test_the_address_is_what_was_given_or_the_remote(
    found, given, address, monkeypatch
):
    if given:
        monkeypatch.setenv("BOOK_URL", found)
    monkeypatch.setattr(
        address, "remote", lambda: "https://x.org/y" if given else found
    )
    text, options = filled(address)
    assert f"git clone {GITHUB} " in text and "x.org" not in text
    assert options["repository_url"] == GITHUB
    assert set(options["launch_buttons"]) > {"colab_url", "binderhub_url"}


@pytest.mark.parametrize("remote", ["", "git@github.com:someone/a-book.git", "/a/b"])
def test_without_an_address_no_page_names_one_and_no_button_is_there(
    remote, address, monkeypatch
):
    monkeypatch.setattr(address, "remote", lambda: remote)
    text, options = filled(address)
    assert "git clone" not in text and "None" not in text and "rocket" not in text
    assert options == {"launch_buttons": {}}


def test_where_colab_cannot_open_a_notebook_there_is_no_button_for_it(
    address, monkeypatch
):
    monkeypatch.setenv("BOOK_URL", "https://gitlab.com/someone/a-book")
    text, options = filled(address)
    assert "rocket" not in text and "!git clone https://gitlab.com" in text
    assert "colab_url" not in options["launch_buttons"]
    monkeypatch.setenv("BOOK_URL", "https://git.example.org/someone/a-book")
    text, options = filled(address)
    assert "git clone https://git.example.org" in text
    assert options == {"launch_buttons": {}}


def test_a_password_in_a_remote_stays_at_home(address, monkeypatch):
    monkeypatch.setattr(
        address, "remote", lambda: "https://me:secret@github.com/a/b.git"
    )
    text, options = filled(address)
    assert "secret" not in text + str(options) and "https://github.com/a/b" in text


def test_an_address_that_no_reader_could_clone_is_refused(address, monkeypatch):
    monkeypatch.setenv("BOOK_URL", "git@github.com:someone/a-book")
    with pytest.raises(Exception, match="https"):
        address.address()


SHOW = "import os; print(os.environ.get('OPENBLAS_CORETYPE'), os.environ['MPLBACKEND'])"


def test_every_row_that_the_processor_can_run_is_run(capfd, monkeypatch):
    monkeypatch.setattr(portable.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(portable, "instructions", lambda: ["DEFAULT", "AVX2"])
    assert portable.main([sys.executable, "-c", SHOW]) == 0
    shown = capfd.readouterr().out
    for row in ("Nehalem Agg", "Haswell Agg", "Zen Agg"):
        assert row in shown
    assert "SkylakeX, avx2, AUTO, 1: skipped: no AVX512 here" in shown
    assert "SkylakeX Agg" not in shown


def test_on_other_processors_only_the_number_of_threads_changes(capfd, monkeypatch):
    monkeypatch.setattr(portable.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(portable, "instructions", lambda: [])
    assert portable.main([sys.executable, "-c", SHOW]) == 0
    assert capfd.readouterr().out.count("None Agg") == 2


def test_one_row_that_fails_fails_all(capfd, monkeypatch):
    monkeypatch.setattr(portable, "instructions", lambda: ["DEFAULT", "AVX2", "AVX512"])
    fails = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] == '4')"
    assert portable.main([sys.executable, "-c", fails]) == 1
    assert "FAILED" in capfd.readouterr().out


def test_a_notebook_is_re_run_without_what_the_shell_wants_of_it(monkeypatch):
    """The same names as in conftest.py: what is stored is then what is compared."""
    pytest.importorskip("nbclient")
    from tools import execute

    names = "MPLBACKEND", "FORCE_COLOR", "CLICOLOR_FORCE", "PYTHON_COLORS", "COLUMNS"
    for name in names:
        monkeypatch.setenv(name, "1")
    execute.main([])
    assert not set(names) & set(os.environ)
