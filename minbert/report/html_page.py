"""Pages: templates, in which every text is escaped, made into one file that needs nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minbert.files.atomic import write_atomically, writing
from minbert.report.error_analysis import shown

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, **content: object) -> Path:
    """Fill a template of templates/ and write it to `path`.

    Raises:
        UserError: the disk is full.
    """
    page = _environment().get_template(template).render(**content)
    with writing(path, "free some space and run minbert report"):
        write_atomically(path, page)
    return path


@functools.cache
def _environment() -> Environment:
    """Templates with the style and the script in them; the policy lets a browser run that script and load nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    formats = (metric, score, signed, percent, duration, count, option)
    environment.filters |= {function.__name__: function for function in formats} | {"one_line": shown}
    return environment


# How numbers are written -------------------------------------------------------------------------------------------


METRIC_NAMES = {
    "f1": "F1",
    "f1_micro": "F1 micro",
    "f1_macro": "F1 macro",
    "mcc": "MCC",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "mse": "MSE",
    "mae": "MAE",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}


def metric(name: str) -> str:
    """A metric's name in a text."""
    return METRIC_NAMES.get(name, name)


def score(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def signed(value: float | None, decimals: int = 3) -> str:
    """Decimals and a sign: +0.012, −0.100, ±0.000; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:+.{decimals}f}"
    return f"±{text[1:]}" if float(text) == 0 else text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share: 12%, 0.3%, 2e-05; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.0%}" if value >= 0.095 or value == 0 else f"{value:.1%}" if value >= 0.00095 else f"{value:.0e}"


def duration(seconds: float) -> str:
    """4.1 ms, 2.3 s, 5 min 20 s or 3 h 12 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float) -> str:
    """A whole number in groups of three digits: 12 345 678."""
    return f"{round(number):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def option(value: object) -> str:
    """An option's value as it stands on a command line."""
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
