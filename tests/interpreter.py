"""Triton's interpreter without its repetitions, and with any NumPy: kernels compute the same, in less time."""

from triton.runtime import interpreter


def patch_the_language_once_a_launch():
    """Calls of device functions find the language patched, as the launch left it.

    Each of them patches it anew otherwise, and to that end looks through all that triton.language has: 1 ms a call, of
    8,700 calls in one of test_attention_tiles.py. A Triton that patches in another way is left alone.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, set()

    class Launch:
        """Restores the language at the end of a launch, and never inside of it."""

        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            patched.clear()
            self.scope.restore()

    def patch_once(function):
        module = id(function.__globals__)  # a patch concerns the languages that the module imports
        if module in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(module)
        return Launch(patch(function))

    interpreter._patch_lang = patch_once


def read_numbers_with_any_numpy():
    """Bounds of loops that a kernel is given: Triton 3.6 reads them in a way that NumPy 2.5 refuses and 2.4 warns of.

    It keeps a number as an array of one element, which 3.7 squeezes before it makes an int of it.
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_read(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_read
