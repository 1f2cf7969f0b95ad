"""Calls that repeat: the launches of a call are kept, and made again for other tensors of the same form.

The Python before the launches takes far longer than the launches: it checks arguments, chooses a
backend, chooses tiles, allocates. Its outcome depends on the *form* of a call alone (`form`). The
second call of a form is recorded (`recorder`). Later ones (`repeats`) take their addresses from their
own tensors, allocate, and launch. Nothing is kept of a tensor but its form.

Recorded is a call that does nothing on the GPU but launch kernels by `launcher.launch`, copy a given
tensor, and write a result into one. One that runs another operation of torch is never recorded, nor one
under `torch.compile`, a dispatch mode or a transform of torch.func, nor one that needs a gradient, nor
one whose launches a profiler watches, nor one that a CUDA graph captures, which checks no values. A call
that is captured is launched from a record that was made before.
"""

# SPDX-License-Identifier: Apache-2.0
