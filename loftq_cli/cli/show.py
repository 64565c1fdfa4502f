"""What the commands that write something show when they are done."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.cli import console
from loftq_cli.errors import printable


def outcome(manifest: Mapping[str, Any], output: str, *, again: bool, as_json: bool) -> None:
    """The summary at the end of a conversion, and what to type next. ``again``: it was there."""
    from loftq_cli.layouts.needs import needs

    if as_json:
        console.json_object(manifest)
        return
    totals, environment = manifest["totals"], manifest["environment"]
    plain, final = totals["relative_residual_quantized"], totals["relative_residual"]
    console.pairs(
        f"{output}, as it was" if again else f"wrote {output}",
        [
            ("matrices", f"{len(manifest['matrices'])}, {kinds(manifest['matrices'])}"),
            ("layout", manifest["matrices"][0]["layout"]),
            ("backbone", shrinking(totals)),
            ("adapter", console.size(totals["adapter_bytes"])),
            ("bits per weight", f"{totals['bits_per_weight']:.3f}"),
            ("residual", f"{final:.4f} with the adapter, {plain:.4f} without (of the weights)"),
            ("time", f"{environment['seconds']:.1f} s on {environment['device']}"),
            ("peak memory", console.size(environment["peak_host_bytes"])),
            ("needs", needs_line(needs(manifest["recipe"]["layout"]))),
        ],
    )
    console.line(f"next: loftq inspect {printable(shlex.quote(output))}")


def part(result: Mapping[str, Any], output: str, *, as_json: bool) -> None:
    """What one part of a conversion came to."""
    if as_json:
        console.json_object(result)
        return
    named = f"part {result['part']} of {result['parts']}"
    if result["published"]:
        console.line(f"{named}: nothing to do, {printable(shlex.quote(output))} is complete")
        return
    how = "was finished before" if result["nothing_to_do"] else "is finished"
    console.line(f"{named}, {result['matrices']} matrices, {how}")
    console.line("next: the other parts, then the same command without --part")


def merge(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq merge``, and how to load the result."""
    if as_json:
        console.json_object(result)
        return
    pairs = [
        ("matrices", f"{result['matrices']}, {result['dtype'] or 'of several dtypes'}"),
        ("adapter", result["adapter"]),
        ("whole tensors", f"{len(result['replaced'])} replaced, {len(result['added'])} added"),
        ("size", console.size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s"),
    ]
    console.pairs(f"wrote {result['output']}", pairs)
    loading(result["loading"])


def exported(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq export``."""
    if as_json:
        console.json_object(result)
        return
    merged = result["merged"]
    how = "quantized again" if merged else f"exactly as in {', '.join(result['from'])}"
    pairs = [
        ("matrices", f"{result['matrices']}, {how}"),
        ("layout", result["layout"]),
        ("size", console.size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s"),
    ]
    if result["adapter"] is not None:
        pairs.insert(2, ("trained adapter", result["adapter"]))
    if merged:
        pairs[2:2] = _distances(merged)
    console.pairs(f"wrote {result['output']}", pairs)


def exported_gguf(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq export --layout gguf``, and what to type next."""
    if as_json:
        console.json_object(result)
        return
    types = ", ".join(f"{count} in {name}" for name, count in result["types"].items())
    pairs = [
        ("matrices", types),
        ("model", result["model"]),
        ("size", console.size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s"),
    ]
    if result["adapter"] is not None:
        pairs.insert(2, ("adapter", result["adapter"]))
    console.pairs(f"wrote {result['output']}", pairs)
    lora = "" if result["adapter"] is None else f" --lora {result['adapter']}"
    console.line(f"next: llama-server -m {result['model']}{lora}")


def exported_mlx(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq export --layout mlx``, and what to type next."""
    if as_json:
        console.json_object(result)
        return
    rounded = result["rounded"]
    how = f"values off by {rounded['off']:.3%} of the weights" if rounded else "exactly"
    pairs = [
        ("matrices", f"{result['matrices']}, {how}"),
        ("size", console.size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s"),
    ]
    if result["adapter"] is not None:
        pairs.insert(1, ("adapter", f"{result['adapter']}, of rank {result['rank']}"))
    console.pairs(f"wrote {result['output']}", pairs)
    words = ["mlx_lm.lora", "--train", "--data", "DATA", "--model", result["output"]]
    if (folder := result["adapter"]) is not None:
        words += ["-c", f"{folder}/adapter_config.json"]
        words += ["--resume-adapter-file", f"{folder}/adapters.safetensors"]
    console.line(f"next: {printable(shlex.join(words))}")


def imported(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq import-adapter``, and what to type next."""
    if as_json:
        console.json_object(result)
        return
    pairs = [
        ("pairs", f"{result['matrices']}, of rank {result['rank']}"),
        ("scale", f"{result['scale']:g}"),
    ]
    console.pairs(f"wrote {result['output']}", pairs)
    output, directory = (shlex.quote(result[key]) for key in ("output", "directory"))
    told = f"loftq merge {directory} -o merged --adapter {output}"
    console.line(f"next: {printable(told)}")


def _distances(merged: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far training and rounding went."""
    what = "outputs" if merged["stats"] else "weights"
    plainly = f", {merged['plain']:.2%} without feedback" if merged["stats"] else ""
    found = [("the codes are off", f"{what} by {merged['off']:.2%}{plainly}")]
    if merged["moved"] is not None:
        found.insert(0, ("training moved", f"{what} by {merged['moved']:.2%}"))
    return found


def calibration(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq calibrate``, and what to type next."""
    if as_json:
        console.json_object(result)
        return
    text = f"{result['samples']} windows of {result['length']} tokens, {result['tokens']:,} in all"
    pairs = [
        ("model", result["model"]),
        ("moments", f"{result['moments']}, {result['entries']} distinct inputs"),
        ("matrices", f"{result['matrices']}, {len(result['missing'])} without"),
        *([("sensitivity", f"of {known} matrices")] if (known := result["sensitivities"]) else []),
        ("text", text),
        ("size", console.size(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s on {result['device']} in {result['dtype']}"),
    ]
    console.pairs(f"wrote {result['output']}", pairs)
    model, output = (shlex.quote(result[key]) for key in ("model", "output"))
    console.line(f"next: loftq convert {printable(model)} --stats {printable(output)}")


def evaluation(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq evaluate``."""
    if as_json:
        console.json_object(result)
        return
    windows = f"{result['samples']} windows of {result['length']} tokens"
    told = [
        ("perplexity", "perplexity", "{:.4g}"),
        ("of the original", "source_perplexity", "{:.4g}"),
        ("KL divergence", "kl", "{:.4f} nats a token"),
        ("same likeliest token", "top1", "{:.1%}"),
        ("cosine of hidden states", "cosine", "{:.4f}"),
        ("their relative error", "relative_error", "{:.2%}"),
    ]
    pairs = [
        (title, form.format(result[key])) for title, key, form in told if result[key] is not None
    ]
    pairs += [
        ("text", f"{windows}, {result['tokens']:,} counted"),
        ("time", f"{result['seconds']:.1f} s on {result['device']}"),
    ]
    console.pairs(str(result["directory"]), pairs)


def refinement(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq refine``, or its plan."""
    if as_json:
        console.json_object(result)
        return
    pairs = [("matrices", str(result["matrices"])), ("layout", result["layout"])]
    if "disk_bytes" in result:
        pairs.append(("disk", f"{console.size(result['disk_bytes'])} at most"))
        console.pairs(f"would write {result['output']}", pairs)
        console.line("nothing was written (dry run)")
        return
    windows = f"{result['samples']} windows of {result['length']} tokens"
    pairs.append(("text", f"{windows}, {result['tokens']:,} in all"))
    blocks = result["blocks"]
    if blocks:
        better = sum(block["kept"] > 0 for block in blocks)
        pairs.append(("blocks", f"{better} of {len(blocks)} better on text held out"))
    end = result["end_to_end"]
    if end is not None:
        losses = f"{end['held_before']:.4f} -> {end['held_after']:.4f} on text held out"
        pairs.append(("end to end", f"{losses}, after {end['kept']} of {end['steps']} steps"))
    pairs += [
        ("residual", f"{result['relative_residual']:.4f} of the weights, expected to rise"),
        ("time", f"{result['seconds']:.1f} s on {result['device']}"),
    ]
    console.pairs(f"wrote {result['output']}", pairs)


def push(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The summary at the end of ``loftq push``."""
    if as_json:
        console.json_object(result)
        return
    pairs = [
        ("repository", f"{result['repo_id']}, {'private' if result['private'] else 'public'}"),
        ("revision", f"{result['revision']} at {result['commit']}"),
        ("files", f"{result['files']}, {console.size(result['bytes'])}"),
    ]
    console.pairs(f"sent to {result['url']}", pairs)


def needs_line(needs: Mapping[str, Any]) -> str:
    """What the output needs if it is loaded and trained."""
    text = f"{', '.join(needs['imports'])}: {needs['install']}"
    missing = needs["missing"]
    return f"{text} ({', '.join(missing)} not installed here)" if missing else text


def loading(snippet: str) -> None:
    """How to load an output."""
    console.line("load it with:\n")
    console.line("\n".join(f"    {line}".rstrip() for line in snippet.splitlines()))


def kinds(matrices: Sequence[Mapping[str, Any]]) -> str:
    """Widths and methods of ``matrices``, with their counts if there are several."""
    counts = Counter(
        (matrix["bits"], matrix["method"]) for matrix in matrices if matrix["bits"] is not None
    )
    named = [(f"{bits}-bit {method}", count) for (bits, method), count in sorted(counts.items())]
    unsettled = len(matrices) - counts.total()
    if unsettled:
        named.append(("widths that a pass over the weights will settle", unsettled))
    if len(named) == 1 and not unsettled:
        return named[0][0]
    return ", ".join(f"{count} in {kind}" for kind, count in named)


def shrinking(totals: Mapping[str, Any]) -> str:
    """The size of the source, and that of the backbone."""
    return f"{console.size(totals['source_bytes'])} -> {console.size(totals['backbone_bytes'])}"
