"""The table of parts: YAML names a part (`geometry_type: pgc-texture-field`), the table gives its class."""

import difflib
from collections.abc import Callable, Iterable

_parts: dict[str, type] = {}


class RegistryError(KeyError):
    """A name that is not registered. The message names the nearest one that is."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Closing words of an error about `name`: the nearest of `known`, or all of them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "there is none to choose from"


def register(name: str) -> Callable[[type], type]:
    """Class decorator: enter a class under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def enter(cls: type) -> type:
        if name in _parts:
            taken = _parts[name]
            raise ValueError(f"{name!r} is registered already, by {taken.__module__}.{taken.__qualname__}")
        _parts[name] = cls
        return cls

    return enter


def find(name: str) -> type:
    """The class registered under `name`; `"main:first,second"` mixes others into it.

    A mixin stands left of the main class and earlier mixins left of later ones, so theirs are the methods that are called first.
    `Config` is the one of the first class that brings one: a mixin without its own keeps the main class's.

    Raises:
        RegistryError: a name is not registered.
    """
    if ":" not in name:
        if name not in _parts:
            raise RegistryError(f"{name!r} is not registered; {nearest(name, _parts)}")
        return _parts[name]
    main, _, rest = name.partition(":")
    mixins = rest.split(",")
    bases = tuple(find(part.strip()) for part in (*mixins, main))
    return type(f"{main}.{rest}", bases, {})
