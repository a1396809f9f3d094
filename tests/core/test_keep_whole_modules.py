"""A slot that is continued ends inside no module, also where modules lie between one another."""

from __future__ import annotations

import pytest
import torch
from pcache_core.assemble import Wanted, keep_whole_modules
from pcache_core.slots import COMPUTED, Lease

from pcache_core.encode import Module
from pcache_core.kv import LayerShape, Slot, stack_layers
from pcache_core.passage import Passage
from pcache_core.plan import Candidate


def wanted(*runs: tuple[int, int]) -> Wanted:
    passage = Passage(tuple(range(sum(stop - start for start, stop in runs))))
    return Wanted(Candidate(runs, passage, 0, ((),)), Module(passage, 0), ())


@pytest.mark.parametrize(
    ("held", "kept"),
    [(3, 3), (5, 3), (8, 8), (10, 8), (11, 11), (13, 8), (16, 8), (19, 8), (20, 20)],
)
def test_a_cut_module_is_left_out_and_what_that_cuts_as_well(held: int, kept: int) -> None:
    layers = (LayerShape(1, 2, 1, 2),)
    slot = Slot(stack_layers(layers), 20, dtype=torch.float32, device=torch.device("cpu"))
    lease = Lease(slot, list(range(held)), list(range(held)), [COMPUTED] * held)
    # Rows 3-8 are one module; 8-11 and 14-17, 11-14 and 17-20 are two that cross.
    modules = [wanted((3, 8)), wanted((8, 11), (14, 17)), wanted((11, 14), (17, 20))]
    if held == 11:
        modules = [modules[0], modules[2]]
    keep_whole_modules(lease, modules)
    assert len(lease.token_ids) == len(lease.positions) == len(lease.labels) == kept
