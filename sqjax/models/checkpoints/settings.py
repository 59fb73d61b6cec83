"""`Settings`: a checkpoint's config.json, of which each key is checked when it is read."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqjax.models.fields import What, wrong

#: The default of a key that every file must have.
REQUIRED: Any = object()

T = TypeVar("T")


class Settings:
    """The keys of a configuration file: ``settings(key, what, default)`` reads one.

    A wrong or missing value becomes a problem, and reading goes on with the default, so that all
    problems are found before one error lists them.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        prefix: str = "",
        names: Mapping[str, str] | None = None,
    ):
        """`prefix` stands before a key's name in problems: "rope_scaling: factor".

        `names` says what the file itself calls such a name, where it has other words.
        """
        self.values = values
        self.problems: list[str] = []
        self.seen: set[str] = set()
        #: The names of all keys in the order in which they were read, also those inside.
        self.read_names: list[str] = []
        self._prefix = prefix
        self._names = names or {}

    def __call__(self, key: str, what: What, default: Any = REQUIRED) -> Any:
        """The value of a key, or the default where the file has none, or has null."""
        self.seen.add(key)
        # null is the same as no key: Hugging Face writes it for what was never set.
        value = self.values.get(key)
        name = self.name(key)
        self.read_names.append(name)
        # A flag that is null was not left out: transformers takes it as false.
        if default is True and key in self.values and value is None:
            self.problems.append(wrong(name, value, what))
        if value is None and default is REQUIRED:
            self.problems.append(f"{name}: expected {what.expected}, got none")
            return None
        if value is None:
            return default
        if not what.holds(value):
            self.problems.append(wrong(name, value, what))
            return None if default is REQUIRED else default
        return value

    def name(self, key: str) -> str:
        """What problems call a key."""
        whole = self._prefix + key
        return self._names.get(whole, whole)

    def skip(self, key: str) -> None:
        """Notes that a key says nothing here, whatever its value is."""
        self.seen.add(key)

    def within(self, key: str) -> "Settings":
        """The keys of an object inside this one; none where there is no such object."""
        self.seen.add(key)
        inner = self.values.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            self.problems.append(
                f"{self.name(key)}: expected an object with names, got {inner!r}"
            )
        found = Settings(
            inner if isinstance(inner, Mapping) else {},
            f"{self._prefix}{key}: ",
            self._names,
        )
        # One list, so that what is wrong inside is reported with the rest.
        found.problems = self.problems
        found.read_names = self.read_names
        return found

    def refuse(self, problem: str) -> None:
        """Notes that the file asks for something that the model here does not do."""
        self.problems.append(problem)


#: How the value of a configuration's field is found in a file.
Source = Callable[[Settings], Any]


def read(key: str, what: What, default: Any = REQUIRED) -> Source:
    """The source of a field that is the value of a key."""
    return lambda settings: settings(key, what, default)
