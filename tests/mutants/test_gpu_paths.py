"""The probes of a GPU's paths, in the interpreter, accept the code as it is.

What they do for an instruction of inline assembly they find by its name, and a kernel may use another.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
from mutants.generated import kernel_probes

PROBES = {
    name
    for names in kernel_probes.OF_FILE.values()
    for name in names
    if name.startswith("interpreted")
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", sorted(PROBES))
def test_a_probe_accepts_the_code_as_it_is(name):
    assert not list(kernel_probes.probe(name, "cpu")())
