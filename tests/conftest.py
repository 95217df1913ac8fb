# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test; set before jax is imported."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling is most of what the tests do; without LLVM's slow passes it takes half as long.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
)

# Runs that build the same functions again find them compiled.
_cache = tempfile.TemporaryDirectory(prefix="di_star_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "2"


def pytest_collection_modifyitems(items):
    """Whole runs first: xdist deals out long runs of tests, so one process gets them all and builds
    their fixture once.
    """
    items.sort(key=lambda item: item.module.__name__ != "test_train")
