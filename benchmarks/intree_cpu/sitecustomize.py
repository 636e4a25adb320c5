"""Let vLLM's own MooncakeConnector start on a CPU host, to measure against it.

It asks ``torch.accelerator`` for the current device, which raises where there is none. Python imports this module at
start when its folder is on PYTHONPATH; it answers that one question with device 0 and changes nothing else.
"""

import importlib.abc
import importlib.machinery
import sys

TARGET = "torch.accelerator"


class AcceleratorFinder(importlib.abc.MetaPathFinder):
    """Loads ``torch.accelerator`` as usual, then replaces the two functions that need a device."""

    def find_spec(self, name, path=None, target=None):
        """Return the module's usual spec with a loader that patches it."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            module.current_device_index = lambda: 0
            module.set_device_index = lambda *_: None

        spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, AcceleratorFinder())
