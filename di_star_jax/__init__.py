# SPDX-License-Identifier: Apache-2.0
import os

# XLA's C++ log reports its own compilation cache's every hit on CPU as an error; what fails still
# raises.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
