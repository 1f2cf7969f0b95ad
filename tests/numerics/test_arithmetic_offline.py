"""Each function of fp32 arithmetic is one instruction of a GPU, with its operands as they are."""

# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from mutants.generated.jit_calls import of_two_kernel
from offline import compile_kernel

TYPES = {name: "*fp32" for name in ("a_ptr", "b_ptr", "c_ptr", "table_ptr", "y_ptr")} | {"N": "i32"}


@pytest.mark.parametrize("ftz", [True, False], ids=["cuda", "cute-dsl"])
@pytest.mark.parametrize("name", ["mul", "mul_magnitude", "sub", "add", "div", "fma", "reciprocal"])
def test_an_operation_is_one_instruction(name, ftz):
    constants = {"NAME": name, "FTZ": ftz, "BLOCK": 128, "ARCH": 90}
    ptx = compile_kernel(of_two_kernel, 90, TYPES, constants, ()).asm["ptx"]
    found = set(re.findall(r"\b([a-z]+)\.(?:[a-z]+\.)*f32\b", ptx)) - {"ld", "st", "mov"}
    plain = {"mul_magnitude": {"abs", "mul"}, "reciprocal": {"rcp"}}
    assert found == plain.get(name, {name})
    assert (".rn.ftz.f32" in ptx) == ftz and (".rn.f32" in ptx) != ftz
