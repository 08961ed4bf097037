"""Formatting of numbers for readers: 1,234; 12.3 %; 1.2 MB; 3.4 hours."""

from __future__ import annotations

MAX_CHARACTERS = 300


def number_text(value: float) -> str:
    """Formats integers in full, other numbers with four significant digits."""
    if isinstance(value, int) or 999.95 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent_text(part: float, whole: float) -> str:
    """Formats a fraction in percent; "0 %" and "100 %" are used only for exact values."""
    if not whole:
        return "0 %"
    text = f"{100 * (part / whole):.1f}"
    if text == "0.0" and part > 0:
        return "< 0.1 %"
    if text == "100.0" and part < whole:
        return "> 99.9 %"
    return f"{text.removesuffix('.0')} %"


def bytes_text(num_bytes: float) -> str:
    """Formats a size in bytes, kB, MB, GB or TB (powers of 1000)."""
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB"]
    for unit in units:
        if float(f"{size:.3g}") < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def duration_text(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    for unit, length in (("seconds", 1), ("minutes", 60)):
        if float(f"{seconds / length:.3g}") < 120:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 3600:,.1f} hours"


def value_text(value: object, unit: str = "") -> str:
    """Formats a value of any type, with its unit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shortened(str(value))
    if unit == "bytes":
        return bytes_text(value)
    return f"{number_text(value)} {unit}".strip()


def shortened(text: str) -> str:
    """Returns a text, truncated to MAX_CHARACTERS."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."


def counted(num: int, noun: str) -> str:
    """Formats a count with its noun: "1 sample", "2 samples"."""
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"
