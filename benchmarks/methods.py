"""How fast the post-training methods are and what they leave of a layer's error, beside peers in one process.

Three tables, written to ``methods.json`` and ``methods.md``:

1. GPTQ of a 4096 x 4096 Linear, from calibration inputs to codes: ``quantize_``, the algorithm of the paper
   in NumPy and LAPACK (below), and GPTQModel's own ``GPTQ`` class where it is installed. All take blocks of
   128 columns. They take turns, and the ratios are those of the medians. CPU seconds are the processor's, which
   other work on the machine changes little.
2. HQQ of the same layer beside the ``hqq`` package, where it is installed.
3. Every method: seconds on the same layer, and the output error on unseen inputs as a share of that of
   round-to-nearest under the same scheme, there and on a policy-sized network.

    python benchmarks/methods.py [--size 4096] [--repeats 3] [--threads 2] [--tables gptq,hqq,methods]
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlquant.quant import METHODS, InputMoments, Scheme, center_head_, quantize_
from rlquant.quant.compensate import Factor, round_with_compensation
from rlquant.quant.tensor import nearest_qparams, spread_qparams
from rlquant.runs import machine_info, package_versions

Floats = NDArray[np.float32]
BLOCK = 128
DAMPING = 0.01
LIMIT_S, LIMIT_RATIO = 60.0, 2.0


def hidden_inputs(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs as hidden layers see them: few common factors, unequal sizes, means off zero. ``[rows, columns]``."""
    shape = torch.Generator().manual_seed(0)
    factors = torch.randn(max(4, columns // 64), columns, generator=shape) / max(4, columns // 64) ** 0.5
    mean = 0.5 * torch.randn(columns, generator=shape)
    size = torch.exp(0.8 * torch.randn(columns, generator=shape))
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, len(factors), generator=g) @ factors
    return (common + 0.5 * torch.randn(rows, columns, generator=g) + mean) * size


def heavy_tailed(layer: nn.Linear, seed: int = 0) -> nn.Linear:
    """Weights of Student's t distribution with five degrees of freedom, as trained layers have, in place."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, *layer.weight.shape, generator=g)
    with torch.no_grad():
        layer.weight.copy_(normal[0] / normal[1:].square().mean(dim=0).sqrt() / layer.in_features**0.5)
    return layer


def paper_gptq(weight: Floats, inputs: list[Floats], bits: int, group: int | None) -> Floats:
    """Algorithm 1 of Frantar et al. 2022 (arXiv:2210.17323) with LAPACK: the rounded weight ``[rows, columns]``.

    The weight is kept transposed, so that a column is contiguous; NumPy's ``x.T @ x`` is BLAS syrk.
    """
    columns = weight.shape[1]
    hessian = np.zeros((columns, columns), np.float32)
    for x in inputs:
        hessian += x.T @ x
    hessian /= sum(map(len, inputs))
    hessian[np.diag_indices(columns)] += np.float32(DAMPING) * np.diag(hessian).mean()
    lower = scipy.linalg.cholesky(hessian, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = scipy.linalg.lapack.spotri(lower, lower=1, overwrite_c=1)
    lower = scipy.linalg.cholesky(inverse, lower=True, overwrite_a=True, check_finite=False)
    upper = np.ascontiguousarray(lower.T)  # U^T U = H^-1
    left = np.ascontiguousarray(weight.T)
    rounded, errors = np.empty_like(left), np.empty((BLOCK, len(weight)), np.float32)
    limit = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(left).max(axis=0) / limit
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        for j in range(start, stop):
            if group and j % group == 0:
                scale = np.abs(left[j : j + group]).max(axis=0) / limit
            rounded[j] = scale * np.clip(np.rint(left[j] / scale), -limit, limit)
            error = errors[j - start] = (left[j] - rounded[j]) / upper[j, j]
            left[j + 1 : stop] -= np.outer(upper[j, j + 1 : stop], error)
        left[stop:] -= upper[start:stop, stop:].T @ errors[: stop - start]
    return np.ascontiguousarray(rounded.T)


def core_rounded(layer: nn.Linear, batches: list[Tensor], scheme: str) -> Tensor:
    """The paper's steps alone, by rlquant's parts: no forward pass, act-order, scale search or bias."""
    parsed = Scheme.parse(scheme)
    moments = InputMoments(gram=True)
    for batch in batches:
        moments.add(batch[None])
    factor = Factor(moments.gram[0], DAMPING, "", act_order=False)
    weight = layer.weight.detach()
    spread = spread_qparams(nearest_qparams(weight, parsed), parsed, weight.shape[1])  # type: ignore[arg-type]
    return round_with_compensation(weight, spread, parsed.stored, factor)[0]


def gptqmodel_rounded(layer: nn.Linear, batches: list[Tensor], bits: int, group: int | None) -> Tensor:
    """The same by GPTQModel, without its act-order, as the paper."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(
        bits=bits,
        group_size=group or -1,
        sym=True,
        desc_act=False,
        act_group_aware=False,
        damp_percent=DAMPING,
    )
    peer = GPTQ(copy.deepcopy(layer), config)
    peer.quantizer.configure(perchannel=True)
    with torch.no_grad():
        for batch in batches:
            peer.add_batch(batch, layer(batch))
        return peer.quantize(blocksize=BLOCK)[0]


