"""Which attention kernels training may use."""

from __future__ import annotations

import torch

__all__ = ["avoid_cudnn_attention"]


def avoid_cudnn_attention() -> None:
    """Switch cuDNN's scaled-dot-product attention off, for the process.

    From torch 2.11 on its backward pass gives NaN where a mask is passed, the length is 64 more than a multiple of 128
    and a query's scores are far below zero (https://github.com/pytorch/pytorch/issues/196678), and it plans each new
    length for milliseconds, which takes a third of the time that a step on a small model has. It is a switch of the
    process and not a context, since recomputed blocks run their forward pass again within the backward pass.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
