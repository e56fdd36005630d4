"""AIMET for PyTorch: its simulation model as it comes, sequential MSE, and cross-layer equalization with AdaRound."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import tvshim  # noqa: F401 - before aimet_torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse
from task import Quantized, Task, torch_runner
from torch.utils.data import DataLoader

#: Of the 15,000 that AIMET would take: what is left in about the time of our budget.
ITERATIONS = 500


def quantize(task: Task) -> Quantized:
    torch.manual_seed(task.seed)
    images = torch.from_numpy(task.calibrate())
    data = DataLoader(images, batch_size=task.even(50))
    example = images[:2]
    model = prepare_model(task.model())
    if task.setting == "best":
        equalize_model(model, dummy_input=example)  # folds batch norms too
        params = AdaroundParameters(data, num_batches=len(data), default_num_iterations=ITERATIONS, forward_fn=lambda m, x: m(x))
        model = Adaround.apply_adaround(model, example, params, path=str(task.scratch), filename_prefix="ada",
                                        default_param_bw=task.weights)  # fmt: skip
    else:
        fold_all_batch_norms(model, None, dummy_input=example)
    made = QuantizationSimModel(model, example, default_param_bw=task.weights, default_output_bw=task.activations)
    if task.setting == "best":
        made.set_and_freeze_param_encodings(str(task.scratch / "ada.encodings"))
    if task.setting == "seqmse":
        apply_seq_mse(made, data, num_candidates=20, forward_fn=lambda m, x: m(x))
    with torch.no_grad():
        made.compute_encodings(lambda m: [m(x) for x in data])
    return described(made.model.eval())


def described(made: Any) -> Quantized:
    """A simulation model and the quantizers that it has."""
    weights, activations = Counter[int](), Counter[int]()
    for part in made.modules():
        for name, quantizer in getattr(part, "param_quantizers", {}).items():
            if quantizer is not None and name == "weight":
                weights[int(quantizer.bitwidth)] += 1
        for quantizer in [*getattr(part, "input_quantizers", []), *getattr(part, "output_quantizers", [])]:
            if quantizer is not None:
                activations[int(quantizer.bitwidth)] += 1
    return Quantized(torch_runner(made), weights, activations)
