"""Triton's interpreter, quicker: for tests whose kernels run in it."""

from triton import language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Let it replace the functions of Triton's language once a launch.

    It does so again at every call of a function within a kernel, where it finds nothing left to replace. That is most
    of its time, as it looks at every name of the language.
    """
    patch = interpreter._patch_lang

    def patch_once(fn):
        languages = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
        is_patched = languages and not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if is_patched else patch(fn)

    interpreter._patch_lang = patch_once
