"""Where each listed image lies: one resolver for unpacked trees and archives, whatever form their paths have."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from longtail.data.large.facts import OTHER_RELEASES, Archive, Layout, Part
from longtail.data.large.store import DEFAULT, Piece, Store
from longtail.workflow import files

VERIFIED = Path("runs/.large/verified.json")  # archives whose MD5 was right, with size and time
NAMED = 3
BLOCK = 1 << 22


def find(store: Store, layout: Layout, keys: Sequence[str], *, verified: bool) -> dict[str, Piece]:
    """The piece of each key (`layout.form.key`): from the unpacked trees that there are, else from the archives.

    Every key is looked for before anything is read; with `verified`, the MD5 of each archive that is used is held
    against the published one. Raises FileNotFoundError naming archives and trees where there are none, and
    ValueError saying how many listed images are not there, three of them, and what release it seems to be.
    """
    wanted, found = set(keys), dict[str, Piece]()
    there = {part: [archive for archive in part.archives if store.exists(archive.name)] for part in layout.parts}
    for part, archives in there.items():
        trees = [tree for tree in part.trees if store.exists(tree)]
        for tree in trees:
            for path, size in store.tree(tree):
                if (key := layout.form.key(path)) in wanted and key not in found:
                    found[key] = Piece(path, 0, size())
        if not trees and not any(archive.read_in_place for archive in archives):
            raise FileNotFoundError(_to_put(store, layout, part, archives, verified=verified))
    for archive in (one for archives in there.values() for one in archives if one.read_in_place):
        if len(found) == len(wanted):  # an archive beside its tree is not read
            break
        if verified:
            verify(store, archive)
        for name, piece in store.members(archive.name, nested=archive.nested):
            if (key := layout.form.key(name)) in wanted:
                found.setdefault(key, piece)
    if missing := [key for key in keys if key not in found]:
        raise ValueError(
            f"{store.path}: {len(missing):,} of {len(keys):,} listed images of {layout.title} are not there: "
            f"{', '.join(missing[:NAMED])}{', ...' if len(missing) > NAMED else ''}. {_release(store, layout)}"
        )
    return found


def _to_put(store: Store, layout: Layout, part: Part, there: Sequence[Archive], *, verified: bool) -> str:
    """What to put where, and what to do with it."""
    for archive in there:  # a .tar.gz, in which nothing can be found without reading all of it
        if verified:
            verify(store, archive)
        return (
            f"{store.at(archive.name)}: it is there{' and complete' if verified else ''}; unpack it: `tar -xzf "
            f"{archive.name}` in {store.path}, which makes {part.trees[0]}. Then run this again"
        )
    named = " or ".join(
        f"{archive.name} ({archive.size}, {f'MD5 {archive.md5}' if archive.md5 else 'no MD5 published'})"
        for archive in part.archives
    )
    return (
        f"{store.path}: images of {layout.title} are missing. Put {named} there, or what it unpacks to "
        f"({', '.join(part.trees)}); LONGTAIL_LARGE names another place than {DEFAULT}. Then run this again. "
        f"{_release(store, layout)}"
    )


def _release(store: Store, layout: Layout) -> str:
    """What other release lies there, or is likely."""
    others = [who for name, who in OTHER_RELEASES[layout.folder].items() if store.exists(name)]
    if others:
        return f"What is there looks like {others[0]}; {layout.title} is made of another release"
    usual = {
        "imagenet": "It is made of ILSVRC2012; the editions of 2010 and of fall 2011 lack images of it",
        "places365": "It is made of Places365-Standard; Challenge and Extra69 are others",
        "inaturalist2018": "It is made of train_val2018; those of 2017, 2019 and 2021 have other images",
    }
    return f"{usual[layout.folder]}; or the archive was not unpacked to its end"


def verify(store: Store, archive: Archive) -> None:
    """Raise ValueError where an archive has another MD5 than published; one that was right is not read again."""
    if archive.md5 is None:
        return
    info = store.files.info(store.at(archive.name))
    state = [info["size"], str(info.get("mtime") or info.get("LastModified") or "")]
    known: Mapping[str, list] = files.read_json(VERIFIED) if VERIFIED.exists() else {}
    if known.get(store.at(archive.name)) == [archive.md5, *state]:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with store.files.open(store.at(archive.name), "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != archive.md5:
        raise ValueError(
            f"{store.at(archive.name)}: MD5 {digest.hexdigest()}, published is {archive.md5} ({archive.size}): cut "
            "off, or another edition"
        )
    files.write_json(VERIFIED, {**known, store.at(archive.name): [archive.md5, *state]})


def all_of(store: Store, layout: Layout, part: Part, *, verified: bool) -> Iterator[str]:
    """The paths of all images of a part: of its first tree that is there, else of its first archive.

    Raises FileNotFoundError where there is neither.
    """
    for tree in part.trees:
        if store.exists(tree):
            yield from (path for path, _ in store.tree(tree))
            return
    for archive in part.archives:
        if store.exists(archive.name) and archive.read_in_place:
            yield from (name for name, _ in store.members(archive.name, nested=archive.nested))
            return
    raise FileNotFoundError(_to_put(store, layout, part, [], verified=verified))
