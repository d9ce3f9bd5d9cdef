"""The rules that weight the tasks, by name, and the text that names a rule with its options."""

from __future__ import annotations

import ast
from dataclasses import fields

from minbert.errors import UserError, did_you_mean
from minbert.methods.gram_weightings import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    GradVac,
    NashMTL,
    RandomWeights,
    UPGrad,
)
from minbert.methods.loss_weightings import DWA, FAMO, GeometricMean, GradNorm, Uncertainty
from minbert.methods.weighting_base import Weighting, random_orders

__all__ = ["WEIGHTINGS", "Weighting", "random_orders", "weighting_from"]

WEIGHTINGS: dict[str, type[Weighting]] = {
    each.rule: each
    for each in (
        UPGrad,
        DualProj,
        MGDA,
        CAGrad,
        IMTLG,
        AlignedMTL,
        NashMTL,
        ConFIG,
        GradVac,
        FairGrad,
        RandomWeights,
        Constant,
        FAMO,
        Uncertainty,
        DWA,
        GradNorm,
        GeometricMean,
    )
}


def weighting_from(text: str) -> Weighting:
    """The rule that a text names, such as "cagrad" or "cagrad(c=0.4)": `str` of a rule is such a text.

    Raises:
        UserError: an unknown name or option, another form, or an option with a value that it cannot have.
    """
    name, parenthesis, rest = text.strip().partition("(")
    name = name.strip()
    if name not in WEIGHTINGS:
        known = ", ".join(WEIGHTINGS)
        raise UserError(
            f"--surgery {text[:100]}: unknown{did_you_mean(name, list(WEIGHTINGS))}; expected one of {known}"
        )
    rule = WEIGHTINGS[name]
    options = [field.name for field in fields(rule)]
    try:
        call = ast.parse(f"rule({rest}" if parenthesis else "rule()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not NAME(OPTION=VALUE)")
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        example = f"{name}({options[0]}=...)" if options else name
        raise UserError(f"--surgery {text[:100]}: expected {example}") from None
    for option in given:
        if option not in options:
            known = f"; expected {', '.join(options)}" if options else "; it has none"
            raise UserError(
                f"--surgery {text[:100]}: {name} has no option {option}{did_you_mean(option, options)}{known}"
            )
    return rule(**given)
