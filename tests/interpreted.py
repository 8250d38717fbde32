"""Triton's interpreter, made to run with NumPy 2.4: import it before the first kernel is started.

Triton 3.6 asks NumPy for the number in an array of one element, which NumPy 2.4 gives for arrays without axes only.
"""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_lang_tensor
