"""Replace private names in a text that a user publishes: folders, user and host names."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Names that say nothing about a user, and occur in other texts.
COMMON_NAMES = ("root", "runner", "user", "mac", "localhost")


def redact(text: str, folders: Mapping[str, Path]) -> str:
    """Replace folders by their placeholders, such as {"CHECKOUT": path}, and then the temporary and
    home folders, user and host names by TEMP, HOME, USER and HOST.
    """
    folders = {**folders, "TEMP": Path(tempfile.gettempdir()), "HOME": Path.home()}
    replacements = [
        (str(path), placeholder)
        for placeholder, folder in folders.items()
        for path in (folder.resolve(), folder)
        if path.name
    ]
    for host in (socket.gethostname(), os.uname().nodename):
        replacements += [(host, "HOST"), (host.partition(".")[0], "HOST")]
    with contextlib.suppress(KeyError):  # a container may have no name for its user
        replacements.append((pwd.getpwuid(os.getuid()).pw_name, "USER"))
    replacements += [(os.environ.get(name, ""), "USER") for name in ("USER", "LOGNAME")]
    for private_name, placeholder in replacements:
        # Only whole words, since "jan" is in "January", and no common words.
        if len(private_name) > 2 and private_name.lower() not in COMMON_NAMES:
            pattern = rf"(?<![^\W\d_]){re.escape(private_name)}(?![^\W\d_])"
            text = re.sub(pattern, placeholder, text, flags=re.I)
    return text
