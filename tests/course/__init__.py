"""Tests of docs/learn, whose scripts they import."""

import sys

from tests.helpers.commands import ROOT

sys.path.append(str(ROOT / "docs" / "learn"))