def hqq_rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """The dequantized weight of the ``hqq`` package with its defaults, on the CPU."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, axis=1, device="cpu")
    return Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})


def output_error(weight: Tensor, layer: nn.Linear, unseen: Tensor, bias: Tensor | None = None) -> float:
    """Mean squared difference of the outputs of two weights, and of a bias where it was changed."""
    with torch.no_grad():
        difference = unseen @ (weight - layer.weight).t()
        if bias is not None:
            difference += bias - layer.bias
        return float(difference.double().square().mean())


def timed(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds on the clock and of the processor, and the result."""
    started = time.perf_counter(), time.process_time()
    result = run()
    return (time.perf_counter() - started[0], time.process_time() - started[1]), result


def medians(taken: list[tuple[float, float]]) -> dict[str, float]:
    """Median seconds on the clock and of the processor."""
    clock, processor = (statistics.median(side) for side in zip(*taken, strict=True))
    return {"seconds": round(clock, 2), "cpu_seconds": round(processor, 2)}


def available(package: str) -> str | None:
    """The installed version of a peer."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def quantized(module: nn.Module, scheme: str, method: str, batches: list[Tensor]) -> nn.Module:
    """A quantized copy, quietly: cle has nothing to equalize in a single layer and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return quantize_(copy.deepcopy(module), scheme, method=method, calibration=batches)


