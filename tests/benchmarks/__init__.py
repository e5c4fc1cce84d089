import sys

from tests.helpers.commands import ROOT

# Appended, because the scripts there have generic names.
sys.path.append(str(ROOT / "benchmarks"))
