"""The export's report as a table for people; 80 columns."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """Size, parity, quality and speed of an exported file, one line each."""
    parity, quality, speed = report["parity"], report["quality"], report["speed"]
    lines = [f"{report['file']}: {report['bytes'] / 1e6:.2f} MB, {report['precision']}, one file"]
    lines.append(
        f"parity   largest logit error {parity['max_abs_error']:.1e} against PyTorch, "
        f"{parity['greedy_match_tokens']} greedy tokens equal"
    )
    if report["precision"] == "fp32":
        lines.append(f"quality  {quality['bits_per_byte']:.4f} bits per byte on held-out text")
        lines.append(
            f"speed    {speed['decode_tokens_per_second']:.0f} tokens/s here, prompts at "
            f"{speed['prefill_tokens_per_second']:.0f}"
        )
        return "\n".join(lines)
    lines.append(
        f"quality  {quality['bits_per_byte']:.4f} bits per byte held out, fp32 "
        f"{quality['fp32_bits_per_byte']:.4f}: loss {quality['loss_increase_percent']:+.3f} %"
    )
    lines.append(
        f"         top-1 agreement {100 * quality['top1_agreement']:.1f} %, "
        f"KL divergence {quality['kl_divergence']:.1e} nats"
    )
    slower = []
    for label, what, key in (
        ("speed", "tokens/s here", "decode_tokens_per_second"),
        ("", "tokens/s of a prompt", "prefill_tokens_per_second"),
    ):
        here, fp32 = speed[key], speed[f"fp32_{key}"]
        lines.append(f"{label:8} {here:.0f} {what}, fp32 {fp32:.0f}: {here / fp32:.1f} x")
        if here < fp32:
            slower.append("decoding" if label else "prompts")
    if slower:
        lines.append(
            f"note     not faster than fp32 here: {' and '.join(slower)}; the file is smaller"
        )
    return "\n".join(lines)
