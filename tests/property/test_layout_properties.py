"""Names from a peer's manifest: whatever is taken stays in the model's folder, and each file has a place of its own."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import event, example, given
from hypothesis import strategies as st

from swarmd.node.models.layout import METADATA_NAMES, TEMPLATE_FOLDER, is_layout, placed

ROOT = Path("/store/partial/0123")

pieces = st.sampled_from(["..", ".", "/", "\\", "\0", "\n", "~", "a", "b", "A", "\u00e9", "-", f"{TEMPLATE_FOLDER}/"])
endings = st.sampled_from(["", ".safetensors", ".gguf", ".jinja", ".json", ".bin", ".SAFETENSORS"])
made_up = st.builds(lambda parts, ending: "".join(parts) + ending, st.lists(pieces, max_size=4), endings)
plain = st.from_regex(r"[a-zA-Z.+-]{1,4}\.safetensors", fullmatch=True)
names = st.one_of(made_up, plain, st.text(max_size=12), st.sampled_from(METADATA_NAMES))


@given(st.lists(names, min_size=1, max_size=3))
@example(["config.json", f"{TEMPLATE_FOLDER}/a.jinja", "a.safetensors", "b.safetensors"])
def test_accepted_names_stay_inside_and_apart(hostile: list[str]) -> None:
    """Put where they have the best chance: in order, in a folder that is a model without them."""
    weights = sorted(["model.safetensors", *(name for name in hostile if name.endswith(".safetensors"))])
    known = [name for name in METADATA_NAMES if name in {"config.json", *hostile}]
    found = [*known, *sorted(set(hostile) - set(known) - set(weights)), *weights]
    event(f"accepted: {is_layout(found)}")
    if not is_layout(found):
        return
    paths = [file.path for file in placed(ROOT, [(name, 1) for name in found]).files]
    for path in paths:
        assert os.path.normpath(path) == str(path)
        assert path.is_relative_to(ROOT)
        assert str(path).isascii()
        assert str(path).isprintable()
        assert path.suffix in (".safetensors", ".jinja", ".json", ".model", ".txt")
    assert len({str(path).lower() for path in paths}) == len(paths)
    assert not any(one in other.parents for one in paths for other in paths)
