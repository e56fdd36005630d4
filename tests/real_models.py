"""Quantized real networks for tests of exporters, each made once in a process, with scoring inputs."""

from functools import cache

import numpy as np
import torch
from conftest import DATA
from models import resnet20
from torch import Tensor

import roundel as rd
from roundel.data import Preprocess, batches, load_data


@cache
def ds_cnn(weights: str = "int8") -> tuple[rd.QModel, Tensor]:
    """DS-CNN with ``weights`` of that format, and its 2,200 scoring clips."""
    clips = np.load(DATA / "speech_commands_v2_test" / "shared_mfcc49x10_f16.npz")
    x = torch.from_numpy(clips["x"].astype(np.float32))[..., None]
    q = rd.quantize(rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite"), weights, "int8", data=[x[::20]])
    return q, x[np.arange(len(x)) % 10 != 0]


@cache
def resnet20_q() -> tuple[rd.QModel, Tensor]:
    """ResNet-20, a few of its calibration images, and 100 scoring images."""
    steps = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    calibrate, score = (
        [batch.args[0] for batch in batches(load_data(f"{DATA / 'cifar10_jpg' / name}", preprocess=steps))]
        for name in ("calib_train_50perclass.zip[::10]", "shared_test_300perclass.zip[::30]")
    )
    return rd.quantize(resnet20(), "int8", "int8", data=calibrate), torch.cat(score)


@cache
def kwt1() -> tuple[rd.QModel, Tensor]:
    """KWT-1 and 20 scoring clips; few calibrate it, for time."""
    folder = DATA / "speech_commands_v2_test"
    calibrate, score = (
        torch.cat([b.args[0] for b in batches(load_data(f"{folder / 'shared_kwt98x40_f16.npz'}{pick}"))])
        for pick in ("[2/class]", "[!5/class,!class=0]")
    )
    return rd.quantize(rd.read(DATA / "kwt1" / "kwt1.tflite", inputs=[214]), "int8", "int8", data=[calibrate]), score[:20]
