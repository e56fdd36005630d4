"""Lets torchvision be imported beside a CPU build of torch: its wheel wants two operators that only the CUDA build declares.

Roundel never imports torchvision; some toolkits do, without need here.
"""

import torch

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
