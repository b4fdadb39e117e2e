"""The mathematics of quantization: number formats, affine maps, observers, layers and post-training methods.

>>> import torch
>>> from rlquant.quant import quantize_, weight_bytes
>>> policy = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
>>> weight_bytes(policy)
3344
>>> weight_bytes(quantize_(policy, "int4"))
928
"""

from rlquant.quant.affine import QParams, dequantize, fake_quantize, qparams_from_range, quantize
from rlquant.quant.bench import Bench
from rlquant.quant.calibrate import eval_mode
from rlquant.quant.embedding import QuantEmbedding
from rlquant.quant.formats import FORMATS, Format, get_format, unsigned
from rlquant.quant.granularity import Granularity
from rlquant.quant.kinds import empty_layer
from rlquant.quant.ladder import Step, greedy_ladder
from rlquant.quant.layers import QuantConv2d, QuantizedLayer, QuantLinear, device_of
from rlquant.quant.methods import METHODS, Finisher, Method, Rule, Transform, get_method
from rlquant.quant.metrics import max_error, mse, sqnr_db
from rlquant.quant.mixed import MixedScheme
from rlquant.quant.moments import InputMoments
from rlquant.quant.notes import CalibrationWarning
from rlquant.quant.observers import Observer, weight_qparams
from rlquant.quant.packing import pack, packed_size, unpack
from rlquant.quant.ptq import prepare_empty_, quantizable, quantize_
from rlquant.quant.qat import QATController, convert_, grid_parameters, prepare_qat_
from rlquant.quant.ranges import OBSERVERS, get_observer
from rlquant.quant.recurrent import QuantGRU, QuantLSTM
from rlquant.quant.rewrites import Link, center_head_, find_links, fold_scale_
from rlquant.quant.scheme import SCHEME_EXAMPLES, Scheme, scheme_choices
from rlquant.quant.size import LayerSize, size_table, weight_bytes
from rlquant.quant.tensor import QuantizedWeight

__all__ = [
    "FORMATS",
    "METHODS",
    "OBSERVERS",
    "SCHEME_EXAMPLES",
    "Bench",
    "CalibrationWarning",
    "Finisher",
    "Format",
    "Granularity",
    "InputMoments",
    "LayerSize",
    "Link",
    "Method",
    "MixedScheme",
    "Observer",
    "QATController",
    "QParams",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantGRU",
    "QuantLSTM",
    "QuantLinear",
    "QuantizedLayer",
    "QuantizedWeight",
    "Rule",
    "Scheme",
    "Step",
    "Transform",
    "center_head_",
    "convert_",
    "dequantize",
    "device_of",
    "empty_layer",
    "eval_mode",
    "fake_quantize",
    "find_links",
    "fold_scale_",
    "get_format",
    "get_method",
    "get_observer",
    "greedy_ladder",
    "grid_parameters",
    "max_error",
    "mse",
    "pack",
    "packed_size",
    "prepare_empty_",
    "prepare_qat_",
    "qparams_from_range",
    "quantizable",
    "quantize",
    "quantize_",
    "scheme_choices",
    "size_table",
    "sqnr_db",
    "unpack",
    "unsigned",
    "weight_bytes",
    "weight_qparams",
]
