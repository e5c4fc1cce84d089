import sys

from tests.helpers.commands import ROOT

# Last, since the scripts there have plain names.
sys.path.append(str(ROOT / "benchmarks"))
