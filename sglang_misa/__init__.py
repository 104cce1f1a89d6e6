"""sglang-misa: cheaper token selection for DeepSeek Sparse Attention, as a fork-free SGLang plugin."""

import sys

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # Python is locating one of our programs
    from sglang_misa.missing_packages import excepthook

    sys.excepthook = excepthook
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a sign of the help, such as k̃
