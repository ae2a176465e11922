"""Which compilations the cases need."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.ahead_of_time.cases import Case
from benchmarks.ahead_of_time.checks import depends_on_tokens
from benchmarks.ahead_of_time.specialise import Compilation, Identity, specialise
from benchmarks.ahead_of_time.targets import Target
from moe_mt.kernels._launch import Launch, record_launches

__all__ = ["Needed", "needed", "variants"]

Settings = Mapping[str, Sequence[Any]]
"""Constants, ``num_warps`` or ``num_stages``, and the values to try for each."""


@dataclass(frozen=True, kw_only=True)
class Needed:
    """A compilation and the cases that need it."""

    compilation: Compilation
    tokens: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """The families of those cases, and the numbers of tokens of each."""

    @property
    def cases(self) -> list[str]:
        """The cases in words: ``family T=1,8,32``."""
        return [
            f"{family} T={','.join(map(str, tokens))}" for family, tokens in self.tokens.items()
        ]

    @property
    def identity(self) -> Identity:
        """The compilation's."""
        return self.compilation.identity


def needed(
    cases: Iterable[Case],
    targets: Iterable[Target],
    kernel: str = "",
    settings: Settings | None = None,
) -> tuple[list[Needed], list[str]]:
    """Return every compilation once, and what is wrong with how launches are specialised.

    Args:
        cases: Whose launches.
        targets: For which GPUs.
        kernel: Part of the names of the kernels that are wanted.
        settings: Tried instead of what the launchers chose, in all combinations.
    """
    found: dict[tuple[Any, ...], Needed] = {}
    specialised: list[tuple[tuple[str, ...], str]] = []
    for case, target in itertools.product(list(cases), targets):
        with record_launches(target.accelerator) as launches:
            case.run()
        count: Counter[str] = Counter()
        for launch in launches:
            compilation = specialise(launch, target)
            name = compilation.kernel_name
            count[name] += 1
            if kernel not in name:
                continue
            launched = (name, f"launch {count[name]} of", case.family, "for", target.name)
            tile = (compilation.tile, str(compilation.num_warps), str(compilation.num_stages))
            specialised.append(((*launched, *tile), compilation.arguments))
            for variant in variants(launch, settings or {}):
                compilation = specialise(variant, target)
                entry = found.setdefault(compilation.identity, Needed(compilation=compilation))
                tokens = entry.tokens.setdefault(case.family, [])
                if case.tokens not in tokens:
                    tokens.append(case.tokens)
    return list(found.values()), depends_on_tokens(specialised)


def variants(launch: Launch, settings: Settings) -> Iterator[Launch]:
    """Yield a launch with each combination of those settings that its kernel has."""
    options = {"num_warps", "num_stages"}
    names = [name for name in settings if name in options or name in launch.arguments]
    for values in itertools.product(*(settings[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        given = {name: chosen.pop(name) for name in options & chosen.keys()}
        yield replace(launch, arguments={**launch.arguments, **chosen}, **given)
