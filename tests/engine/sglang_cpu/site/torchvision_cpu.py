"""Let ``import torchvision`` succeed beside CPU torch.

The wheel's extension is built for CUDA; without it the import dies with "operator torchvision::nms does not exist".
Declaring the two schemas first is enough: the Python transforms work, the C++ operators stay unavailable. Imported by a
``.pth`` file; costs nothing until torchvision is imported.
"""

import sys
from importlib.abc import MetaPathFinder

libraries = []


class DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                libraries.append(library)
        return None


sys.meta_path.insert(0, DeclareOperators())
