"""What the command ``export`` does, once its options are parsed."""

from __future__ import annotations

from pathlib import Path

from rlquant.errors import unknown_name

__all__ = ["TARGETS", "run_export", "run_export_language"]

TARGETS = ("c", "onnx", "program")


def run_export(
    source: str, target: str, out: Path, env: str | None, normaliser: Path | None, trust: bool
) -> None:
    """Compile an agent or artifact and write it as C99, as an ONNX graph or as a program folder."""
    from rich.console import Console

    from rlquant.control import load
    from rlquant.control.compile import compile_agent

    if target not in TARGETS:
        raise unknown_name("export target", target, TARGETS)
    agent = load(source, env=env, normaliser=normaliser, trust=trust)
    program = compile_agent(agent)
    if target == "c":
        from rlquant.deploy.export_c import export_c

        names = ", ".join(path.name for path in export_c(program, out))
        written = f"{names}; check with: cc -std=c99 -O2 policy.c main.c -lm && ./a.out"
    elif target == "onnx":
        from rlquant.deploy.onnx_runtime import export_onnx

        metadata = {"environment": agent.env.id, "precision": agent.precision, "method": agent.method}
        size = export_onnx(program, out / "policy.onnx", masked=agent.masked, metadata=metadata)
        written = f"policy.onnx ({size:,} bytes)"
    else:
        from rlquant.deploy.files import save_program

        written = f"a program ({save_program(program, out):,} bytes)"
    Console(highlight=False, soft_wrap=True).print(f"{out}: {agent.precision}, {written}")


def run_export_language(source: str, form: str, out: Path, trust: bool) -> None:
    """Write the artifact of a language model as a checkpoint that other libraries load."""
    from rich.console import Console

    from rlquant.llm.checkpoints import FORMATS, write_checkpoint
    from rlquant.llm.load import load

    if form not in FORMATS:
        raise unknown_name("export target for a language model", form, FORMATS)
    lm = load(source, trust=trust)
    size = write_checkpoint(lm, out, form)
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {lm.precision}, a checkpoint for {form} ({size:,} bytes)"
    )
