# SPDX-License-Identifier: Apache-2.0
import glob
import importlib.util
import os
import signal
import sys

__version__ = "0.2.0"

# NVIDIA, Windows' Linux with a GPU, NVIDIA's Jetson, AMD, TPUs of both kinds.
_ACCELERATORS = (
    "/dev/nvidia*",
    "/dev/dxg",
    "/dev/nvmap",
    "/dev/kfd",
    "/dev/accel*",
    "/dev/vfio/*",
)


def _on_cpu() -> bool:
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _quieten() -> None:
    """Silences lines that nobody can act on. Must come before jax and transformers."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    if not _on_cpu():
        return  # where NCCL and libtpu say in their log why they fail
    # XLA's log calls every hit of its own compilation cache an error; what fails still raises.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Else libtpu, installed as a compiler, looks for a TPU and says at length that there is none.
    if sys.platform == "linux" and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _use_huge_pages() -> None:
    """Starts a command anew with huge pages, which glibc is asked for before a process begins.

    XLA's temporaries are new memory in every step, and on a CPU a fifth of the step goes into
    making small pages of it (docs/performance.md).
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and _on_cpu() and "glibc.malloc.hugetlb" not in given:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, "glibc.malloc.hugetlb=1")))
        os.execv(sys.executable, sys.orig_argv)


def _leave(number, frame) -> None:
    """Ends a command that is still importing: an exception could be lost in there."""
    print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    os._exit(130)


def _end_in_one_line(kind, error, traceback) -> None:
    """What a command says in a Python without jax."""
    if kind is ModuleNotFoundError and importlib.util.find_spec("jax") is None:
        print(
            f"error: {sys.executable} has no jax; activate the environment that this was installed "
            "in (source .venv/bin/activate), or run pip install -e . in the folder of the project",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)
    sys.__excepthook__(kind, error, traceback)


_quieten()
# Only where the package is the command that was started, and not in a program that imports it:
# Python says "-m" while it looks for the module to run.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "di-star":
    sys.excepthook = _end_in_one_line
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # until command.run
    _use_huge_pages()
