"""A record's case as text: one implementation a line."""

TWO_PASS = ("flash_compiled", "cudnn_compiled")


def fastest(case: dict, labels: tuple[str, ...]) -> str | None:
    """Which of these implementations has the shortest median; None if none was timed."""
    results = case["results"]
    timed = [label for label in labels if label in results]
    return min(timed, key=lambda label: results[label]["median_ms"], default=None)


def table(case: dict) -> str:
    """Times, ratios and peak memory of a case, and what failed; errors where it has no times.

    ± is half the distance between the 10th and 90th percentiles. The ratio says how many times
    as fast as the strongest two-pass pipeline an implementation is: below 1, it is slower.
    """
    sizes = " ".join(f"{k}={v}" for k, v in case.items() if _is_size(k, v))
    lines = [f"{case['name']}: {sizes}"]
    rows = _time_rows(case) if case["results"] else _error_rows(case)
    width = max((len(row[0]) for row in rows), default=0)
    used = [i for i in range(1, len(rows[0])) if any(row[i] for row in rows[1:])]
    for row in rows:
        lines.append(f"  {row[0]:{width}}" + "".join(f"{row[i]:>13}" for i in used))
    for label, why in case.get("failed", {}).items():
        lines.append(f"  {label:{width}}  not timed: {why}")
    return "\n".join(lines)


def spread_ms(result: dict) -> float:
    """Half the distance between the 10th and 90th percentiles."""
    return (result["p90_ms"] - result["p10_ms"]) / 2


def _is_size(key: str, value) -> bool:
    return isinstance(value, int) and key not in ("seed", "flop") or key == "dtype"


def _time_rows(case: dict) -> list[list[str]]:
    best = fastest(case, TWO_PASS)
    rows = [["", "median ms", "± ms", "× two-pass", "TFLOP/s", "peak MB"]]
    for label, result in case["results"].items():
        ms = result["median_ms"]
        ratio = case["results"][best]["median_ms"] / ms if best else None
        rate = case["flop"] / ms / 1e9 if "flop" in case else None
        peak = case.get("peak_bytes", {}).get(label)
        rows.append([
            label,
            f"{ms:.4f}",
            f"{spread_ms(result):.4f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if rate is None else f"{rate:.0f}",
            "" if peak is None else f"{peak / 1e6:.1f}",
        ])  # fmt: skip
    return rows


def _error_rows(case: dict) -> list[list[str]]:
    measures = ("cosine", "relative_l1", "relative_l2")
    rows = [["", *measures]]
    for label, errors in case.get("errors", {}).items():
        cells = (f"{errors[m]:.6f}" if m in errors else "" for m in measures)
        rows.append([label, *cells])
    return rows