def gptq_table(layer: nn.Linear, batches: list[Tensor], unseen: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Rows of table 1."""
    arrays = [batch.numpy() for batch in batches]
    weight = layer.weight.detach().numpy()
    rows = []
    for scheme in ("int4-g128", "int4"):
        group = Scheme.parse(scheme).granularity.group_size
        sides: dict[str, Callable[[], Any]] = {
            "rlquant": lambda scheme=scheme: quantized(layer, scheme, "gptq", batches),
            "rlquant, the paper's steps alone": lambda scheme=scheme: core_rounded(layer, batches, scheme),
            "NumPy + LAPACK": lambda group=group: torch.from_numpy(paper_gptq(weight, arrays, 4, group)),
        }
        if available("gptqmodel"):
            sides["GPTQModel"] = lambda group=group: gptqmodel_rounded(layer, batches, 4, group)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        errors: dict[str, float] = {}
        nearest = output_error(quantized(layer, scheme, "rtn", batches).weight, layer, unseen)  # type: ignore[arg-type]
        for _ in range(repeats):
            for name, run in sides.items():
                elapsed, result = timed(run)
                seconds[name].append(elapsed)
                own = isinstance(result, nn.Module)
                restored, bias = (result.weight, result.bias) if own else (result, None)
                errors[name] = output_error(restored, layer, unseen, bias) / nearest  # type: ignore[arg-type]
        ours = medians(seconds["rlquant"])
        for name, taken in seconds.items():
            theirs = medians(taken)
            ratios = {f"rlquant_{key}_over_this": round(ours[key] / theirs[key], 2) for key in ours}
            row = {"scheme": scheme, "by": name} | theirs | ratios
            rows.append(row | {"error_of_rtn": round(errors[name], 4)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def hqq_table(layer: nn.Linear, batches: list[Tensor], unseen: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Rows of table 2: groups of 64 with a zero point, the package's own layout."""
    weight, rows = layer.weight.detach(), []
    for bits in (4, 3):
        scheme = f"int{bits}-g64-asym"
        sides: dict[str, Callable[[], Tensor]] = {
            "rlquant": lambda scheme=scheme: quantized(layer, scheme, "hqq", batches).weight,  # type: ignore[dict-item, return-value]
        }
        if available("hqq"):
            sides["hqq"] = lambda bits=bits: hqq_rounded(weight, bits, 64)
        nearest: Tensor = quantized(layer, scheme, "rtn", batches).weight  # type: ignore[assignment]
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(repeats):
            results = {}
            for name, run in sides.items():
                elapsed, results[name] = timed(run)
                seconds[name].append(elapsed)
        for name, restored in results.items():
            norms = [float((each - weight).abs().pow(0.7).sum()) for each in (restored, nearest)]
            errors = [output_error(each, layer, unseen) for each in (restored, nearest)]
            row = {"scheme": scheme, "by": name} | medians(seconds[name])
            rows.append(row | {"lp_of_rtn": norms[0] / norms[1], "error_of_rtn": errors[0] / errors[1]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def scheme_for(method: str, bits: int) -> str:
    """Weight-only, but for methods that are about activations."""
    return f"int{bits}" if METHODS[method].can(Scheme.parse(f"int{bits}")) else f"w{bits}a8"


def policy() -> nn.Sequential:
    """An actor of HalfCheetah's size with heavy-tailed weights and a centred head."""
    torch.manual_seed(0)
    pairs = [(17, 256), (256, 256), (256, 6)]
    layers = [heavy_tailed(nn.Linear(*pair), seed) for seed, pair in enumerate(pairs)]
    center_head_(layers[-1])
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def method_table(layer: nn.Linear, batches: list[Tensor], unseen: Tensor, _: int) -> list[dict[str, Any]]:
    """Rows of table 3, each timed once."""
    actor = policy()
    seen, other = hidden_inputs(4096, 17, 1), hidden_inputs(4096, 17, 2)
    cases: dict[str, tuple[nn.Module, list[Tensor], Tensor]] = {
        "layer": (layer, batches, unseen), "policy": (actor, [seen], other),
    }  # fmt: skip
    nearest: dict[tuple[str, str], float] = {}
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method}
        for bits in (4, 3):
            scheme = scheme_for(method, bits)
            for case, (module, data, new) in cases.items():
                if (case, scheme) not in nearest:
                    nearest[case, scheme] = difference(module, quantized(module, scheme, "rtn", data), new)
                elapsed, result = timed(lambda: quantized(module, scheme, method, data))  # noqa: B023
                row[f"{case}_{bits}"] = difference(module, result, new) / nearest[case, scheme]
                row[f"{case}_{bits}_seconds"] = elapsed
            row["schemes"] = [*row.get("schemes", []), scheme]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


TABLES = {"gptq": gptq_table, "hqq": hqq_table, "methods": method_table}


def difference(module: nn.Module, candidate: nn.Module, x: Tensor) -> float:
    """Mean squared difference of the outputs."""
    with torch.no_grad():
        return float((module(x) - candidate(x)).double().square().mean())


def markdown(results: dict[str, Any], command: str) -> str:
    """The three tables."""
    size, threads = results["size"], results["threads"]
    lines = [
        f"GPTQ of a {size} x {size} Linear on {threads} CPU thread(s), {results['rows']} calibration rows, blocks of "
        f"{BLOCK}, from inputs to codes; output error on unseen inputs as a share of round-to-nearest's:",
        "",
        "| scheme | by | seconds | CPU seconds | rlquant / this, clock | CPU | error / RTN |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['scheme']} | {row['by']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} "
        f"| {row['rlquant_seconds_over_this']:.2f} | {row['rlquant_cpu_seconds_over_this']:.2f} "
        f"| {row['error_of_rtn']:.3f} |"
        for row in results["gptq"]
    ]
    lines += [
        "",
        "HQQ, groups of 64 with a zero point (the package's zero points are fractional floats, ours lie on the grid):",
        "",
        "| scheme | by | seconds | CPU seconds | sum of errors^0.7 / RTN | output error / RTN |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['scheme']} | {row['by']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['lp_of_rtn']:.3f} "
        f"| {row['error_of_rtn']:.3f} |"
        for row in results["hqq"]
    ]
    lines += [
        "",
        f"Every method by itself: CPU seconds on the {size} x {size} Linear, and output error on unseen inputs as a "
        "share of round-to-nearest's under the same scheme, on that layer and on a 17-256-256-6 ReLU network:",
        "",
        "| method | schemes | CPU seconds | layer, 4 bit | layer, 3 bit | network, 4 bit | network, 3 bit |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {', '.join(row['schemes'])} | {row['layer_4_seconds'][1]:.1f} | {row['layer_4']:.3f} "
        f"| {row['layer_3']:.3f} | {row['policy_4']:.3f} | {row['policy_3']:.3f} |"
        for row in results["methods"]
    ]
    lines += ["", *(f"{note}" for note in results["notes"]), "", f"`{command}`, {results['date']}.", ""]
    return "\n".join(lines)


def notes(results: dict[str, Any]) -> list[str]:
    """What the tables need said."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["gptq"]:
        rows.setdefault(row["by"], []).append(row)
    slowest = max(row["seconds"] for row in rows["rlquant"])
    said = [f"Under {LIMIT_S:.0f} s: {'met' if slowest < LIMIT_S else 'MISSED'} ({slowest:.1f} s)."]
    for ours, theirs in (
        ("rlquant", "GPTQModel"),
        ("rlquant, the paper's steps alone", "NumPy + LAPACK"),
        ("rlquant", "NumPy + LAPACK"),
    ):
        if theirs in rows:
            pairs = zip(rows[ours], rows[theirs], strict=True)
            ratio = max(mine["cpu_seconds"] / other["cpu_seconds"] for mine, other in pairs)
            verdict = "met" if ratio <= LIMIT_RATIO else "MISSED"
            said.append(
                f"{ours} within {LIMIT_RATIO:.0f}x of {theirs}: {verdict} ({ratio:.2f}x of the CPU time)."
            )
    said += [
        "Other work ran on the machine meanwhile, so CPU seconds are the steadier figure. rlquant's include a forward "
        "pass of the layer, act-order, the search for scales, the comparison of each row with round-to-nearest, the "
        "correction of the bias and packing; the others stop at the rounded weight.",
        "A single layer leaves cle nothing to equalize; smoothquant needs activations.",
    ]
    peers = {peer: available(peer) for peer in ("gptqmodel", "hqq")}
    said.append(
        "Peers: " + ", ".join(f"{peer} {version or 'not installed'}" for peer, version in peers.items()) + "."
    )
    return said


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", default=",".join(TABLES), help="others stay as they were in --out")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "methods.json")
    options = parser.parse_args()
    if options.threads != os.cpu_count() and os.environ.get("OPENBLAS_NUM_THREADS") != str(options.threads):
        parser.error(
            f"set OPENBLAS_NUM_THREADS={options.threads}, or NumPy computes with another number of threads"
        )
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layer = heavy_tailed(nn.Linear(options.size, options.size))
    batches = list(hidden_inputs(options.rows, options.size, 1).split(1024))
    unseen = hidden_inputs(1024, options.size, 2)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    results |= {
        "date": options.date,
        "machine": machine_info(),
        "versions": package_versions(),
        "size": options.size,
        "rows": options.rows,
        "threads": options.threads,
    }
    for table in options.tables.split(","):
        results[table] = TABLES[table](layer, batches, unseen, options.repeats)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if not TABLES.keys() <= results.keys():
        return
    results["notes"] = notes(results)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    command = f"python benchmarks/methods.py --threads {options.threads} --repeats {options.repeats}"
    command = f"OPENBLAS_NUM_THREADS={options.threads} {command}"
    text = markdown(results, command)
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
