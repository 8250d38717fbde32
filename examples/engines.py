"""The same sample from every engine, and the choice among them: python examples/engines.py"""

import time

import patchscore as ps
from patchscore.engines import NAMES

bank = ps.PatchBank.open("fashion-mnist", limit=40)
images = {}
for engine in NAMES:
    machine = ps.EquivariantLocalScore(bank, patch_size=7, engine=engine)
    start = time.perf_counter()
    images[engine] = ps.sample(machine, n=1, steps=6)
    apart = (images[engine] - images[next(iter(NAMES))]).abs().max()
    print(f"{engine}: {time.perf_counter() - start:.2f} s, worst pixel {apart:.1e} from the first engine's")
print(ps.EquivariantLocalScore(bank, patch_size=7).explain_choice())
