"""A sweep: every precision of a form that fits the wish, converted into the report's own bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.converters.build import build, require_extra, variant_name
from edge_sd.converters.form import Form
from edge_sd.converters.recipes import METHODS, RECIPES, QuantRecipe
from edge_sd.converters.targets import form_named
from edge_sd.errors import ConversionError, InvalidRequest, choices

from ..libraries import hush_libraries

KINDS = ("float", "weights", "palette", "w8a8", "hybrid", *METHODS)
# What looks at activations takes far longer than rounding weights, so the others are tried only when named.
DEFAULT = ("float", "weights", "palette")


def methods_of(recipe: QuantRecipe) -> set[str]:
    """Names that `--method` has for a recipe: float (not quantized), weights or w8, w4 (integers of that many bits with
    scales), palette (a table), w8a8 (activations too), hybrid (activations of convolutions), or of METHODS."""
    if recipe.method:
        return {recipe.method}
    if recipe.activations:
        return {"hybrid" if recipe.hybrid else "w8a8"}
    if recipe.palette:
        return {"palette"}
    return {"weights", f"w{recipe.bits}"} if recipe.bits < 16 else {"float"}


@dataclass(frozen=True)
class Sweep:
    """A form and the recipes to try with it, the most exact first."""

    form: Form
    recipes: tuple[QuantRecipe, ...]

    @classmethod
    def parse(
        cls, to: str, bits: str | None, group_size: str | None, method: str | None, compute: str | None = None
    ) -> Sweep:
        """Lists such as "8,4"; None is no limit, and a group size limits only recipes that have groups.

        Without `method`, those of DEFAULT.

        Raises InvalidRequest for what no recipe of the form is.
        """
        form = form_named(to, compute=compute)
        offered = [RECIPES[name] for name in form.recipes]
        wanted_bits = _numbers("bits", bits, {recipe.bits for recipe in offered})
        wanted_groups = _numbers("group size", group_size, {r.group_size for r in offered if r.group_size})
        methods = {each.strip() for each in method.split(",")} if method else {*DEFAULT}
        valid = set().union(*(methods_of(recipe) for recipe in offered))
        if method and (unknown := methods - valid):
            names = sorted(valid, key=lambda name: (name not in KINDS, name))
            raise InvalidRequest(f"no method {min(unknown)!r} for {to}; valid: {', '.join(names)}")
        chosen = [
            recipe
            for recipe in offered
            if recipe.bits in wanted_bits
            and methods_of(recipe) & methods
            and (recipe.group_size is None or recipe.group_size in wanted_groups)
        ]
        if not chosen:
            raise InvalidRequest(f"no precision of {form.name} is all of that; it has: {choices(form.recipes)}")
        return cls(form, tuple(sorted(chosen, key=lambda recipe: -recipe.bits)))


def _numbers(what: str, text: str | None, valid: set[int]) -> set[int]:
    if text is None:
        return valid
    try:
        numbers = {int(each) for each in text.split(",")}
    except ValueError:
        raise InvalidRequest(f"the {what} {text!r} are not whole numbers with commas between, such as 8,4") from None
    if unknown := numbers - valid:
        names = ", ".join(str(number) for number in sorted(valid)) or "none"
        raise InvalidRequest(f"no {what} of {min(unknown)} here; valid: {names}")
    return numbers


def make(
    source: str, folder: Path, sweep: Sweep, report: Callable[[str, float], None]
) -> tuple[ModelBundle, dict[str, str]]:
    """Convert into `folder`/bundle; what is there already is kept. Returns the bundle, and why variants failed.

    Raises MissingExtra, InvalidModel, or ConversionError where not one succeeded.
    """
    require_extra()
    hush_libraries()
    folder.mkdir(exist_ok=True)
    made = None
    failed: dict[str, str] = {}
    for recipe in sweep.recipes:
        try:
            made = build(source, folder / "bundle", sweep.form, recipe, report)
        except ConversionError as error:
            failed[variant_name(sweep.form, recipe)] = str(error)
    if made is None:
        raise ConversionError(next(iter(failed.values())))
    return ModelBundle.open(folder / "bundle"), failed
