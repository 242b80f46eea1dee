# SPDX-License-Identifier: Apache-2.0
"""Units after numbers: synonyms, conversions, and words that are not units."""

import re
from fractions import Fraction


_UNITS: dict[str, dict[str, int | str | Fraction]] = {
    "length": {
        "m meter metre": 1, "km kilometer kilometre": 1000, "cm centimeter centimetre": "0.01",
        "mm millimeter millimetre": "0.001",
        "µm μm um micrometer micrometre micron": "1e-6", "nm nanometer nanometre": "1e-9",
        "inch inches in.": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144", "mi mile": "1609.344",
    },
    "mass": {"g gram gramme": 1, "kg kilogram kilo kilogramme": 1000, "mg milligram": "0.001", "t tonne": 10**6,
             "lb lbs pound": "453.59237", "oz ounce": "28.349523125"},
    "time": {"s sec second": 1, "ms millisecond": "0.001", "min minute": 60, "h hr hour": 3600, "day": 86400,
             "week wk": 604800, "month mo": 2629800,
             "yr year": 31557600},
    "volume": {"l liter litre": 1, "ml milliliter millilitre cc": "0.001", "cl centiliter": "0.01",
               "gallon gal": "3.785411784", "quart qt": "0.946352946", "pint pt": "0.473176473",
               "cup": "0.2365882365", "tablespoon tbsp": "0.01478676478125", "teaspoon tsp": "0.00492892159375"},
    "dollar": {"$ usd us$ dollar buck": 1, "cent ¢": "0.01"},
    "euro": {"€ eur euro": 1},
    "sterling": {"£ gbp quid": 1},
    "yen": {"¥ jpy yen": 1},
    "rupee": {"₹ inr rupee": 1},
    "percent": {"% percent pct": 1},
    "angle": {"° degree deg": 1, "rad radian": "57.29577951308232"},
    "celsius": {"°c celsius centigrade": 1},
    "fahrenheit": {"°f fahrenheit": 1},
    "kelvin": {"kelvin": 1},
    "speed": {"m/s mps": 1, "km/h kph kmh kmph": Fraction(10, 36), "mph": "0.44704"},
    "energy": {"j joule": 1, "kj kilojoule": 1000, "cal calorie": "4.184", "kcal": 4184, "ev": "1.602176634e-19"},
    "force": {"n newton": 1},
    "power": {"w watt": 1, "kw kilowatt": 1000},
    "frequency": {"hz hertz": 1, "khz kilohertz": 1000, "mhz megahertz": 10**6},
    "memory": {"byte": 1, "kb kilobyte": 1000, "mb megabyte": 10**6, "gb gigabyte": 10**9, "bit": Fraction(1, 8)},
    "era": {"ad ce": 1}, "earlier": {"bc bce": 1},
    "voltage": {"v volt": 1}, "current": {"ampere amp": 1}, "resistance": {"ω ohm": 1}, "pressure": {"pa pascal": 1, "kpa kilopascal": 1000},
    "amount": {"mole mol": 1},
}  # fmt: skip
# Name -> dimension, and its factor to the dimension's first unit.
_TABLE = {
    name: (dimension, Fraction(factor))
    for dimension, units in _UNITS.items()
    for names, factor in units.items()
    for name in names.split()
}
# Case-sensitive: the meaning of these letters depends on it.
_CASED = {"M", "K", "G", "T", "MS", "S"}
_PLURALS = {"ies": "y", "sses": "ss", "xes": "x", "ches": "ch", "shes": "sh", "s": ""}
# Words after a number that are not units, and end one.
STOP_WORDS = frozenset(
    "a an and are as at because but by each every for from had has have he her his i if in is it its left more most "
    "my not of on or our per remaining respectively she since so still than that the their there therefore they this "
    "times to total was we were when where which while who will with you your apiece altogether only too now then can "
    "cannot could may might must should would isn't "
    "after before old long tall high wide away".split()
)


def canonical_unit(text: str) -> tuple[str, Fraction] | None:
    """
    Dimension of a known unit, and its factor to the dimension's first unit: for "square cm",
    `("length^2", Fraction(1, 10000))`.
    """
    text = " ".join(text.split()).strip(" .,;:!?\"'()*")
    if not text or text in _CASED:
        return None
    lower = text.casefold().replace("per cent", "percent").replace("us dollars", "usd")
    lower = re.sub(r"^(?:degrees?|°)\s*(c|f)(?:elsius|ahrenheit)?$", r"°\1", lower)
    lower = re.sub(r"\s*(?:/|\bper\b)\s*", "/", lower)
    if "/" in lower and lower not in _TABLE:
        above, below = lower.split("/", 1)
        a, b = canonical_unit(above), canonical_unit(below)
        if a is None or b is None:
            return None
        return ("speed", a[1] / b[1]) if (a[0], b[0]) == ("length", "time") else (f"{a[0]}/{b[0]}", a[1] / b[1])
    power = 1
    if match := re.match(r"(?:(sq)|cu)(?:uare|bic|\.|(?=ft))? ?(\w+)$", lower):  # square, cubic
        lower, power = match[2], 2 if match[1] else 3
    elif match := re.match(r"(.*?)\s*(?:\^\{?(-?\d)\}?|\b(?:(squared)|cubed))$", lower):
        lower, power = match[1], int(match[2] or (2 if match[3] else 3))
    found = _TABLE.get(lower) or (_TABLE.get(lower[:-1]) if lower.endswith("s") and len(lower) > 2 else None)
    if found is None:
        return None
    return found if power == 1 else (f"{found[0]}^{power}", found[1] ** power)


def singular(word: str) -> str:
    """Singular of a word, accurate enough to compare two."""
    word = word.casefold().strip(".,;:!?\"'()*")
    for ending, alone in _PLURALS.items():
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            return word[: -len(ending)] + alone
    return word
