"""The optional packages that text needs, each imported only where it is used."""

from types import ModuleType

_FIX = "pip install sqjax[demo]"


def tokenizers_package() -> ModuleType:
    """The package `tokenizers`, with its submodules."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as error:
        raise ImportError(
            f"this checkpoint's tokenizer needs `tokenizers`: {_FIX}"
        ) from error
    return tokenizers


def templates_module() -> ModuleType:
    """Our module that renders templates with the package `jinja2`."""
    try:
        from sqjax.models.text import sandbox
    except ImportError as error:
        raise ImportError(
            f"this checkpoint's chat template needs `jinja2`: {_FIX}"
        ) from error
    return sandbox
