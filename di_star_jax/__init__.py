# SPDX-License-Identifier: Apache-2.0
import os

# On a CPU, XLA's log calls every hit of its own compilation cache an error; what fails still
# raises. Beside an accelerator the log stays, for there NCCL and libtpu say why they fail.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0")
if not any(os.path.exists(device) for device in _ACCELERATORS):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
