"""The components of a model on their planned devices, loaded for the shapes of a request and kept.

A component whose device fails moves to its next place in the plan, and `plan` records it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from ..backends import Backend, Component, LoadRequest
from ..bundle.bundle import ModelBundle
from ..bundle.parts import TINY, home_of
from ..components.base import Changeable, Resting, Shapes
from ..components.edits import NONE, Edits
from ..components.fallback import FAILURES, Guarded, reason
from ..components.offload import Turn, Turns
from ..components.tiling import fitted
from ..devices.plan import DevicePlan
from ..errors import DeviceError, InvalidRequest, NumericalError


class Components:
    """Parts by name. With `turns` one of them is in memory at a time."""

    def __init__(self, bundle: ModelBundle, plan: DevicePlan, backend: Backend, turns: Turns | None = None) -> None:
        self.bundle, self.plan, self.backend, self.turns = bundle, plan, backend, turns
        self._loaded: dict[str, tuple[Shapes, Component]] = {}
        self._edits: dict[str, Edits] = {}
        self._planning = Lock()
        # Files of models without hashes that were replaced since they were last used.
        self.changed: list[str] = []

    def __contains__(self, part: str) -> bool:
        return part in self._loaded

    def __getitem__(self, part: str) -> Component:
        return self._loaded[part][1]

    def shapes(self, part: str) -> Shapes:
        """What a component was loaded for."""
        return self._loaded[part][0]

    def fitted(self, part: str, latents: tuple[int, ...]) -> Component:
        """A component as one for latents of this shape: in tiles where it was loaded for less."""
        (shapes, component), space = self._loaded[part], self.bundle.facts.latents
        if part.startswith("vae") or part == TINY:
            return fitted(component, part, shapes, space.own_shape(latents), space.own_factor)
        return fitted(component, part, shapes, latents, space.factor)

    def prepare(self, wanted: Mapping[str, Shapes], edits: Mapping[str, Edits]) -> None:
        """Check the files and load what of `wanted` is not there with these `edits`, together."""
        missing = [part for part in wanted if not self._serves(part, wanted[part], edits.get(part, NONE))]
        if not missing:
            return
        for part in missing:
            if part in self._loaded:
                self._loaded.pop(part)[1].close()
        variants = {placement.variant for placement in self.plan.parts.values()}
        with ThreadPoolExecutor(len(wanted) + len(variants)) as pool:
            checked = [pool.submit(self.bundle.check, variant) for variant in variants]
            self._edits |= {part: edits.get(part, NONE) for part in missing}
            loading = {part: pool.submit(self._load, part, wanted[part]) for part in missing}
            # The check names a damaged file before a backend fails on it.
            for check in checked:
                self.changed += check.result()
            for part, loaded in loading.items():
                self._loaded[part] = (wanted[part], loaded.result())

    def _serves(self, part: str, shapes: Shapes, edits: Edits) -> bool:
        """Whether the loaded `part` has these edits, after changing it in place if it can be."""
        loaded, component = self._loaded.get(part, (None, None))
        if component is None or loaded != shapes:
            return False
        if self._edits[part] != edits:
            if not (isinstance(component, Changeable) and component.change(edits)):
                return False
            self._edits[part] = edits
        return True

    def _load(self, part: str, shapes: Shapes) -> Component:
        return self.load(part, shapes) if self.turns is None else Turn(self.turns, lambda: self.load(part, shapes))

    def load(self, part: str, shapes: Shapes) -> Component:
        """Load `part` on its planned device, or on the next fallback, with the edits of the last `prepare`.

        The caller owns the result; `prepare` keeps its own. Raises DeviceError, or the error of the last fallback.
        """
        planned = home_of(part)

        def load() -> Component:
            while True:
                placement = self.plan.parts[planned]
                variant = self.bundle.variant(placement.variant)
                try:
                    if part not in variant.artifacts:
                        # A variant may be older than a part of the model.
                        raise DeviceError(f"{placement.variant} has no {part}")
                    edits = self._edits[part]
                    return self.backend.load(LoadRequest(self.bundle, variant, part, placement.device, shapes, edits))
                except (*FAILURES, InvalidRequest) as error:
                    # InvalidRequest: a package of fixed size can't draw this one; another variant may.
                    if not move(reason(error), isinstance(error, NumericalError)):
                        if isinstance(error, MemoryError):
                            raise DeviceError(f"{part}: out of memory") from error
                        raise

        def move(why: str, numerical: bool) -> bool:
            with self._planning:
                plan = self.plan.fall_back(planned, why, numerical)
                if plan is not None:
                    self.changed += self.bundle.check(plan.parts[planned].variant)
                    self.plan = plan
            return plan is not None

        return Guarded(part.replace("_", " "), load(), move, load)

    def having(self, part: str, component: Component) -> Components:
        """These with `component` in place of a part of their own; the others are the same."""
        others = copy.copy(self)
        others._loaded = {**self._loaded, part: (self.shapes(part), component)}
        return others

    def reject(self, part: str, why: str) -> bool:
        """Load a part at its next place, since its outputs made no picture; False where there is none."""
        component = self[part]
        return isinstance(component, (Guarded, Turn)) and component.reject(why)

    def rest(self) -> None:
        """Give back the memory that components computed with; they stay loaded."""
        for _, component in self._loaded.values():
            if isinstance(component, Resting):
                component.rest()

    def close(self) -> None:
        """Give back the memory of all."""
        for _, component in self._loaded.values():
            component.close()
        self._loaded.clear()
