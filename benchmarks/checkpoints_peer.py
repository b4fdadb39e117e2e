"""What ``checkpoints.py`` runs in the environments of other libraries; it needs nothing of rlquant.

    python checkpoints_peer.py read transformers|gptqmodel|autogptq FOLDER DTYPE IDS.npy LOGITS.npy
    python checkpoints_peer.py make MODEL OUT '{"bits": 4, "group_size": 32}' TEXTS.json

``read`` writes the logits float32 ``[tokens, vocabulary]`` of token ids int64 ``[tokens]``; ``make`` quantizes a float
model with GPTQModel. The last line on standard output is JSON: the versions that did it, and the kind of layer.
"""

import json
import os
import sys
from importlib import metadata

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch

torch.set_num_threads(1)
PACKAGES = ("torch", "transformers", "gptqmodel", "auto-gptq", "compressed-tensors", "optimum", "accelerate")


def main() -> None:
    """Read or make."""
    command, *arguments = sys.argv[1:]
    kind = read(*arguments) if command == "read" else make(*arguments)
    print(json.dumps({"versions": dict(versions()), "layer": kind}))


def read(reader: str, folder: str, dtype: str, ids: str, out: str) -> str:
    """Load a checkpoint and write its logits; the class of its first quantized layer."""
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model = loaded(reader, folder, kind).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))[None]).logits[0]
    np.save(out, logits.float().numpy())
    return next(type(part).__name__ for name, part in model.named_modules() if name.endswith("q_proj"))


def loaded(reader: str, folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model as the reader's documentation says to load it."""
    if reader == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if reader == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(folder, device="cpu", dtype=dtype, backend="torch").model
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", torch_dtype=dtype, disable_exllama=True, disable_exllamav2=True
    ).model


def make(source: str, out: str, settings: str, texts: str) -> str:
    """Quantize a model folder by GPTQModel on the CPU."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(source, QuantizeConfig(**json.loads(settings)), device="cpu")
    with open(texts, encoding="utf-8") as file:
        model.quantize(json.load(file), batch_size=4)
    model.save(out)
    return settings


def versions():
    """Of the packages that are there."""
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()
