"""Find everything that is wrong with NVFP4 tensors, before a byte of them is laid out."""

# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product

import torch

from ..reference.recipe import BLOCK_SIZE
from .folder import Folder
from .formats import BIAS, Format
from .layers import WEIGHTS, Layer, Projection
from .locations import Place, read_matrix, read_scalar, read_vector
from .progress import Progress

_NAN = 0x7F


class TensorCheck:
    """Checks tensors one by one: their headers, then the values of those that are in order.

    A scale may be no NaN, not infinite and not negative, and a bias must be finite.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self._found: dict[str, None] = {}  # a set that keeps its order

    @property
    def problems(self) -> list[str]:
        """Each problem once, in the order in which they were found."""
        return list(self._found)

    def add(self, problem: str) -> None:
        self._found[problem] = None

    def fits(self, place: Place, dtypes: Collection[str], shapes: list[tuple[int, ...]]) -> bool:
        """Return True if a tensor exists and is as it must be; else add the reason.

        Args:
            shapes: that the whole tensor may have; nothing is said of it where none is known.
        """
        info = self.folder.info(place.name)
        if info is None:
            if (shard := self.folder.shard_of[place.name]) not in self.folder.broken:
                self.add(f"{place.name}: missing: not in {shard}, where the index has it")
            return False
        if info.dtype not in dtypes:
            self.add(f"{place.name}: its dtype is {info.dtype}; it must be {' or '.join(dtypes)}")
        if shapes and info.shape not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            self.add(f"{place.name}: its shape is {list(info.shape)}; it must be {allowed}")
        return info.dtype in dtypes and info.shape in shapes

    def bias(self, place: Place, shapes: list[tuple[int, ...]]) -> None:
        if not self.fits(place, ("F32", "BF16", "F16"), shapes):
            return
        if not read_vector(self.folder, place).isfinite().all():
            self.add(f"{place}: it has NaN or infinite values")

    def block_scales(self, place: Place, shapes: list[tuple[int, ...]]) -> None:
        if not self.fits(place, ("F8_E4M3",), shapes):
            return
        scales = read_matrix(self.folder, place).view(torch.uint8)
        nan = int(((scales & 0x7F) == _NAN).sum())
        negative = int((scales > 0x80).sum()) - int((scales == 0xFF).sum())
        for count, what in ((nan, "NaN"), (negative, "negative")):
            if count:
                self.add(f"{place}: {count} of {scales.numel()} block scales are {what}")

    def scalar(self, place: Place, shapes: list[tuple[int, ...]], form: Format) -> None:
        if not self.fits(place, ("F32",), shapes):
            return
        value = read_scalar(self.folder, place)
        decode = form.decode(value)
        if not (decode.isfinite() and decode >= 0):
            self.add(f"{place}: it is {float(value)}, not a scale")


class Headers(TensorCheck):
    """Checks headers of one layer's tensors against the sizes that most matrices agree on.

    Args:
        experts: whose weights are wanted.
        kind: of the matrices, which hold `packed` elements a column.
    """

    def __init__(
        self, folder: Folder, layer: Layer, experts: Sequence[int], kind: str, packed: int
    ):
        super().__init__(folder)
        self.layer, self.experts = layer, experts
        self.hidden_size, self.intermediate_size = self._vote(kind, packed)
        if self.hidden_size % BLOCK_SIZE or self.intermediate_size % BLOCK_SIZE:
            self.add(
                f"{layer.module}: H = {self.hidden_size} and I = {self.intermediate_size} must be "
                f"multiples of {BLOCK_SIZE}"
            )

    def size(self, projection: Projection) -> tuple[int, int]:
        """Return the rows and columns of a projection's matrix, in elements."""
        sizes = self.intermediate_size, self.hidden_size
        return sizes[::-1] if projection == "down" else sizes

    def whole(self, place: Place, rows: int, columns: int) -> list[tuple[int, ...]]:
        """Return the shape of the tensor that has such a matrix at the place, if sizes are known."""
        if not self.hidden_size:
            return []
        rows *= 1 if place.half is None else 2
        if place.flat:
            return [(place.flat * rows, columns)]
        return [(*self.stacked(place), *((columns, rows) if place.transposed else (rows, columns)))]

    def vector(self, place: Place, rows: int) -> list[tuple[int, ...]]:
        """Return the shape of the tensor that has one vector a row at the place, if sizes are known."""
        return [shape[:-1] for shape in self.whole(replace(place, transposed=False), rows, 1)]

    def scalars(self, place: Place) -> list[tuple[int, ...]]:
        """Return the shapes of a tensor of scalars: one for all, one an expert, or gate's and up's."""
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
        stacked = self.stacked(place)
        if stacked:
            shapes += [stacked, (*stacked, 1), (*stacked, 1, 1)]
        if place.half is not None:
            shapes += [(*stacked, 2)]
        return shapes

    def stacked(self, place: Place) -> tuple[int, ...]:
        return () if place.expert is None else (self.layer.num_experts,)

    def extra(self, kinds: Sequence[str]) -> None:
        """Find tensors of no projection, of experts beyond the last, and those that repeat others.

        Args:
            kinds: of the tensors of which the last is asked.
        """
        layer, count = self.layer, self.layer.num_experts
        for name in layer.strange:
            self.add(f"{name}: extra: not a tensor of an expert's projection, or there twice")
        for expert in sorted(layer.found_experts):
            if expert >= count:
                self.add(f"{layer.module}.{expert}: extra: there are {count} experts, from 0")
        places = (
            layer.place(e, p, k) for e in range(count) for p in layer.projections for k in kinds
        )
        used = {place.name for place in places if place is not None}
        for (of, _, kind), name in layer.names.items():
            if kind in kinds and (of or 0) < count and name not in used:
                self.add(f"{name}: extra: other tensors have its values")

    def _vote(self, kind: str, packed: int) -> tuple[int, int]:
        """Return (H, I) of most matrices; (0, 0) if no header can be read."""
        votes: Counter[tuple[int, int]] = Counter()
        for expert in self.experts:
            for projection in self.layer.projections:
                place = self.layer.place(expert, projection, kind)
                info = None if place is None else self.folder.info(place.name)
                if place is None or info is None:
                    continue
                if len(info.shape) < 2 or not all(info.shape):
                    self.add(f"{place.name}: its shape is {list(info.shape)}; it must be a matrix")
                    continue
                rows, columns = info.shape[-2:][::-1] if place.transposed else info.shape[-2:]
                rows //= (1 if place.half is None else 2) * (place.flat or 1)
                sizes = (columns * packed, rows)
                votes[sizes[::-1] if projection == "down" else sizes] += 1
        return votes.most_common(1)[0][0] if votes else (0, 0)


