"""The demo's parts: stages, corpus, model, training, cost, report."""

import os

# OpenMP threads that spin at a barrier take the cores from the thread they wait for. On two cores with other work
# beside it, a step took 0.17 to 0.26 s with sleeping threads and 0.7 to 3 s with spinning ones. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
