"""Damaged checkpoints and replay files are read or refused; `make fuzz-checkpoints` has more of them."""

# SPDX-License-Identifier: Apache-2.0
import time

import pytest
from fuzz_checkpoints import TookTooLong, fuzz, limited


def test_no_damage_is_more_than_a_refusal():
    tally = fuzz(range(500))
    assert not tally.faults, tally.faults[0][1]
    names = {name.partition(":")[0] for name in tally.outcomes}
    assert len(names) == 7 and all(tally.outcomes[f"{name}: refused"] > 20 for name in names)
    assert all(tally.outcomes[f"{name}: accepted"] > 5 for name in names)


def test_what_takes_too_long_is_stopped():
    start = time.process_time()
    with pytest.raises(TookTooLong), limited(0.05):
        while time.process_time() < start + 5:
            pass