class Check(Headers):
    """Return the problems of the NVFP4 experts of one layer: which tensors there are, then each tensor.

    Args:
        experts: whose weights are wanted.
        inputs: experts that must have activation scales; those of the others are not looked at.
    """

    def __init__(
        self,
        folder: Folder,
        layer: Layer,
        form: Format,
        experts: Sequence[int],
        inputs: Collection[int],
    ):
        super().__init__(folder, layer, experts, form.codes, packed=2)
        self._form, self._inputs = form, frozenset(inputs)
        self._biased = [p for p in layer.projections if layer.has_bias(p)]

    def run(self, progress: Progress) -> list[str]:
        """Return all problems, those of whole shards first."""
        if (other := self._other_format()) is not None:
            return [other]
        self._extra()
        experts = sorted({*self.experts, *self._inputs})
        for done, expert in enumerate(experts, 1):
            self._expert(expert)
            progress(done, len(experts), f"checked expert {expert} of {self.layer.module}")
        return [*self.folder.broken.values(), *self.problems]

    def _extra(self) -> None:
        layer = self.layer
        self.extra((*self._form.kinds, BIAS))
        for (expert, _, kind), name in layer.names.items():
            if (expert or 0) < layer.num_experts and kind not in (*self._form.kinds, BIAS):
                kinds = ", ".join((*self._form.kinds, BIAS))
                self.add(f"{name}: extra: the kinds of {self._form.name} are {kinds}")

    def _other_format(self) -> str | None:
        """Say in which other format the weights are; None where some are packed NVFP4."""
        layer, infos = self.layer, {}
        for expert in self.experts:
            for projection, kind in product(layer.projections, WEIGHTS):
                place = layer.place(expert, projection, kind)
                if place is not None and (info := self.folder.info(place.name)) is not None:
                    infos[place.name] = info
        if not infos or any(info.dtype in ("U8", "I8") for info in infos.values()):
            return None
        name, info = next(iter(infos.items()))
        return (
            f"{layer.module}: its weights are not NVFP4: {name} is {info.dtype} "
            f"{list(info.shape)}, and {self._form.name} has {self._form.codes} in U8; "
            "`nvfp4-moe convert` makes NVFP4 of BF16, F16, F32 and F8_E4M3"
        )

    def _expert(self, expert: int) -> None:
        layer, form = self.layer, self._form
        kinds = [form.codes, form.block_scales, form.weight_scale] if expert in self.experts else []
        kinds += [form.input_scale] if expert in self._inputs else []
        places = {
            (p, kind): layer.place(expert, p, kind) for p in layer.projections for kind in kinds
        }
        if not any(places.values()):
            self.add(f"{layer.module}.{expert}: missing")
            return
        if expert in self.experts:
            places |= {(p, BIAS): layer.place(expert, p, BIAS) for p in self._biased}
        for (projection, kind), place in places.items():
            if place is None:
                self.add(f"{layer.module_of(expert, projection)}.{kind}: missing")
            else:
                self._tensor(place, projection, kind)

    def _tensor(self, place: Place, projection: Projection, kind: str) -> None:
        form, (rows, columns) = self._form, self.size(projection)
        if kind == form.codes:
            self.fits(place, ("U8",), self.whole(place, rows, columns // 2))
        elif kind == form.block_scales:
            self.block_scales(place, self.whole(place, rows, columns // BLOCK_SIZE))
        elif kind == BIAS:
            self.bias(place, self.vector(place, rows))
        else:
            self.scalar(place, self.scalars(place), form)
