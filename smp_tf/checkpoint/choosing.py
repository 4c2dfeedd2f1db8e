"""Which saves of a directory are whole, and which one is the latest.

    whole       a manifest of the same save is in the folders of all its parts
    lost        it was whole, or may be: a manifest cannot be read, or a part is not to
                be seen from here. Its files may be all that is left of it
    left over   anything else: what a save has written that was interrupted
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from smp_tf.checkpoint.folder import Folder, Seen
from smp_tf.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Save:
    """A save, as all ranks together see it."""

    number: int
    order: int
    save_id: str


def whole_saves(seen: Iterable[Seen]) -> list[Save]:
    """The whole ones, the latest last."""
    parts = _parts_of(seen)
    found = [
        Save(number, any_part.order, save_id)
        for (number, save_id), by_part in parts.items()
        for any_part in [next(iter(by_part.values()))]
        if save_id and set(range(any_part.mp_size)) <= by_part.keys()
    ]
    return sorted(found, key=lambda save: save.order)


def _parts_of(seen: Iterable[Seen]) -> Mapping[tuple[int, str], dict[int, Seen]]:
    parts: dict[tuple[int, str], dict[int, Seen]] = {}
    for each in seen:
        parts.setdefault((each.number, each.save_id), {})[each.part] = each
    return parts


def lost_numbers(seen: Collection[Seen]) -> set[int]:
    """Of the saves that must not be touched although they are not whole."""
    folders = {each.part for each in seen}
    found = {
        each.number
        for each in seen
        # Manifests are written when all parts have files: a folder that is not there
        # was there.
        if each.is_committed
        or each.error
        or not set(range(each.mp_size)) <= folders
    }
    return found - {save.number for save in whole_saves(seen)}


def chosen(folder: Folder, seen: Collection[Seen], number: int | None) -> Save | None:
    """The save with the number, or the latest; None if there never was one.

    Raises:
        ConfigError: it is not whole, or was whole once and is no more.
    """
    whole = whole_saves(seen)
    by_number = {save.number: save for save in whole}
    if number is None:
        latest = whole[-1] if whole else None
        later = [
            each
            for each in lost_numbers(seen)
            if latest is None or _is_later(seen, each, latest)
        ]
        if not later:
            return latest
        number = max(later)
    if number in by_number:
        return by_number[number]
    raise ConfigError(why_not_whole(folder, seen, number))


def _is_later(seen: Iterable[Seen], number: int, latest: Save) -> bool:
    """Whether a lost save came after a whole one. Numbers may fall, so the manifests
    are asked first, then the folders' lists."""
    orders = [each.order for each in seen if each.number == number]
    if max(orders) >= 0:
        return max(orders) > latest.order
    places: dict[int, dict[int, int]] = {}
    for each in seen:
        if each.is_committed:
            places.setdefault(each.part, {})[each.number] = each.place
    pairs = [
        (listed[number], listed[latest.number])
        for listed in places.values()
        if number in listed and latest.number in listed
    ]
    if pairs:
        return any(own > other for own, other in pairs)
    return number > latest.number


def why_not_whole(folder: Folder, seen: Iterable[Seen], number: int) -> str:
    """What is wrong with a save that is not whole: an error text."""
    known = [each for each in seen if each.number == number]
    where = f"directory={str(folder.directory)!r} checkpoint={folder.name}-{number}"
    for each in known:
        if each.error:
            return each.error
    remedy = "bring them back from a copy, or use another checkpoint by its prefix"
    sizes = {each.mp_size for each in known if each.mp_size}
    if not sizes:
        parts = [each.part for each in known if each.is_committed]
        if not parts:
            return f"there is no such checkpoint: {where}"
        gone = [str(folder.manifest_path(part, number)) for part in parts]
        return (
            f"a checkpoint was whole, and its manifests are gone: {where}"
            f" missing={gone}; {remedy}"
        )
    have = {each.part for each in known if each.save_id}
    missing = [part for part in range(max(sizes)) if part not in have]
    files = [str(folder.manifest_path(part, number)) for part in missing]
    return f"parts of a checkpoint are missing: {where} missing={files}; {remedy}"
