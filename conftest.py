"""Settings that must hold for the notebooks too, which pytest runs from this folder, and the comparison of what they
print."""

import os
import re
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

# Tests compare what the notebooks print with what they have stored, and that comes from the stand-in.
if not os.environ.get("RERANKER_MODEL"):
    os.environ["RERANKER_MODEL"] = str(ROOT / "tests" / "stand_in_model")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes that each want all cores wait for each other in busy loops, and are ten times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

DECIMAL = re.compile(r"( *[-+]?(?<![\d.])\d[\d,]*\.\d+(?:e[-+]\d+)?(?!\.?\d))")
"""A number with a decimal point, and the spaces that align it."""


def pytest_configure(config):
    if config.pluginmanager.hasplugin("nbval"):
        from nbval.plugin import IPyNbCell

        strict = IPyNbCell.compare_outputs
        IPyNbCell.compare_outputs = lambda cell, new, stored, skip=None: strict(
            cell, _settled(_with_alt(new), _with_alt(stored)), _with_alt(stored), skip
        )


@pytest.fixture
def settled():
    """The comparison, for what other tests print: `settled(new, stored) == stored`."""
    return _settled


def _with_alt(outputs: list) -> list:
    """Move the alternative text of plots to where nbval compares it."""
    alts = [output.get("metadata", {}).get("image/png", {}).get("alt") for output in outputs]
    return [
        output if alt is None else type(output)(output, data=output["data"] | {"alt": alt})
        for output, alt in zip(outputs, alts, strict=True)
    ]


def _settled(new, stored):
    """Return `new` with each decimal that differs from the stored one by at most one unit of its last digit replaced by
    that one: processors round differently. All else stays, for nbval to compare: words, whole numbers, order."""
    if isinstance(new, str) and isinstance(stored, str):
        pieces, olds = DECIMAL.split(new), DECIMAL.split(stored)
        if len(pieces) == len(olds):
            pieces[1::2] = [
                old if _is_near(piece, old) else piece for piece, old in zip(pieces[1::2], olds[1::2], strict=True)
            ]
        return "".join(pieces)
    if isinstance(new, list) and isinstance(stored, list):
        return [*map(_settled, new, stored), *new[len(stored) :]]
    if isinstance(new, dict) and isinstance(stored, dict):
        return type(new)({name: _settled(value, stored.get(name)) for name, value in new.items()})
    return new


def _is_near(new: str, stored: str) -> bool:
    """Whether two decimals of one format differ by at most one unit of the last digit."""
    texts = [new.strip(), stored.strip()]
    numbers = [Decimal(text.replace(",", "")) for text in texts]
    units = [number.as_tuple().exponent for number in numbers]
    same_digits = units[0] == units[1] or all("e" in text for text in texts)
    same_signs = {text[0] if text[0] in "+-" else "" for text in texts} != {"+", ""}
    aligned = len(new) == len(stored) or len(new) - len(texts[0]) == len(stored) - len(texts[1])
    near = abs(numbers[0] - numbers[1]) <= Decimal(1).scaleb(max(units))
    return same_digits and same_signs and aligned and near
