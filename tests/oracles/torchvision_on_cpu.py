"""Make a CUDA build of torchvision importable beside a CPU build of torch.

The package index holds no CPU build of torchvision for the pinned torch. Its Python half works once
the schemas of its compiled operators exist; importing this module declares them where the compiled
half cannot be loaded. Where it can, a second declaration would abort the process.
"""

import importlib.util
from pathlib import Path

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


def _compiled_half_loads(folders: list[str]) -> bool:
    libraries = [file for folder in folders for file in Path(folder).glob("_C*.so")]
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:  # it needs libraries of CUDA
        return False
    return bool(libraries)


_found = importlib.util.find_spec("torchvision")
if _found is not None and not _compiled_half_loads(list(_found.submodule_search_locations or ())):
    for _name, _schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, _name):
            torch.library.define(f"torchvision::{_name}", _schema)
