"""A Sphinx extension: where the book's repository is, as far as that is known.

`make book URL=https://...` says it, or an https remote of the clone. Then the pages' clone
commands are filled in, and each chapter has buttons that open it in Colab (from GitHub) and in
Binder (from GitHub and GitLab). Without an address the pages read on without it, and there are
no buttons.
"""

import os
import re
import subprocess
from pathlib import Path

from sphinx.errors import ConfigError

FOLDER = "rcm-sage-book"  # what the clone commands call the clone
CLONE = f"```bash\ngit clone {{}} {FOLDER}\ncd {FOLDER}\n```"
FIND = f'import site\nsite.addsitedir("{FOLDER}")'  # where Python is to find the clone
COLAB = f"```\n!git clone {{}} {FOLDER}\n{FIND}\n```"
NO_CLONE = "In a terminal, in your clone of this book's repository:"
NO_COLAB = f"""\
Download a chapter from its page, upload it to Colab (File → Upload notebook), and bring your
clone of this book's repository there too, as a folder `{FOLDER}`. Insert one cell at the top:

```
{FIND}
```"""
WITH_BUTTONS = """\
The rocket above each chapter opens it in Colab, or in Binder, which has no GPU and needs no
set-up. In Colab, insert one cell at the top:

"""
WITHOUT_BUTTONS = """\
Download a chapter from its page, upload it to Colab (File → Upload notebook), and insert one
cell at the top:

"""


def address() -> str | None:
    """The repository's https address, without a password or .git; None if there is none."""
    given = os.environ.get("BOOK_URL", "").strip()
    if given and not given.startswith("https://"):
        raise ConfigError(f"URL must be an https address, got {given!r}")
    found = re.match(r"https://(?:[^/@]*@)?(.+?)(?:\.git)?/*$", given or remote())
    return f"https://{found[1]}" if found else None


def remote() -> str:
    """Where the clone came from; empty if it is no clone, or git is missing."""
    command = "git", "-C", str(Path(__file__).parent), "remote", "get-url", "origin"
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def fill(app, config) -> None:
    """Completes the configuration: what the pages say, and the theme's buttons."""
    url = address()
    host = re.match(r"https://(github|gitlab)\.com/[^/]+/[^/]+$", url or "")
    on_github = host is not None and host[1] == "github"
    colab = (WITH_BUTTONS if on_github else WITHOUT_BUTTONS) + COLAB.format(url)
    config.myst_substitutions = {
        "clone": CLONE.format(url) if url else NO_CLONE,
        "colab": colab if url else NO_COLAB,
    }
    if host:
        binder = "https://mybinder.org"
        buttons = {"binderhub_url": binder, "notebook_interface": "jupyterlab"}
        if on_github:
            buttons["colab_url"] = "https://colab.research.google.com"
        config.html_theme_options |= {
            "repository_url": url,
            "repository_branch": "main",
            "launch_buttons": buttons,
        }


def setup(app) -> dict:
    # First: the theme reads its options at the same event.
    app.connect("config-inited", fill, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
