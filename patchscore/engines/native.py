"""The C++ extension `patchscore._native`, or why there is none."""

try:
    import patchscore._native as native

    missing = None
except ImportError as error:  # not built, or built for another Python
    native = None
    missing = f"the C++ extension was not built ({error})"
