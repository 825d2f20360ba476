"""Make a CUDA build of torchvision importable beside a CPU build of torch.

The package index holds no CPU build of torchvision for the pinned torch. Its Python half works once
the schemas of its compiled operators exist; importing this module declares them where they do not.
"""

import importlib.util

import torch

_BOX = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"({_BOX}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"({_BOX}) -> (Tensor, Tensor)",
    "ps_roi_align": f"({_BOX}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"({_BOX}) -> (Tensor, Tensor)",
    "deform_conv2d": "(Tensor input) -> Tensor",
    "_roi_align_backward": "(Tensor grad) -> Tensor",
    "_roi_pool_backward": "(Tensor grad) -> Tensor",
    "_ps_roi_align_backward": "(Tensor grad) -> Tensor",
    "_ps_roi_pool_backward": "(Tensor grad) -> Tensor",
    "_deform_conv2d_backward": "(Tensor grad) -> Tensor",
}

if importlib.util.find_spec("torchvision") is not None:
    for _name, _schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, _name):
            torch.library.define(f"torchvision::{_name}", _schema)
