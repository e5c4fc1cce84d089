"""How functions run on this device: compiled, and on a CPU on its threads. On a GPU the rest does
nothing.
"""

from mlxgpt.backend.cpu.blas import shared_by as shared_by
from mlxgpt.backend.cpu.jit import compiled as compiled
from mlxgpt.backend.cpu.parallel import Lanes as Lanes
